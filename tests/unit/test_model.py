"""ViTs from presets and folders; position embeddings; padded labels; the exported folder."""

import json
from copy import deepcopy

import pytest
import torch
from helpers import save_tiny_vit, tiny_vit

from vit.initial_weights import build_vit
from vit.model import export_model, load_model, pad_classifier, resize_position_embeddings
from vit.model_variants import add_drop_path
from vit.modules import (
    branch_dropouts,
    numbered_layers,
    output_projection,
    qkv_projections,
    self_attention,
    with_first_names,
    with_names_of,
)
from vit.patches.transformers_layers import class_token_alone, direct_forward
from vit.patches.transformers_vit import fuse_qkv, linear_patch_embedding
from vit.presets import PRESETS, known_architecture, mean_pooled_config

LABELS = ["a", "b", "c"]


def test_presets_have_the_published_sizes():
    """Parameters with 1,000 classes, to the last one; Dosovitskiy et al. (2021), Touvron et al. (2021)."""
    from transformers import ViTForImageClassification

    expected = {
        "vit-tiny-patch16-224": 5_717_416,
        "vit-small-patch16-224": 22_050_664,
        "vit-base-patch16-224": 86_567_656,
        "vit-large-patch16-224": 304_326_632,
        "vit-base-patch16-384": 86_859_496,
    }
    for name, count in expected.items():
        with torch.device("meta"):
            model = ViTForImageClassification(PRESETS[name].config(1000))
        assert sum(p.numel() for p in model.parameters()) == count, name
    sizes = ("tiny", "small", "base", "large")
    assert {f"vit-{size}-patch16-{pixels}" for size in sizes for pixels in (224, 384)} <= PRESETS.keys()


@pytest.mark.parametrize("name", ["vit-demo", "vit-lite-7-4"])
def test_small_presets_take_their_own_size(name):
    torch.manual_seed(0)
    loaded = load_model(name, LABELS)
    side = loaded.processor.size["height"]
    assert loaded.model(torch.zeros(2, 3, side, side)).logits.shape == (2, 3)
    assert loaded.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert loaded.notes == [f"{name}: random initial weights"]
    torch.manual_seed(0)
    again = load_model(name, LABELS).model.state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in loaded.model.state_dict().items())


def test_preset_is_found_behind_a_hub_name():
    base = PRESETS["vit-base-patch16-224"]
    for name in ("google/vit-base-patch16-224-in21k", "vit-base-patch16-224"):
        assert known_architecture(name) == base
    assert known_architecture("google/other") is None


def test_model_that_averages_its_patches_is_fine_tuned_and_exported_like_the_others(tmp_path):
    from transformers import AutoModelForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    whole = build_vit(mean_pooled_config(tiny_vit(5).config))
    whole.save_pretrained(tmp_path / "trained")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "trained")
    loaded = load_model(str(tmp_path / "trained"), LABELS, image_size=24)
    assert "new classifier with 3 outputs" in loaded.notes[0]
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = whole.base_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        assert torch.allclose(loaded.model.base_model(pixels).last_hidden_state, expected, atol=1e-5)
        export_model(loaded.model.state_dict(), loaded.model.config, loaded.processor, tmp_path / "tuned")
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
        assert torch.equal(again.eval()(pixels).logits, loaded.model.eval()(pixels).logits)


# ---- drop path


def test_drop_path_skips_whole_branches_of_single_images_in_training_only():
    torch.manual_seed(0)
    model, plain = tiny_vit(), tiny_vit()
    plain.load_state_dict(model.state_dict())
    add_drop_path(model, 0.6, 4)
    layers = numbered_layers(model)
    layer, same = layers[3], numbered_layers(plain)[3]
    x = torch.randn(4000, 2, 32)
    with torch.no_grad():
        assert torch.equal(
            model.eval()(torch.ones(1, 3, 16, 16)).logits, plain.eval()(torch.ones(1, 3, 16, 16)).logits
        )
        model.train()
        passed = layer(x)[0] if isinstance(layer(x), tuple) else layer(x)  # a tuple until transformers 4.55
        difference = (passed - x).abs().amax((1, 2))
        dropout = branch_dropouts(layer)[-1].dropout
        branch = dropout(output_projection(layer)(x))
        kept = branch.abs().amax((1, 2)) > 0
    # both branches of an image are skipped with 0.6 ** 2; a kept one is scaled to the same mean
    assert (difference == 0).float().mean().item() == pytest.approx(0.36, abs=0.03)
    assert kept.float().mean().item() == pytest.approx(0.4, abs=0.03)
    with torch.no_grad():
        assert torch.allclose(branch[kept], output_projection(same)(x)[kept] / 0.4, atol=1e-5)
    kept = [branch_dropouts(layer)[-1].dropout[1].keep.item() for layer in layers.values()]
    assert kept == pytest.approx([1, 0.8, 0.6, 0.4])


def test_layers_with_drop_path_are_compiled_once():
    """Not once for each rate: torch compiles eight and no more."""
    from torch._dynamo.utils import counters

    model = tiny_vit()
    add_drop_path(model, 0.6, 4)
    torch._dynamo.reset()
    counters.clear()
    for layer in numbered_layers(model.train()).values():
        layer.compile(dynamic=False, backend="eager")
    model(torch.ones(2, 3, 16, 16))
    assert counters["stats"]["unique_graphs"] == 1


# ---- positions


def positions(size: int, patch: int = 16):
    torch.manual_seed(0)
    model = tiny_vit(image_size=size, patch_size=patch).eval()
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings)
    return model


def test_positions_are_interpolated_to_a_larger_image_as_transformers_does():
    model, pixels = positions(224), torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(pixels, interpolate_pos_encoding=True).logits
        resize_position_embeddings(model, 384)
        assert model.vit.embeddings.position_embeddings.shape == (1, 1 + 24 * 24, 32)
        assert torch.allclose(model(pixels).logits, expected, atol=1e-5)
    assert model.config.image_size == 384


def test_positions_of_an_equal_size_stay_as_they_are():
    model = positions(32, patch=4)
    before = model.vit.embeddings.position_embeddings.clone()
    resize_position_embeddings(model, 32)
    assert torch.allclose(model.vit.embeddings.position_embeddings, before, atol=1e-6)


def test_image_size_off_the_patches_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--image_size 18 is no multiple of the model's patch size 4"):
        load_model(str(save_tiny_vit(tmp_path)), LABELS, image_size=18)


def test_image_size_changes_model_and_processor_and_is_said(tmp_path):
    loaded = load_model(str(save_tiny_vit(tmp_path)), LABELS, image_size=24)
    assert loaded.processor.size == {"height": 24, "width": 24}
    assert loaded.model(torch.zeros(1, 3, 24, 24)).logits.shape == (1, 3)
    assert "position embeddings interpolated from 16 to 24 px" in loaded.notes


# ---- heads


def weights_are(model, saved, but=()):
    return all(
        torch.equal(tensor, saved[name])
        for name, tensor in model.state_dict().items()
        if not name.startswith(but)
    )


def test_other_class_count_gets_a_new_classifier_and_keeps_the_rest(tmp_path):
    from transformers import ViTForImageClassification

    saved = ViTForImageClassification.from_pretrained(save_tiny_vit(tmp_path, labels=5)).state_dict()
    loaded = load_model(str(tmp_path), LABELS)
    assert loaded.model.classifier.out_features == 3 and weights_are(loaded.model, saved, but=("classifier",))
    assert loaded.notes == ["new classifier with 3 outputs (checkpoint has 5)"] and loaded.new_classifier


def test_same_classes_keep_their_head_and_other_names_do_not(tmp_path):
    from transformers import ViTForImageClassification

    label2id = {name: i for i, name in enumerate(LABELS)}
    save_tiny_vit(tmp_path, labels=3, id2label=dict(enumerate(LABELS)), label2id=label2id)
    saved = ViTForImageClassification.from_pretrained(tmp_path).state_dict()
    same = load_model(str(tmp_path), LABELS)
    assert weights_are(same.model, saved) and same.notes == []
    assert not same.new_classifier
    turned = load_model(str(tmp_path), LABELS[::-1])
    assert turned.notes == [] and not turned.new_classifier
    assert turned.model.config.id2label[0] == LABELS[-1]
    moved = load_model(str(tmp_path), ["c", "a", "b"])  # not its own inverse
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(turned.model.state_dict()[name], saved[name].flip(0))
        assert torch.equal(moved.model.state_dict()[name], saved[name][[2, 0, 1]])
    other = load_model(str(tmp_path), ["x", "y", "z"])
    assert other.new_classifier
    assert not torch.equal(other.model.classifier.weight, saved["classifier.weight"])
    assert "have other names" in other.notes[0] and other.model.config.id2label[0] == "x"


def test_checkpoint_without_a_classifier_gets_a_new_one(tmp_path):
    """As google/vit-base-patch16-224-in21k: the encoder and its pooler alone."""
    from transformers import ViTModel

    save_tiny_vit(tmp_path)
    encoder = ViTModel(tiny_vit().config)
    encoder.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), LABELS)
    assert weights_are(loaded.model.vit, encoder.state_dict())
    assert "new classifier with 3 outputs" in loaded.notes[0]


def test_other_architecture_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=f"{tmp_path}: is a 'bert' model; this example trains ViTs"):
        load_model(str(tmp_path), LABELS)


def test_weights_of_something_else_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = save_tiny_vit(tmp_path) / "model.safetensors"
    save_file({"some.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks .* weights of a ViT"):
        load_model(str(tmp_path), LABELS)


@pytest.mark.parametrize("tp, rows", [(1, 3), (2, 4), (4, 4), (3, 3)])
def test_labels_are_padded_to_tp_and_trimmed_on_export(tmp_path, tp, rows):
    from transformers import ViTForImageClassification

    loaded = load_model(str(save_tiny_vit(tmp_path / "in")), LABELS)
    pad_classifier(loaded.model, tp)
    state = loaded.model.state_dict()
    assert state["classifier.weight"].shape == (rows, 32) and not state["classifier.weight"][3:].any()
    pixels = torch.randn(2, 3, 16, 16)
    expected = loaded.model.eval()(pixels).logits[:, :3]
    if tp == 1:
        state = {name: tensor.half() for name, tensor in state.items()}
    export_model(state, loaded.model.config, loaded.processor, tmp_path / "out")
    exported = ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert exported.config.num_labels == 3 and exported.config.id2label == dict(enumerate(LABELS))
    assert torch.allclose(exported(pixels).logits, expected, atol=2e-3 if tp == 1 else 1e-6)


def test_export_writes_fp32_safetensors_and_nothing_else(tmp_path):
    from safetensors.torch import load_file

    loaded = load_model(str(save_tiny_vit(tmp_path / "in")), LABELS)
    half = {name: tensor.bfloat16() for name, tensor in loaded.model.state_dict().items()}
    export_model(half, loaded.model.config, loaded.processor, tmp_path / "out")
    names = ["SHA256SUMS", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_larger_products_change_neither_logits_nor_gradients(pooling):
    config = tiny_vit().config
    config.id2label = dict(enumerate(LABELS))
    torch.manual_seed(0)
    plain = build_vit(mean_pooled_config(config) if pooling == "mean" else config)
    faster = deepcopy(plain)
    linear_patch_embedding(faster)
    fuse_qkv(faster)
    class_token_alone(faster)
    direct_forward(faster)
    shape = (3, 3, config.image_size, config.image_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    logits = [model.train()(pixel_values=pixels).logits for model in (plain, faster)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-6, rtol=1e-5)
    for each in logits:
        each.square().sum().backward()
    gradients = {name: param.grad for name, param in faster.named_parameters()}
    for name, param in plain.named_parameters():
        torch.testing.assert_close(gradients[name], param.grad, atol=1e-6, rtol=1e-4)

    calls, tokens = [], []
    layers = numbered_layers(faster)
    attention = self_attention(layers[0])
    qkv_projections(attention)[0].register_forward_hook(lambda *_: calls.append(1))
    for number in (0, len(layers) - 1):
        layers[number].layernorm_after.register_forward_hook(lambda *given: tokens.append(given[2].shape[1]))
    faster(pixel_values=pixels)
    assert not calls  # it is really another way
    assert tokens == [16, 16] if pooling == "mean" else [17, 1]  # the classifier reads the class token alone
    if not hasattr(attention, "o_proj"):  # since 5.9 no argument says that attention weights are needed
        asked = [model(pixel_values=pixels, output_attentions=True).attentions for model in (plain, faster)]
        torch.testing.assert_close(asked[1], asked[0])
    with pytest.raises(ValueError, match="size"):
        faster(pixel_values=pixels[..., :-1])


def test_larger_products_leave_unusual_images_to_transformers():
    plain = tiny_vit(image_size=18)  # 4 px patches: the convolution leaves two pixels out
    faster = deepcopy(plain)
    linear_patch_embedding(faster)
    fuse_qkv(faster)
    pixels = torch.randn(2, 3, 18, 18, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(faster(pixel_values=pixels).logits, plain(pixel_values=pixels).logits)
    for wrong in (pixels[..., :-1], pixels[:, :2]):
        with pytest.raises(ValueError):
            faster(pixel_values=wrong)


# ---- releases of transformers


def test_state_dicts_of_both_forms_become_each_other():
    """Until 5.8 and since 5.9: what one writes, the other loads."""
    state = tiny_vit().state_dict()
    first = with_first_names(state)
    new = with_names_of(["vit.layers.0.mlp.fc1.weight"], first)
    assert "vit.encoder.layer.3.attention.attention.query.weight" in first
    assert "vit.layers.3.attention.q_proj.weight" in new and "vit.layers.0.layernorm_before.bias" in new
    assert len(first) == len(new) == len(state)
    assert with_first_names(new).keys() == first.keys() == with_names_of(first, new).keys()
    assert all(with_first_names(new)[name] is tensor for name, tensor in first.items())


@pytest.mark.parametrize("inner", ["weight", "base_layer.bias", "lora_A.default.weight"])
def test_what_peft_puts_into_a_layer_has_the_layers_first_name_too(inner):
    new, first = (
        f"vit.layers.1.attention.q_proj.{inner}",
        f"encoder.layer.1.attention.attention.query.{inner}",
    )
    assert list(with_first_names({f"base_model.model.{new}": 0})) == [f"base_model.model.vit.{first}"]
    assert list(with_names_of(["vit.layers.0.mlp.fc1.weight"], {f"vit.{first}": 0})) == [new]


def test_model_without_layers_of_a_known_name_is_an_error():
    with pytest.raises(LookupError, match="has no layers of a known name"):
        add_drop_path(torch.nn.Linear(2, 2), 0.1, 4)


@pytest.mark.parametrize("kind", ["class", "mean"])
def test_initial_weights_are_those_of_transformers_4_51(kind):
    """The same seed gives the same weights with every release: sums of some, recorded with 4.51.3."""
    config = tiny_vit().config
    torch.manual_seed(0)
    state = with_first_names(build_vit(mean_pooled_config(config) if kind == "mean" else config).state_dict())
    base = "ijepa" if kind == "mean" else "vit"
    names = ["embeddings.position_embeddings", "encoder.layer.2.output.dense.weight"]
    sums = [state[f"{base}.{name}"].abs().sum().item() for name in names]
    sums.append(state["classifier.weight"].abs().sum().item())
    expected = {"class": [8.288002, 32.715050, 1.670734], "mean": [7.818735, 32.457241, 1.507214]}[kind]
    assert sums == pytest.approx(expected, rel=1e-5)
    assert not state["classifier.bias"].any()
