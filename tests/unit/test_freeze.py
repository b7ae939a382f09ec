"""Frozen parameters: which they are, and that the backward pass ends above them."""

import pytest
import torch
from helpers import tiny_vit

from vit.data.dataset import DataError
from vit.layout import ParallelLayout, first_stage, freeze_problem
from vit.model import freeze_parameters, pad_classifier
from vit.modules import numbered_layers
from vit.optim import param_groups
from vit.parallel.boost import boost
from vit.run_folder import parameters_text
from vit.settings import Settings


def boosted_model(monkeypatch, freeze: str, **changes) -> torch.nn.Module:
    """As `boost` gives it to plain PyTorch, without a process group."""
    chosen = dict(plugin="none", precision="fp32", weight_decay=0.1, learning_rate=0.1, freeze=freeze)
    monkeypatch.setattr(
        "vit.parallel.boost.boost_plain", lambda model, optimizer, _: (None, model, optimizer)
    )
    torch.manual_seed(0)
    model = tiny_vit()
    freeze_parameters(model, freeze)
    return boost(model, Settings(layout=ParallelLayout(1), **chosen | changes)).model.train()


def parameters_in_graph(loss: torch.Tensor) -> set[int]:
    """Ids of the parameters that a backward pass of ``loss`` would reach."""
    found, seen, nodes = set(), set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("freeze, first_trained", [("backbone", 4), ("0", 0), ("2", 2), ("4", 4)])
def test_backward_pass_ends_above_the_frozen_layers(monkeypatch, freeze, first_trained, recompute):
    model = boosted_model(monkeypatch, freeze, grad_checkpoint=recompute)
    needs_grad = {}
    numbers = {layer: number for number, layer in numbered_layers(model).items()}

    def seen(layer, inputs, output) -> None:
        output = output[0] if isinstance(output, tuple) else output
        needs_grad.setdefault(numbers[layer], output.requires_grad)

    for layer in numbers:
        layer.register_forward_hook(seen)
    loss = model(torch.ones(2, 3, 16, 16)).logits.sum()
    assert needs_grad == {number: number >= first_trained for number in range(4)}
    trained = {id(param): name for name, param in model.named_parameters() if param.requires_grad}
    if not recompute:  # whose graph of a layer is made in the backward pass
        assert parameters_in_graph(loss) == set(trained)
    loss.backward()
    assert all((param.grad is not None) == (id(param) in trained) for param in model.parameters())


@pytest.mark.parametrize("freeze, parts", [("backbone", ["classifier"]), ("4", ["classifier", "layernorm"])])
def test_what_is_not_frozen(freeze, parts):
    model = tiny_vit()
    freeze_parameters(model, freeze)
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    assert names == [name for name, _ in model.named_parameters() if name.split(".")[-2] in parts]
    freeze_parameters(model, None)
    assert names == [name for name, param in model.named_parameters() if param.requires_grad]
    pad_classifier(model, 4)  # of tensor parallelism: the new classifier is trained
    assert model.classifier.weight.requires_grad and model.classifier.bias.requires_grad


@pytest.mark.parametrize("freeze, stages", [("5", 1), ("backbone", 2), ("2", 2)])
def test_model_that_is_known_when_it_is_loaded_is_refused_then(freeze, stages):
    with pytest.raises(DataError, match=f"--freeze {freeze}: the "):
        freeze_parameters(tiny_vit(), freeze, stages)
    assert not freeze_problem("5", 2, None) and freeze_problem("backbone", 2, None).endswith("use PP_SIZE=1")


def test_frozen_parameters_are_in_no_group_of_the_optimizer():
    model = tiny_vit()
    freeze_parameters(model, "2")
    grouped = {id(param) for group in param_groups(model, 0.1, 0.8) for param in group["params"]}
    assert grouped == {id(param) for param in model.parameters() if param.requires_grad}
    scales = {group["lr_scale"] for group in param_groups(model, 0.1, 0.8)}
    assert min(scales) == pytest.approx(0.8**2)  # of the lowest layer that is trained, as without freezing


def test_plan_counts_what_is_trained():
    model = tiny_vit()
    total = sum(param.numel() for param in model.parameters()) / 1e6
    assert parameters_text(model) == f"{total:.1f} M parameters"
    freeze_parameters(model, "backbone")
    assert parameters_text(model) == f"{total:.1f} M parameters, 99 of them trained"


@pytest.mark.parametrize("layers", [4, 7, 12, 13])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_first_stage_is_that_of_colossal_ai(layers, stages):
    from colossalai.pipeline.stage_manager import PipelineStageManager

    manager = PipelineStageManager.__new__(PipelineStageManager)
    manager.num_layers_per_stage, manager.num_model_chunks = None, 1
    assert first_stage(layers, stages) == manager.distribute_layers(layers, stages)[0]
