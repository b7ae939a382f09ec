"""Parameter groups of a small model by name, and the moving average of the weights."""

import pytest
import torch
from helpers import tiny_vit

from vit.modules import layer_number, with_first_names
from vit.optim import GeminiAdamW, WeightEMA, param_groups


def file_name(name: str) -> str:
    """The name that a parameter has in files, whatever transformers calls it."""
    return next(iter(with_first_names({name: torch.zeros(())})))


def test_biases_norms_and_embeddings_are_not_decayed():
    model = tiny_vit()
    names = {id(param): name for name, param in model.named_parameters()}
    decayed, rest = param_groups(model, 0.3)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    modules = {file_name(names[id(p)]).rsplit(".", 2)[-2] for p in decayed["params"]}
    assert modules == set("projection query key value dense classifier".split())
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    assert decayed["lr_scale"] == rest["lr_scale"] == 1


def test_learning_rates_fall_from_the_head_to_the_embeddings():
    model = tiny_vit()
    scales = {
        id(param): group["lr_scale"] for group in param_groups(model, 0.3, 0.5) for param in group["params"]
    }
    assert len(scales) == len(list(model.parameters()))
    expected = {
        "classifier": 1,
        "vit.layernorm": 1,
        "vit.encoder.layer.3": 0.5,
        "vit.encoder.layer.0": 0.5**4,
        "vit.embeddings": 0.5**5,
    }
    for name, param in model.named_parameters():
        for prefix, scale in expected.items():
            assert not file_name(name).startswith(prefix) or scales[id(param)] == scale, name


@pytest.mark.parametrize(
    "name, number",
    [
        ("vit.encoder.layer.3.attention.attention.query.weight", 3),
        ("vit.layers.11.mlp.fc1.weight", 11),
        ("module.vit.encoder.layer.0", 0),
        ("vit.embeddings.cls_token", None),
        ("classifier.weight", None),
        ("vit.layernorm.weight", None),
    ],
)
def test_layer_of_a_name(name, number):
    assert layer_number(name) == number


def names_of(groups: list[dict], model) -> list[set[str]]:
    names = {id(param): next(iter(with_first_names({name: 0}))) for name, param in model.named_parameters()}
    return [{names[id(param)] for param in group["params"]} for group in groups]


def test_groups_go_from_the_classifier_to_the_embeddings_with_matrices_first():
    model = tiny_vit(num_hidden_layers=2)
    groups = param_groups(model, 0.3, 0.5)
    expected = [(1.0, 0.3), (1.0, 0.0), (0.5, 0.3), (0.5, 0.0), (0.25, 0.3), (0.25, 0.0), (0.125, 0.3)]
    expected.append((0.125, 0.0))
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == expected
    names = names_of(groups, model)
    assert names[0] == {"classifier.weight"}
    assert names[1] == {"classifier.bias", "vit.layernorm.weight", "vit.layernorm.bias"}
    assert names[6] == {"vit.embeddings.patch_embeddings.projection.weight"}
    bias = "vit.embeddings.patch_embeddings.projection.bias"
    assert names[7] == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings", bias}
    for depth, layer in ((2, 1), (4, 0)):  # the last layer is the second group
        for group in (depth, depth + 1):
            assert all(f".layer.{layer}." in name for name in names[group])
    assert sum(map(len, names)) == len(list(model.parameters()))


def test_fixed_position_embeddings_of_any_name_are_not_decayed():
    model = tiny_vit(num_hidden_layers=1)
    model.vit.embeddings.pos_embed = torch.nn.Parameter(torch.zeros(1, 4, 32))
    decayed, rest = names_of(param_groups(model, 0.3), model)
    assert "vit.embeddings.pos_embed" in rest and "vit.embeddings.pos_embed" not in decayed


def test_average_moves_by_one_minus_decay_and_is_applied_for_a_while():
    weights, masters = [torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.0])]
    ema = WeightEMA(lambda: (weights, masters), decay=0.75)
    masters[0].copy_(torch.tensor([5.0, 2.0]))
    weights[0].copy_(masters[0])
    ema.update()
    assert ema.averages[0].tolist() == [2.0, 2.0]
    with ema.applied():
        assert weights[0].tolist() == masters[0].tolist() == [2.0, 2.0]
    assert weights[0].tolist() == masters[0].tolist() == [5.0, 2.0]
    ema.load([torch.tensor([7.0, 8.0])])
    assert ema.averages[0].tolist() == [7.0, 8.0] and weights[0].tolist() == [5.0, 2.0]
    with pytest.raises(ValueError):
        ema.load([])


def test_average_is_that_of_the_master_weights_not_of_their_16_bit_copies():
    masters = [torch.tensor([1.001])]
    weights = [masters[0].bfloat16()]
    ema = WeightEMA(lambda: (weights, masters), decay=0.5)
    assert ema.averages[0].item() == pytest.approx(1.001, abs=1e-6)
    masters[0].fill_(3.003)
    weights[0].copy_(masters[0])
    ema.update()
    assert ema.averages[0].item() == pytest.approx(2.002, abs=1e-6)


def test_loaded_states_of_gemini_are_all_where_their_weights_are():
    """The number of steps was left on the CPU, where it was saved, which the kernel of a GPU refuses."""
    saved = torch.nn.Parameter(torch.ones(2))
    optimizer = GeminiAdamW([saved])
    saved.grad = torch.ones(2)
    optimizer.step()
    weights = torch.nn.Parameter(torch.ones(2, device="meta"))
    loaded = GeminiAdamW([weights])
    loaded.load_state_dict(optimizer.state_dict())
    assert {name: value.device.type for name, value in loaded.state[weights].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }


def test_weights_after_an_evaluation_are_those_of_the_masters_whatever_was_in_their_memory():
    """Gradients are there, where gemini offloads: they were taken for weights."""
    weights, masters = [torch.tensor([1.0])], [torch.tensor([1.0])]
    ema = WeightEMA(lambda: (weights, masters), decay=0.5)
    masters[0].fill_(3.0)
    weights[0].fill_(-77.0)
    with ema.applied():
        assert weights[0].item() == masters[0].item() == 1.0
    assert weights[0].item() == masters[0].item() == 3.0


def test_average_is_left_also_when_an_evaluation_fails():
    weights = [torch.tensor([1.0])]
    ema = WeightEMA(lambda: (weights, weights), decay=0.5)
    weights[0].fill_(3.0)
    with pytest.raises(KeyError), ema.applied():
        assert weights[0].item() == 1.0
        raise KeyError
    assert weights[0].item() == 3.0
