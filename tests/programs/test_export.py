"""vit_predict.py --export onnx: the file alone gives what the model says."""

import json

import numpy as np
import pytest
import torch
from helpers import save_tiny_vit, write_image
from PIL import Image

import vit_predict
from vit.onnx_export import add_metadata, write_graph

NAMES = {0: "ant", 1: "bee é", 2: "<cat>"}


@pytest.fixture
def model(tmp_path):
    labels = {name: i for i, name in NAMES.items()}
    return save_tiny_vit(tmp_path / "model", labels=3, id2label=NAMES, label2id=labels)


def export(model, *words):
    return vit_predict.main(["--model", str(model), "--export", "onnx", *words])


def probabilities(session, facts, path) -> dict:
    """What a program without PyTorch and transformers computes from the file and its metadata."""
    height, width = facts["image_size"]
    image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image) / facts["pixel_unit"]
    pixels = (pixels - facts["image_mean"]) / facts["image_std"]
    batch = pixels.transpose(2, 0, 1)[None].astype(np.float32).repeat(5, 0)  # the model was traced with two
    logits = session.run(None, {"pixel_values": batch})[0]
    assert logits.shape == (5, 3) and np.allclose(logits[0], logits[4], atol=1e-5)
    powers = np.exp((logits[0] - logits[0].max()) / facts["temperature"])
    return dict(zip(facts["labels"], powers / powers.sum(), strict=True))


def test_the_file_and_its_metadata_are_enough_to_predict(model, capsys):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    write_image(model.parent / "image.png", 1, 1)
    assert export(model) == 0
    assert "model.onnx, 0." in capsys.readouterr().out
    assert not list(model.glob(".*"))
    words = ["--model", str(model), str(model.parent / "image.png"), "--format", "json", "--topk", "3"]
    assert vit_predict.main(words) == 0
    (row,) = json.loads(capsys.readouterr().out)
    session = onnxruntime.InferenceSession(model / "model.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    processor = json.loads(facts.pop("preprocessor_config"))
    facts = {name: json.loads(text) for name, text in facts.items()}
    assert facts["labels"] == list(NAMES.values()) and processor["resample"] == 2
    found = probabilities(session, facts, model.parent / "image.png")
    expected = {one["label"]: one["probability"] for one in row["predictions"]}
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_file_that_computes_something_else_is_not_kept(model, capsys, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (model / "model.onnx").write_bytes(b"an earlier one")

    class Off(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values) + 0.01

    wrong = "vit.onnx_export.write_graph"
    monkeypatch.setattr(wrong, lambda model, pixels, path: write_graph(Off(model), pixels, path))
    with pytest.raises(SystemExit) as end:
        export(model)
    assert end.value.code == 1 and "logits differ from PyTorch's by 0.01" in capsys.readouterr().err
    assert (model / "model.onnx").read_bytes() == b"an earlier one" and not list(model.glob(".*"))


def test_a_library_that_fails_is_one_line(model, capsys, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    def damage(path, texts):
        path.write_bytes(b"no graph")
        add_metadata(path, texts)

    monkeypatch.setattr("vit.onnx_export.add_metadata", damage)
    with pytest.raises(SystemExit) as end:
        export(model)
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and line.startswith("error: --export onnx: ")
    assert not list(model.glob("*.onnx*")) and not list(model.glob(".*"))


def test_a_model_that_no_file_holds_is_refused(model, capsys, monkeypatch):
    monkeypatch.setattr("vit_predict.find_spec", lambda name: name)
    monkeypatch.setattr("vit.onnx_export.MOST_BYTES", 1000)
    with pytest.raises(SystemExit):
        export(model)
    assert "--export onnx: the weights have 0.0 GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, there, message",
    [
        ([], [], "--export onnx: onnx and onnxruntime missing; `pip install onnx onnxruntime`"),
        ([], ["onnx"], "--export onnx: onnxruntime missing; `pip install onnxruntime`"),
        (["image.png"], [], "--export: takes no images, and stands alone"),
        (["--model", "owner/name"], ["onnx", "onnxruntime"], "--export onnx: owner/name is no folder"),
    ],
)
def test_what_cannot_be_exported_ends_with_2(model, capsys, monkeypatch, words, there, message):
    monkeypatch.setattr("vit_predict.find_spec", lambda name: name if name in there else None)
    with pytest.raises(SystemExit) as end:
        export(model, *words)
    assert end.value.code == 2 and message in capsys.readouterr().err
