"""Patches for the speed of Colossal-AI optimizers."""

import torch


def silence_colossalai_logger() -> None:
    """Call after colossalai is imported: its logger sets its own level when it is made.

    Its calls also walk the whole Python stack before they look at the level, which costs Gemini
    milliseconds a step.
    """
    from colossalai.logging import DistributedLogger

    for level in ("debug", "info", "warning"):
        setattr(DistributedLogger, level, lambda self, *args, **kwargs: None)


def avoid_device_syncs(optimizer, clips: bool) -> None:
    """Take out waits of the CPU for the GPU. Patches this optimizer (what Booster returned); others are
    left as they are.

    Each wait reads something from the device for every parameter in every step (about 150 times for ViT-B),
    and the
    GPU idles meanwhile.

    Args:
        clips: whether gradients are clipped; the gradient norm is only needed then.
    """
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    if isinstance(optimizer, LowLevelZeroOptimizer):
        if not clips:
            # zero/low_level/low_level_optim.py, step: computes the norm in any case
            optimizer._compute_grad_norm = lambda *args, **kwargs: 0.0
        mixin = optimizer.mixed_precision_mixin
        if hasattr(mixin, "check_local_overflow"):
            # zero/low_level/low_level_optim.py, check_local_overflow: one wait per gradient
            def zero_gradients():
                for store in mixin.pg_to_grad_store.values():
                    for group in range(mixin.num_working_param_groups):
                        yield from (
                            grad for grad in store.get_working_grads_by_group_id(group) if grad is not None
                        )

            mixin.check_local_overflow = lambda: not all_finite(list(zero_gradients()))
        fuse_zero_kernels(optimizer)
        return
    mixin = getattr(optimizer, "mixed_precision", None)
    if hasattr(mixin, "check_local_overflow"):
        # amp/naive_amp/mixed_precision_optimizer.py, check_local_overflow: one wait per gradient
        mixin.check_local_overflow = lambda: (
            not all_finite([p.grad for p in mixin.params if p.grad is not None])
        )


def fuse_zero_kernels(optimizer) -> None:
    """Let a LowLevelZeroOptimizer scale gradients and spread new weights by a few kernels, not by three for
    each parameter.
    """
    import colossalai.zero.low_level.low_level_optim as library

    def unscale_and_clip(gradients: list[torch.Tensor], norm: float) -> None:
        # zero/low_level/low_level_optim.py, _unscale_and_clip_grads
        scale = (
            optimizer.mixed_precision_mixin.get_grad_div_scale()
            if optimizer.mixed_precision_mixin is not None
            else 1.0
        )
        limit = optimizer._clip_grad_norm
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
            # zero/low_level/bookkeeping/tensor_bucket.py, all_gather
            whole = [self._write_back_pairs[part].data for part in self._bucket]
            if fp8_communication or not all(weight.is_contiguous() for weight in whole):
                return super().all_gather(group, fp8_communication)
            mine = self.flatten()
            world = library.get_nd_world_size(group)
            gathered = mine.new_empty(world * mine.numel())
            library.all_gather_into_flat_tensor_nd(gathered, mine, group=group)
            targets, sources, offset = [], [], 0
            for part, weight in zip(self._bucket, whole):
                # each process has an equal part of the weight; the last ones may end in padding
                pieces = weight.view(-1).split(part.numel())
                targets += pieces
                sources += [
                    gathered[rank * mine.numel() + offset :][: piece.numel()]
                    for rank, piece in enumerate(pieces)
                ]
                offset += part.numel()
            torch._foreach_copy_(targets, sources)
            self.empty()

    return TensorBucket


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no element is infinite or NaN: one kernel over all tensors, one wait.

    (torch's GradScaler uses the same.)
    """
    if not tensors:
        return True
    found = torch.zeros(1, device=tensors[0].device)
    unscaled = torch.ones(1, device=tensors[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, unscaled)
    return not found.item()
