"""Attention rollout, and the pictures of vit_explain.py."""

import pytest
import torch
from helpers import save_tiny_vit, write_image
from PIL import Image

from vit.classify import Classifier
from vit.explain import attention_rollout, explain, patch_maps
from vit_explain import main


def test_rollout_is_the_product_of_layers_with_their_residuals():
    first = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])  # two heads, two tokens
    second = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    mixed = torch.tensor([[0.75, 0.25], [0.25, 0.75]])  # (mean of the heads + identity) / 2
    assert torch.allclose(attention_rollout([first]), mixed)
    expected = torch.tensor([[0.5, 0.5], [0.5, 0.5]]) @ mixed
    assert torch.allclose(attention_rollout([first, second]), expected)


def test_maps_are_of_the_class_token_or_of_the_mean():
    attention = torch.rand(3, 5, 5).softmax(-1)  # a class token and 2 x 2 patches
    maps = patch_maps(attention)
    assert maps.shape == (3, 2, 2) and torch.allclose(maps.sum((1, 2)), torch.ones(3))
    assert torch.allclose(maps[1].flatten(), attention[1, 0, 1:] / attention[1, 0, 1:].sum())
    attention = torch.rand(4, 4).softmax(-1)
    assert torch.allclose(patch_maps(attention).flatten(), attention.mean(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_vit(tmp_path_factory.mktemp("explained") / "model")


def test_attention_follows_the_image_and_the_prediction_is_that_of_the_model(model, tmp_path):
    classifier = Classifier(str(model))
    write_image(tmp_path / "image.png", 0, 0)
    plain = classifier.model(pixel_values=classifier.pixels(tmp_path / "image.png")[None]).logits.softmax(-1)
    found = explain(classifier, tmp_path / "image.png")
    assert found.probability == pytest.approx(plain.max().item(), abs=1e-5)
    assert found.label == classifier.labels[int(plain.argmax())]
    assert found.rollout.shape == (4, 4) and found.heads.shape == (4, 4, 4)
    assert found.rollout.sum() == pytest.approx(1, abs=1e-5) and found.pixels.shape == (16, 16, 3)
    # without queries and keys, every patch is looked at alike
    with torch.no_grad():
        for name, parameter in classifier.model.named_parameters():
            if "query" in name or "key" in name or "q_proj" in name or "k_proj" in name:
                parameter.zero_()
    even = explain(classifier, tmp_path / "image.png").heads
    assert even.max() == pytest.approx(1 / 16, abs=1e-6) == even.min()


def test_each_image_gets_a_picture_and_a_bad_one_stops_none(model, tmp_path, capsys):
    for folder in "ab":
        write_image(tmp_path / folder / "leaf.png", 0, 0)
    (tmp_path / "broken.png").write_text("no image")
    output = tmp_path / "pictures"
    words = ["--model", model, "--output", output, tmp_path / "broken.png", tmp_path / "a", tmp_path / "b"]
    assert main(list(map(str, words))) == 1
    assert sorted(path.name for path in output.iterdir()) == ["leaf.png", "leaf_1.png"]
    assert min(Image.open(output / "leaf.png").size) > 200
    said = capsys.readouterr()
    assert "broken.png: cannot be explained" in said.err and len(said.out.splitlines()) == 2


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    write_image(tmp_path / "leaf.png", 0, 0)
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path / "none"), str(tmp_path / "leaf.png")])
    assert len(capsys.readouterr().err.splitlines()) == 1
