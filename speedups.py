"""Waits that Colossal-AI's optimizers put between CPU and GPU, taken out without changing a result.

Each reads something from the device for every parameter in every step (about 150 waits for ViT-B), and the GPU
idles meanwhile. To see whether one can go: delete it and compare `bash run_benchmark.sh` rows.
"""

import torch


def remove_waits(optimizer, clips: bool) -> None:
    """Patch this optimizer (what Booster returned); others are left as they are.

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
                        yield from (grad for grad in store.get_working_grads_by_group_id(group) if grad is not None)

            mixin.check_local_overflow = lambda: not all_finite(list(zero_gradients()))
        return
    mixin = getattr(optimizer, "mixed_precision", None)
    if hasattr(mixin, "check_local_overflow"):
        # amp/naive_amp/mixed_precision_optimizer.py, check_local_overflow: one wait per gradient
        mixin.check_local_overflow = lambda: not all_finite([p.grad for p in mixin.params if p.grad is not None])


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no element is infinite or NaN: one kernel over all tensors, one wait. (torch's GradScaler uses the same.)"""
    if not tensors:
        return True
    found = torch.zeros(1, device=tensors[0].device)
    unscaled = torch.ones(1, device=tensors[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, unscaled)
    return not found.item()
