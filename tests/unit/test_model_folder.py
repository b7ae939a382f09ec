"""Model folders as people have them: each is fine-tuned, or ends in one line before the launch."""

import json

import pytest
import torch
from helpers import save_tiny_vit
from safetensors.torch import load_file, save_file

from vit.model import export_model, load_model
from vit.model_folder import read_model_folder
from vit.modules import with_first_names

LABELS = ["a", "b", "c"]
HEAD = ("classifier.weight", "classifier.bias")


@pytest.fixture
def folder(tmp_path):
    """A tiny ViT of the classes a, b and c."""
    names = dict(enumerate(LABELS))
    return save_tiny_vit(
        tmp_path / "model", labels=3, id2label=names, label2id={label: i for i, label in names.items()}
    )


def change_config(folder, **changes) -> None:
    """Set values of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def rename_weights(folder, rename, dtype=None) -> None:
    """``rename``: a name in the file -> its new one, or None to leave it out."""
    path = folder / "model.safetensors"
    state = {rename(name): tensor.to(dtype or tensor.dtype) for name, tensor in load_file(path).items()}
    state.pop(None, None)
    save_file(state, path, metadata={"format": "pt"})


def half(folder, dtype) -> None:
    rename_weights(folder, lambda name: name, dtype)
    change_config(folder, torch_dtype=str(dtype).removeprefix("torch."))


def split_weights(folder) -> None:
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def without_head(name):
    return None if name in HEAD else name


def base_alone(name):
    return None if name in HEAD else name.removeprefix("vit.")


def wrapped(name):
    return f"module.{name}"


# name: (what is done to the folder, what the notes say, whether the classifier is that of the file)
USABLE = {
    "as it was": (lambda f: None, [], True),
    "id2label from 1": (
        lambda f: change_config(f, id2label={"1": "a", "2": "b", "3": "c"}),
        ["config.json does not number the checkpoint's classes from 0 (id2label)"],
        False,
    ),
    "id2label with gaps": (
        lambda f: change_config(f, id2label={"0": "a", "2": "b", "5": "c"}),
        ["config.json does not number the checkpoint's classes from 0 (id2label)"],
        False,
    ),
    "id2label of more classes": (
        lambda f: change_config(f, id2label={"0": "a", "1": "b", "2": "c", "3": "d"}),
        ["labels have other names"],
        False,
    ),
    "id2label the wrong way round": (
        lambda f: change_config(f, id2label={"a": 0, "b": 1, "c": 2}),
        ["config.json does not number the checkpoint's classes from 0 (id2label)"],
        False,
    ),
    "id2label as a list": (lambda f: change_config(f, id2label=LABELS), [], True),
    "no id2label": (
        lambda f: change_config(f, id2label=None, label2id=None, num_labels=3),
        ["labels have other names"],
        False,
    ),
    "no architectures": (lambda f: change_config(f, architectures=None), [], True),
    "sizes as lists": (lambda f: change_config(f, image_size=[16, 16], patch_size=[4, 4]), [], True),
    "no preprocessing": (
        lambda f: (f / "preprocessor_config.json").unlink(),
        ["no preprocessor_config.json: images are resized to 16 px, mean and std 0.5"],
        True,
    ),
    "no head": (
        lambda f: rename_weights(f, without_head),
        ["new classifier with 3 outputs (checkpoint has none)"],
        False,
    ),
    "the base model alone": (
        lambda f: rename_weights(f, base_alone),
        ["new classifier with 3 outputs (checkpoint has none)"],
        False,
    ),
    "fp16": (lambda f: half(f, torch.float16), [], True),
    "bf16": (lambda f: half(f, torch.bfloat16), [], True),
    "several files": (split_weights, [], True),
}


@pytest.mark.parametrize("name", USABLE)
def test_folder_is_fine_tuned_with_its_weights(folder, tmp_path, name):
    before = load_file(folder / "model.safetensors")
    change, notes, has_head = USABLE[name]
    change(folder)
    assert read_model_folder(folder)["patch_size"] == 4
    loaded = load_model(str(folder), LABELS)
    assert len(loaded.notes) == len(notes) and loaded.new_classifier == (not has_head)
    assert all(part in note for part, note in zip(notes, loaded.notes))
    state, tolerance = with_first_names(loaded.model.state_dict()), 1e-2 if "16" in name else 0
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    same = {key for key in state if torch.allclose(state[key], before[key], atol=tolerance, rtol=tolerance)}
    assert same >= before.keys() - set(HEAD) and ("classifier.weight" in same) == has_head
    export_model(state, loaded.model.config, loaded.processor, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[key], tensor) for key, tensor in state.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["image_size"], config["id2label"]) == (16, {"0": "a", "1": "b", "2": "c"})
    larger = load_model(str(folder), LABELS, image_size=24)
    assert larger.model(torch.zeros(1, 3, 24, 24)).logits.shape == (1, 3)


def test_class_names_that_are_numbers_are_compared_as_text(folder):
    change_config(folder, id2label={"0": 0, "1": 1, "2": 2}, label2id=None)
    assert load_model(str(folder), ["0", "1", "2"]).notes == []


def lose_a_file(folder) -> None:
    split_weights(folder)
    next(folder.glob("model-*.safetensors")).unlink()


def cut(folder) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


REFUSED = {
    "image_size [16, 20]": (lambda f: change_config(f, image_size=[16, 20]), "has image_size [16, 20]"),
    "image_size as text": (lambda f: change_config(f, image_size="16"), "has image_size 16"),
    "patch_size [4, 2]": (lambda f: change_config(f, patch_size=[4, 2]), "has patch_size [4, 2]"),
    "layers as text": (
        lambda f: change_config(f, num_hidden_layers="4"),
        "num_hidden_layers 4, which is no ViT",
    ),
    "heads that do not divide": (
        lambda f: change_config(f, num_attention_heads=5),
        "hidden_size 32, num_att",
    ),
    "one channel": (lambda f: change_config(f, num_channels=1), "takes images of 1 channels"),
    "no model_type": (lambda f: change_config(f, model_type=None), "config.json has no model_type"),
    "quantized": (lambda f: change_config(f, quantization_config={"bits": 8}), "has quantized weights"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "no readable config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "no readable config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights beside it (model.safetensors)"),
    "weights of another name": (
        lambda f: (f / "model.safetensors").rename(f / "best.safetensors"),
        "no weights beside it (model.safetensors)",
    ),
    "a file is missing": (lose_a_file, "of-"),
    "cut off": (cut, "model.safetensors is damaged"),
    "Git LFS": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 9),
        "model.safetensors is a pointer of Git LFS: run `git lfs pull`",
    ),
    "weights of something else": (
        lambda f: save_file({"some.weight": torch.zeros(2)}, f / "model.safetensors"),
        "hold no weights of a ViT",
    ),
    "a wrapper's names": (lambda f: rename_weights(f, wrapped), "names in `module.vit.`"),
    "config of more layers": (lambda f: change_config(f, num_hidden_layers=6), "weights of 4 layers"),
    "config of fewer layers": (lambda f: change_config(f, num_hidden_layers=2), "weights of 4 layers"),
    "config of larger images": (
        lambda f: change_config(f, image_size=24),
        "position_embeddings of size [1, 17",
    ),
    "config of larger patches": (lambda f: change_config(f, patch_size=8), "which does not fit config.json"),
    "preprocessing no JSON": (
        lambda f: (f / "preprocessor_config.json").write_text("{"),
        "preprocessor_config.json is not readable",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_folder_is_refused_in_one_line_before_the_launch(folder, problems, name):
    change, message = REFUSED[name]
    change(folder)
    (found,) = problems(f"--model_name_or_path {folder}")
    assert found.startswith(f"--model_name_or_path {folder}: ") and message in found


def test_evaluation_alone_needs_the_preprocessing(folder, problems):
    (folder / "preprocessor_config.json").unlink()
    (found,) = problems(f"--model_name_or_path {folder} --eval_only")
    assert (
        found == f"--eval_only: {folder} has no preprocessor_config.json to prepare images by; copy it there"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 2}, "config.json does not describe"),
        ({"num_hidden_layers": 6}, "lacks 32 weights"),
        ({"image_size": 24}, "has 1 weights of other sizes, e.g. vit.embeddings.position_embeddings"),
    ],
)
def test_model_of_the_hub_is_refused_when_it_is_loaded(folder, changes, message):
    """No check reads its files before: transformers alone would leave layers out, or draw them."""
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(str(folder), LABELS)
