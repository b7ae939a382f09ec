"""Patches for the speed of Colossal-AI's optimizers. They change results by rounding at most."""

from __future__ import annotations

from types import MethodType
from typing import Any
from weakref import proxy

import torch
import torch.distributed as dist
from torch import nn

from vit.distributed import device
from vit.optim import buckets
from vit.parallel.reduction import GradientReduction
from vit.patches import patch


def avoid_device_syncs(optimizer) -> None:
    """Apply the patches of this file that fit ``optimizer``, which Booster returned; other optimizers stay
    as they are.
    """
    from colossalai.booster.plugin import hybrid_parallel_plugin
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    single_overflow_check(optimizer)
    if isinstance(optimizer, LowLevelZeroOptimizer):
        fused_zero_updates(optimizer)
        reduce_during_backward(optimizer)
        share_during_update(optimizer)
    elif isinstance(optimizer, hybrid_parallel_plugin.HybridParallelAMPOptimizer):
        fused_mixed_updates(optimizer)
    elif isinstance(optimizer, hybrid_parallel_plugin.HybridParallelNaiveOptimizer):
        clip_on_device(optimizer)


@patch
def single_overflow_check(optimizer) -> None:
    """Look for infinite gradients with one kernel over all of them, in fp16.

    Why: one device-to-host synchronisation per gradient, about 150 in a step of ViT-B.
    Library: zero/low_level/low_level_optim.py and amp/naive_amp/mixed_precision_optimizer.py,
    check_local_overflow, colossalai 0.5.0. Can go when they sum on the device.
    """
    zero: Any = getattr(optimizer, "mixed_precision_mixin", None)
    naive: Any = getattr(optimizer, "mixed_precision", None)
    if hasattr(zero, "check_local_overflow"):

        def gradients() -> list[torch.Tensor]:
            groups = range(zero.num_working_param_groups)
            stores = zero.pg_to_grad_store.values()
            found = [
                grad for store in stores for g in groups for grad in store.get_working_grads_by_group_id(g)
            ]
            return [grad for grad in found if grad is not None]

        zero.check_local_overflow = lambda: not all_finite(gradients())
    elif hasattr(naive, "check_local_overflow"):
        naive.check_local_overflow = lambda: (
            not all_finite([p.grad for p in naive.params if p.grad is not None])
        )


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no element is infinite or NaN: one kernel, one synchronisation. (torch's GradScaler uses the
    same.)
    """
    if not tensors:
        return True
    found = torch.zeros(1, device=tensors[0].device)
    unscaled = torch.ones(1, device=tensors[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, unscaled)
    return not found.item()


@patch
def fused_zero_updates(optimizer) -> None:
    """Let a `LowLevelZeroOptimizer` step by a few kernels for all weights, without waiting for the device.

    Why: five kernels per parameter otherwise, and a norm that is computed and read back also where nothing is
    clipped; neither can be recorded as a CUDA graph. On one rank gradients were copied into buckets, too.
    Library: zero/low_level/low_level_optim.py, step, _add_to_bucket and _compute_grad_norm, colossalai 0.5.0.
    Can go when it uses torch._foreach functions and keeps the norm on the device.
    """
    (group,) = optimizer.pg_to_param_list
    optimizer.step = MethodType(_zero_step, optimizer)
    optimizer.update = MethodType(_update_then_share, optimizer)
    if dist.get_world_size(group) == 1:
        optimizer._add_to_bucket = MethodType(_keep_gradient, optimizer)


def _keep_gradient(self, param: torch.Tensor, group_id: int) -> None:
    """The gradient of the only rank is the mean already."""
    gradient, param.grad = param.grad.detach().flatten(), None
    self._add_grad(gradient, 1, group_id, id(param))


@patch
def reduce_during_backward(optimizer) -> None:
    """Let the ranks of ZeRO 1 average gradients during the backward pass, each rank only the part it updates.

    Why: the library sends whole gradients to all ranks, after the backward pass; its own overlapping closes a
    bucket at every change between weights and biases.
    Library: zero/low_level/low_level_optim.py, _attach_reduction_hook and _run_reduction, colossalai 0.5.0.
    Can go when a bucket holds parameters of several groups.
    """
    (group,) = optimizer.pg_to_param_list
    if optimizer._partition_grads or not is_data_parallel(optimizer) or dist.get_world_size(group) == 1:
        return
    reduction = GradientReduction(optimizer, group)
    optimizer._reduce_grad = lambda partition_grad: reduction.finish()
    # the hooks must not keep the optimizer alive: it removes them when it is freed
    weak_optimizer, weak_reduction = proxy(optimizer), proxy(reduction)

    def reduce(param: nn.Parameter) -> None:
        if weak_optimizer.require_grad_sync:
            weak_reduction.add(param)

    optimizer.grad_handles += [param.register_post_accumulate_grad_hook(reduce) for param in reduction.groups]


def _zero_step(self, closure=None) -> None:
    """This rank's update of its part of each weight; then all ranks share the new weights."""
    mixin = self.mixed_precision_mixin
    if not self.require_grad_sync:
        return
    if mixin is not None and mixin.should_skip_step():
        return self.zero_grad()
    masters, gradients = [], []
    for group_id, weights in self._working_param_groups.items():
        for weight, master in zip(weights, self._master_param_groups_of_current_rank[group_id], strict=True):
            store = self.pid_to_grad_store[id(weight)]
            parts = store.get_partitioned_gradients_by_param_id(group_id, id(weight))
            if parts:
                masters.append(master)
                gradients.append(parts[0 if self._partition_grads else store.local_rank])
    gradients = set_gradients(masters, gradients)
    scale = mixin.get_grad_div_scale() if mixin is not None else 1.0
    norm = None
    if self._clip_grad_norm > 0 and is_data_parallel(self):
        (group,) = self.pg_to_param_list
        norm = norm_of(gradients, group)
    elif self._clip_grad_norm > 0:  # the library knows which weights several ranks hold
        groups, stores = range(self.num_param_groups), self.pg_to_grad_store.values()
        norms = [
            self._compute_grad_norm(store.torch_pg, store.get_working_grads_by_group_id(i))
            for i in groups
            for store in stores
        ]
        norm = torch.tensor(norms, device=device()).norm()
    unscale_and_clip(gradients, scale, norm, self._clip_grad_norm)
    self.update(masters)


def _update_then_share(self, masters: list[torch.Tensor]) -> None:
    """The inner optimizer's step, after which all ranks get the new weights. It uses up the gradients."""
    self.optim.step()
    for master in masters:
        master.grad = None
    (group,) = self.pg_to_param_list
    for bucket in buckets(masters, elements=self._reduce_bucket_size):
        if dist.get_world_size(group) == 1:
            weights = [self.master_to_working_param[id(master)].data for master in bucket]
            torch._foreach_copy_([weight.view(-1) for weight in weights], bucket)
        else:
            _gather_weights(self, bucket, *_rounded(self, bucket))


@patch
def share_during_update(optimizer) -> None:
    """Let the ranks of ZeRO send each other the new weights of a bucket while they update those of the next.

    Why: the messages are half a millisecond of a step of ViT-B on two GPUs, in which these do nothing else.
    Library: zero/low_level/low_level_optim.py, step, colossalai 0.5.0. Can go when it does the same.
    """
    (group,) = optimizer.pg_to_param_list
    if dist.get_world_size(group) == 1 or not hasattr(optimizer, "update"):  # without `fused_zero_updates`
        return
    optimizer.sharing_stream = torch.cuda.Stream() if torch.cuda.is_available() else None
    optimizer.update = MethodType(_update_and_share, optimizer)


def _update_and_share(self, masters: list[torch.Tensor]) -> None:
    """As `_update_then_share`, a bucket at a time: the inner optimizer leaves out what has no gradient."""
    gradients = iter([master.grad for master in masters])
    for master in masters:
        master.grad = None
    stream, in_use = self.sharing_stream, []
    for bucket in buckets(masters, elements=self._reduce_bucket_size):
        for master in bucket:
            master.grad = next(gradients)
        self.optim.step()
        for master in bucket:
            master.grad = None
        messages = _rounded(self, bucket)
        if stream:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _gather_weights(self, bucket, *messages)
        in_use.append(messages)  # until the stream has used them
    if stream:
        torch.cuda.current_stream().wait_stream(stream)


def _rounded(optimizer, masters: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> this rank's part of some weights, in their precision, and memory for all ranks' parts"""
    (group,) = optimizer.pg_to_param_list
    sizes = [master.numel() for master in masters]
    weight = optimizer.master_to_working_param[id(masters[0])]
    mine = torch.empty(sum(sizes), dtype=weight.dtype, device=weight.device)
    torch._foreach_copy_(list(mine.split(sizes)), masters)
    return mine, mine.new_empty(dist.get_world_size(group) * mine.numel())


def _gather_weights(optimizer, masters, mine: torch.Tensor, gathered: torch.Tensor) -> None:
    """Give every rank the new weights: each rank has the masters of an equal part of every weight."""
    (group,) = optimizer.pg_to_param_list
    world, sizes = dist.get_world_size(group), [master.numel() for master in masters]
    dist.all_gather_into_tensor(gathered, mine, group=group)
    targets, sources = [], []
    parts = [rank_part.split(sizes) for rank_part in gathered.view(world, -1)]
    for i, master in enumerate(masters):
        weight = optimizer.master_to_working_param[id(master)].data
        # the last ranks' parts may end in padding
        for rank, piece in enumerate(weight.view(-1).split(sizes[i])):
            targets.append(piece)
            sources.append(parts[rank][i][: piece.numel()])
    torch._foreach_copy_(targets, sources)


@patch
def fused_mixed_updates(optimizer) -> None:
    """Let hybrid_parallel's 16-bit optimizer without ZeRO step by a few kernels over all parameters.

    Why: three kernels per parameter otherwise, and with clipping a norm that is read back.
    Library: amp/naive_amp/mixed_precision_optimizer.py, step, colossalai 0.5.0. Can go when it uses
    torch._foreach functions and keeps the norm on the device.
    """
    optimizer.step = MethodType(_mixed_step, optimizer)


def _mixed_step(self, *args, **kwargs) -> None:
    if self.mixed_precision.should_skip_step():
        return self.zero_grad()
    masters, weights, gradients = [], [], []
    for group in self.optim.param_groups:
        for master in group["params"]:
            weight = self.master_to_working_map[master]
            if weight.grad is not None:
                masters.append(master)
                weights.append(weight)
                gradients.append(weight.grad)
                weight.grad = None
    gradients = set_gradients(masters, gradients)
    norm = None
    if self.max_norm > 0 and is_data_parallel(self):
        norm = norm_of(gradients)
    elif self.max_norm > 0:
        norm = self._compute_grad_norm(list(zip(weights, gradients)))
    unscale_and_clip(gradients, self.mixed_precision.get_grad_div_scale(), norm, self.max_norm)
    self.optim.step()
    torch._foreach_copy_([weight.data for weight in weights], masters)


@patch
def clip_on_device(optimizer) -> None:
    """Let hybrid_parallel's fp32 optimizer clip without waiting for the device.

    Why: it reads back the gradient norm, which cannot be recorded as a CUDA graph.
    Library: booster/plugin/hybrid_parallel_plugin.py, HybridParallelNaiveOptimizer, colossalai 0.5.0. Can go
    when it keeps the norm on the device.
    """
    if is_data_parallel(optimizer):
        optimizer._compute_grad_norm = lambda pairs: norm_of([gradient for _, gradient in pairs])
        optimizer._clip_grad_norm = lambda norm: unscale_and_clip(
            [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None],
            1.0,
            norm,
            optimizer.max_norm,
        )


def is_data_parallel(optimizer) -> bool:
    """Whether every rank holds the whole model: neither tensor nor pipeline parallelism."""
    groups = (getattr(optimizer, "tp_pg", None), getattr(optimizer, "pp_pg", None))
    return all(group is None or dist.get_world_size(group) == 1 for group in groups)


def set_gradients(masters: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Give each fp32 master weight its gradient, in fp32 and on its device. -> these"""
    pairs = zip(masters, gradients, strict=True)
    if any((grad.dtype, grad.device) != (master.dtype, master.device) for master, grad in pairs):
        rounded, gradients = gradients, [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(gradients, rounded)
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    return gradients


def norm_of(gradients: list[torch.Tensor], group=None) -> torch.Tensor:
    """The norm of all gradients, a scalar on the device; with ``group``, of the gradients of its ranks."""
    norms = torch.stack(torch._foreach_norm(gradients)).to(device())
    square = norms.double().square().sum()
    if group is not None:
        dist.all_reduce(square, group=group)
    return square.sqrt()


def unscale_and_clip(
    gradients: list[torch.Tensor], scale: float, norm: torch.Tensor | float | None, limit: float
) -> None:
    """Divide by the loss ``scale``, and clip to ``limit``.

    Args:
        norm: of the gradients as they are, with the scale; None: no clipping.
    """
    if norm is None:
        if scale != 1:
            torch._foreach_mul_(gradients, 1 / scale)
        return
    excess = torch.as_tensor((norm / scale + 1e-6) / limit).clamp(min=1.0) * scale
    torch._foreach_mul_(gradients, excess.reciprocal().to(gradients[0].device, gradients[0].dtype))
