"""Patches that let the tensor-parallel layers of colossalai.legacy run on a CPU, in bf16, and on today's
torch.

Two more faults of it are avoided, not patched: `ParallelContext.init_global_dist` puts IPv6 brackets around
any host (`init_mesh` registers the process group that exists), and its Engine clips to zero (not used).
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import torch

from vit.patches import patch


@functools.cache
def patch_legacy_layers() -> None:
    """Import colossalai.legacy and apply the patches of this file, once in a process."""
    with warnings.catch_warnings(record=True):  # some 60 on torch.cuda.amp.custom_fwd, one of which insists
        import colossalai.legacy.nn.layer.parallel_3d  # noqa: F401
    seed_manager()
    state_dict()
    classifier3d_grad()
    follow_autocast()


@patch
def seed_manager() -> None:
    """Keep one random state per process.

    Why: the layers switch torch.cuda's random state, which no CPU has. No activation is held twice here.
    Library: legacy/context/random/seed_manager.py, set_mode. Can go when it asks get_accelerator() instead.
    """
    from colossalai.legacy.context.random.seed_manager import SeedManager

    SeedManager.set_mode = lambda self, mode: None


@patch
def state_dict() -> None:
    """Let ``state_dict()`` return the slices of this rank; `gather_state_dict` does the gathering.

    Why: it gathers, with errors (LayerNorm3D transposes a vector).
    Library: legacy/nn/layer/base_layer.py; use_local_state_dict is its own switch. Can go when that is the
    default.
    """
    from colossalai.legacy.nn.layer.base_layer import ParallelLayer

    ParallelLayer.global_state_dict = False


@patch
def classifier3d_grad() -> None:
    """Accept a missing gradient in the hook of 3D layers.

    Why: Classifier3D's weight gets no gradient on some ranks, and torch gives None to the hook.
    Library: legacy/nn/layer/parallel_3d/_utils.py, _async_grad_hook. Can go when the hook tests for it.
    """
    from colossalai.legacy.nn.layer.parallel_3d import _utils as utils_3d

    hook = utils_3d._async_grad_hook
    utils_3d._async_grad_hook = lambda grad, param_id: None if grad is None else hook(grad, param_id)


@patch
def follow_autocast() -> None:
    """Cast the inputs of the layers' autograd functions to the type of autocast.

    Why: custom_fwd(cast_inputs=torch.float16) makes fp16 of bf16, and does nothing on a CPU.
    Library: legacy/nn/layer/parallel_*/_operation.py. Can go when the decorators name no type.
    """
    from colossalai.legacy.nn.layer.parallel_2d import _operation as operation_2d
    from colossalai.legacy.nn.layer.parallel_2p5d import _operation as operation_2p5d
    from colossalai.legacy.nn.layer.parallel_3d import _operation as operation_3d

    for module in (operation_2d, operation_2p5d, operation_3d):
        for function in vars(module).values():
            if inspect.isclass(function) and issubclass(function, torch.autograd.Function):
                _replace_casts(function)


def _replace_casts(function: Any) -> None:
    forward, backward = inspect.unwrap(function.forward), inspect.unwrap(function.backward)
    keeps_type = any(word in function.__name__ for word in ("Gather", "Norm", "norm", "Reduce"))
    device = "cuda" if torch.cuda.is_available() else "cpu"

    @functools.wraps(forward)
    def cast_forward(ctx, *args):
        if torch.is_autocast_enabled(device) and not keeps_type:
            dtype = torch.get_autocast_dtype(device)
            args = [a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        with torch.autocast(device, enabled=False):
            return forward(ctx, *args)

    @functools.wraps(backward)
    def plain_backward(ctx, *grads):
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    function.forward, function.backward = staticmethod(cast_forward), staticmethod(plain_backward)
