"""Muon: its steps against a singular value decomposition, AdamW for the rest, and where it is refused."""

import copy

import pytest
import torch
from helpers import tiny_vit

from args import finetune_parser, resolve_finetune
from vit.checks import finetune_problems
from vit.modules import with_first_names
from vit.muon import MOMENTUM, Muon, orthogonal
from vit.optim import build_optimizer, param_groups
from vit.settings import Settings
from vit.system import Machine

RATE, DECAY = 0.01, 0.3


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 24, 64), (2, 64, 24)], ids=str)
def test_singular_values_are_brought_near_one_and_directions_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    inside = left.mT @ orthogonal(matrices) @ right.mT  # of U S V: S
    sizes = inside.diagonal(dim1=1, dim2=2)
    is_small = values < 0.01 * values.norm(dim=1, keepdim=True)
    assert 0.65 < sizes[~is_small].min() and sizes.max() < 1.25
    assert is_small.sum() < 5 and (sizes[is_small] > 100 * values[is_small]).all()
    assert (inside - torch.diag_embed(sizes)).abs().max() < 1e-3


def test_a_matrix_of_zeros_has_no_direction():
    assert orthogonal(torch.zeros(1, 4, 8)).abs().max() == 0


def trained(make, steps: int, seed: int = 0) -> tuple:
    """-> (model, optimizer) after ``steps`` steps on random images. ``make``: groups -> optimizer"""
    torch.manual_seed(0)
    model = tiny_vit(3)
    optimizer = make(param_groups(model, DECAY, 0.8, muon=True))
    train(model, optimizer, steps, seed)
    return model, optimizer


def train(model, optimizer, steps: int, seed: int) -> list[float]:
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * group["lr_scale"]
        loss = model(
            pixel_values=torch.randn(8, 3, 16, 16, generator=generator),
            labels=torch.randint(0, 3, (8,), generator=generator),
        ).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def muon(groups):
    return Muon(groups, lr=RATE)


def test_the_second_step_is_that_of_the_papers():
    """W (1 - rate x decay) - rate x 0.2 sqrt(longer side) x the momentum's directions"""
    model, optimizer = trained(muon, 1)
    before = copy.deepcopy(model)
    first = {name: param.grad for name, param in model.named_parameters()}
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    train(model, optimizer, 1, seed=1)
    changed = 0
    for (name, param), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if param.ndim < 2 or "layer" not in name:
            continue
        momentum = (1 - MOMENTUM) * (MOMENTUM * first[name] + param.grad)
        ahead = (1 - MOMENTUM) * param.grad + MOMENTUM * momentum
        rate, size = RATE * scales[id(param)], 0.2 * max(param.shape) ** 0.5
        expected = old * (1 - rate * DECAY) - rate * size * orthogonal(ahead[None])[0]
        torch.testing.assert_close(param, expected, rtol=0, atol=1e-6)
        changed += 1
    assert changed == 4 * 6  # layers, matrices of each


def test_all_else_is_trained_by_adamw():
    model, optimizer = trained(muon, 0)
    others = [group for group in optimizer.param_groups if not group.get("muon")]
    params = [param for group in others for param in group["params"]]
    names = {id(param): next(iter(with_first_names({name: 0}))) for name, param in model.named_parameters()}
    weights = {names[id(param)] for param in params if param.ndim > 1}
    assert weights == {
        "classifier.weight",
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight",
    }
    copies = [param.detach().clone().requires_grad_() for param in params]
    of_each = [group for group in others for _ in group["params"]]
    adamw = torch.optim.AdamW(
        [
            dict(params=[param], weight_decay=group["weight_decay"], lr=RATE * group["lr_scale"])
            for param, group in zip(copies, of_each, strict=True)
        ]
    )
    for step in range(3):
        train(model, optimizer, 1, seed=step)
        for other, param in zip(copies, params, strict=True):
            other.grad = param.grad.clone()
        adamw.step()
    for other, param in zip(copies, params, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


def test_state_that_is_loaded_goes_on_alike_and_is_half_of_adamws():
    straight, optimizer = trained(muon, 3)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = copy.deepcopy(straight)
    other = muon(param_groups(resumed, DECAY, 0.8, muon=True))
    other.load_state_dict(state)
    assert train(straight, optimizer, 3, seed=4) == train(resumed, other, 3, seed=4)
    matrices = {param for group in other.param_groups if group.get("muon") for param in group["params"]}
    for param, values in other.state.items():
        assert values.keys() - {"step"} == ({"momentum"} if param in matrices else {"exp_avg", "exp_avg_sq"})


def test_a_step_whose_gradients_overflowed_is_skipped():
    model, optimizer = trained(muon, 1)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(pixel_values=torch.full((1, 3, 16, 16), torch.inf)).logits.sum()).backward()
    scaler.step(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fits_faster_than_adamw_at_the_same_rate():
    torch.manual_seed(0)
    pixels, labels = torch.randn(48, 3, 16, 16), torch.randint(0, 3, (48,))
    last = {}
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        model = tiny_vit(3)
        settings = Settings(plugin="torch_ddp", optimizer=name, weight_decay=0.05, learning_rate=3e-3)
        optimizer = build_optimizer(model, settings)
        for _ in range(25):
            loss = model(pixel_values=pixels, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        last[name] = loss.item()
    assert last["muon"] < last["adamw"] - 0.02 < 1


@pytest.mark.parametrize("plugin", ["low_level_zero", "gemini", "torch_fsdp", "hybrid_parallel"])
def test_is_refused_where_a_rank_may_have_a_part_of_a_matrix(plugin):
    machine = Machine(1, has_bf16=True)
    args = finetune_parser().parse(f"--optimizer muon --plugin {plugin}".split())
    problems = finetune_problems(resolve_finetune(args, machine), machine)
    (problem,) = [problem for problem in problems if problem.startswith("--optimizer")]
    assert problem.startswith(f"--optimizer muon: needs whole matrices, and {plugin} may cut them; use torch")
