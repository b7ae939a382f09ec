"""Patches for the speed of Colossal-AI's optimizers. They change results by rounding at most."""

from __future__ import annotations

from typing import Any

import torch

from vit.patches import patch


def avoid_device_syncs(optimizer, clips: bool) -> None:
    """Apply the patches of this file that fit ``optimizer``, which Booster returned; other optimizers stay
    as they are.

    Args:
        clips: whether gradients are clipped.
    """
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    single_overflow_check(optimizer)
    if isinstance(optimizer, LowLevelZeroOptimizer):
        if not clips:
            skip_unused_grad_norm(optimizer)
        fused_zero_updates(optimizer)


@patch
def silence_colossalai_logger() -> None:
    """Keep Colossal-AI's logger quiet, and fast. Call after colossalai is imported.

    Why: every call walks the Python stack before it looks at the level, milliseconds per step with Gemini.
    Library: logging/logger.py, DistributedLogger, colossalai 0.5.0. Can go when it asks for its level first.
    """
    from colossalai.logging import DistributedLogger

    for level in ("debug", "info", "warning"):
        setattr(DistributedLogger, level, lambda self, *args, **kwargs: None)


@patch
def skip_unused_grad_norm(optimizer) -> None:
    """Do not compute the gradient norm of a `LowLevelZeroOptimizer` that does not clip.

    Why: it waits for the device in every step.
    Library: zero/low_level/low_level_optim.py, step, colossalai 0.5.0. Can go when it asks for max_norm
    first.
    """
    optimizer._compute_grad_norm = lambda *args, **kwargs: 0.0


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
    """Let a `LowLevelZeroOptimizer` scale gradients and distribute new weights by a few kernels.

    Why: three kernels per parameter otherwise.
    Library: zero/low_level/low_level_optim.py, _unscale_and_clip_grads, and zero/low_level/bookkeeping/
    tensor_bucket.py, all_gather, colossalai 0.5.0. Can go when they use torch._foreach functions.
    """
    import colossalai.zero.low_level.low_level_optim as library

    def unscale_and_clip(gradients: list[torch.Tensor], norm: float) -> None:
        mixin, limit = optimizer.mixed_precision_mixin, optimizer._clip_grad_norm
        scale = mixin.get_grad_div_scale() if mixin is not None else 1.0
        if limit > 0:
            scale *= max(1.0, (norm / scale + 1e-6) / limit)
        if scale != 1 and gradients:
            torch._foreach_mul_([gradient.data for gradient in gradients], 1 / scale)

    optimizer._unscale_and_clip_grads = unscale_and_clip
    if library.TensorBucket.__module__ != __name__:
        library.TensorBucket = _fused_bucket(library)  # each step makes new ones by this name


def _fused_bucket(library):
    class TensorBucket(library.TensorBucket):
        def all_gather(self, group=None, fp8_communication: bool = False) -> None:
            weights = [self._write_back_pairs[part].data for part in self._bucket]
            if fp8_communication or not all(weight.is_contiguous() for weight in weights):
                return super().all_gather(group, fp8_communication)
            mine = self.flatten()
            size = mine.numel()
            gathered = mine.new_empty(library.get_nd_world_size(group) * size)
            library.all_gather_into_flat_tensor_nd(gathered, mine, group=group)
            targets, sources, offset = [], [], 0
            for part, weight in zip(self._bucket, weights, strict=True):
                # each rank has an equal part of the weight; the last ones may end in padding
                pieces = weight.view(-1).split(part.numel())
                targets += pieces
                for rank, piece in enumerate(pieces):
                    sources.append(gathered[rank * size + offset :][: piece.numel()])
                offset += part.numel()
            torch._foreach_copy_(targets, sources)
            self.empty()

    return TensorBucket
