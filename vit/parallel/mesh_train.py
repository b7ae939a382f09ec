"""Training over a mesh of processes: gradient reduction and norm, the optimizer. The model is in mesh.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vit.distributed import all_reduce_sum
from vit.modules import with_first_names
from vit.optim import param_groups
from vit.parallel.boosted import BoostedModel
from vit.parallel.mesh import MeshViT, gather_state_dict, init_mesh, load_mesh_vit, process_group, sharding_of
from vit.parallel.plain import PlainBooster, PlainModel, PlainOptimizer
from vit.parallel.plugins import MESH_PLUGINS


def boost_mesh(model: nn.Module, settings) -> BoostedModel:
    """Shard a HuggingFace ViT over the mesh. -> `BoostedModel`. Collective.

    Every rank draws its own dropout masks, because no activation is held twice. The ranks that hold slices of
    an image drop its paths together.
    """
    init_mesh(settings.plugin, settings.tp_size, settings.tp_depth, settings.seed)
    mesh_model = load_mesh_vit(model.config, with_first_names(model.state_dict()), settings.drop_path)
    groups = param_groups(mesh_model, settings.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    return BoostedModel(
        MeshBooster(),
        PlainModel(mesh_model, settings.precision, parallel=False),
        MeshOptimizer(adamw, settings.precision == "fp16", mesh_model),
        settings.layout,
        MESH_PLUGINS[settings.plugin],
        clip_norm=settings.max_norm,
    )


class MeshOptimizer(PlainOptimizer):
    """A torch optimizer for the shards of a 2D, 2.5D or 3D tensor-parallel model."""

    def __init__(self, optim: torch.optim.Optimizer, fp16: bool, model: MeshViT):
        super().__init__(optim, fp16)
        self.model, self.complete = model, False

    def complete_gradients(self) -> None:
        """Reduce and unscale the gradients, once per step, after the last micro-step. Collective."""
        if self.complete:
            return
        sync_gradients(self.model)
        if self.scaler.is_enabled():
            # An overflow in one shard must skip the step on all ranks: 0 x norm is 0 if finite, otherwise
            # NaN.
            grads = [param.grad for param in self.model.parameters() if param.requires_grad]
            grads[0].add_(all_reduce_sum(0 * torch.stack(torch._foreach_norm(grads, torch.inf)).sum()))
            self.scaler.unscale_(self.optim)
        self.complete = True

    def clip_grad_by_norm(self, max_norm: float) -> None:
        self.complete_gradients()
        clip_grad_norm_(self.model, max_norm)

    def step(self) -> None:
        self.complete_gradients()
        super().step()
        self.complete = False


class MeshBooster(PlainBooster):
    """Booster's methods for a `MeshViT`."""

    def save_model(self, model: PlainModel, path: str, shard: bool = False) -> None:
        mesh_model: Any = model.unwrap()
        state = gather_state_dict(mesh_model)
        if dist.get_rank() == 0:
            torch.save(state, path)


def _sum_over(mode: str, name: str) -> str | None:
    """Process group over which colossalai.legacy leaves a gradient to be summed; None: it is complete."""
    if mode == "2.5d":
        # Row 0 has the complete gradients of biases and LayerNorms, the other rows have zero. Each layer of
        # the depth has the gradients of its own images, which colossalai.legacy does not sum.
        return "PARALLEL_2P5D_XZ" if sharding_of(mode, name) == ("c",) else "PARALLEL_2P5D_DEP"
    if mode == "3d" and name == "classifier.weight":
        return "PARALLEL_3D_INPUT"  # one process has the gradient, the others have none
    return None


@torch.no_grad()
def sync_gradients(model: MeshViT) -> None:
    """Complete the gradients: shards of the full ones, averaged over data-parallel ranks. Collective.

    Call once per step, after the last backward pass, because sums must not be summed twice. Before the call,
    gradients are partial.
    """
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for param in params.values():
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    buckets = {}
    for name, param in params.items():
        buckets.setdefault(_sum_over(model.mesh.mode, name), []).append(param.grad)
    for group_name, grads in buckets.items():
        if group_name:
            _all_reduce(grads, process_group(group_name))
    _all_reduce([param.grad for param in params.values()], process_group("DATA"), mean=True)


def _all_reduce(grads: list[torch.Tensor], group, mean: bool = False) -> None:
    """Sum (or average) gradients over a process group, in place, by one all-reduce."""
    if group.size() == 1:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=group)
    if mean:
        flat /= group.size()
    for grad, piece in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(piece.view_as(grad))


@torch.no_grad()
def grad_norm(model: MeshViT) -> torch.Tensor:
    """2-norm of the full model's gradient, each parameter counted once: a scalar, the same on every process.

    Call after `sync_gradients`. If it is infinite or NaN on one process, it is so on all, and all skip the
    step.
    """
    at, mode = model.mesh.coordinates(process_group("TENSOR").rank()), model.mesh.mode
    counted = []
    for name, param in model.named_parameters():
        cut = "".join(sharding_of(mode, name))
        # only the first of the copies of a parameter counts
        if param.grad is not None and all(at[side] == 0 for side in at if side not in cut):
            counted.append(param.grad)
    square = torch.zeros((), device=next(model.parameters()).device)
    if counted:  # in 2.5D only the first layer of the depth counts parameters
        square += torch.stack(torch._foreach_norm(counted)).square().sum()
    dist.all_reduce(square, group=process_group("TENSOR"))
    return square.sqrt()


@torch.no_grad()
def clip_grad_norm_(model: MeshViT, max_norm: float) -> torch.Tensor:
    """Scale the gradients to a norm of at most ``max_norm``, as torch.nn.utils.clip_grad_norm_ does.

    Returns:
        The norm before, a scalar.
    """
    norm = grad_norm(model)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([param.grad for param in model.parameters() if param.grad is not None], factor)
    return norm
