"""Patches that let the tensor-parallel layers of colossalai.legacy run today."""

import functools
import inspect
import warnings

import torch


@functools.cache
def patch_legacy_layers() -> None:
    """Import `colossalai.legacy` and mend what stops its layers on CPU, in bf16, or on today's torch. Once
    a process.

    To see whether a mend is still needed: delete it and run ``pytest tests/test_tensor_parallel.py``.
    Two more of the library's faults are avoided, not mended: `ParallelContext.init_global_dist` puts IPv6
    brackets
    around any host (`start` registers the process group that exists), and its Engine clips to zero (not
    used).
    """
    with warnings.catch_warnings(
        record=True
    ):  # some 60 on torch.cuda.amp.custom_fwd, and one that insists ("always")
        from colossalai.legacy.context.random.seed_manager import SeedManager
        from colossalai.legacy.nn.layer.base_layer import ParallelLayer
        from colossalai.legacy.nn.layer.parallel_2d import _operation as operation_2d
        from colossalai.legacy.nn.layer.parallel_2p5d import _operation as operation_2p5d
        from colossalai.legacy.nn.layer.parallel_3d import _operation as operation_3d
        from colossalai.legacy.nn.layer.parallel_3d import _utils as utils_3d

    # context/random/seed_manager.py, set_mode: switches torch.cuda's random state, which no CPU has. No
    # activation is
    # held twice here, so one random state per process is enough. Can go when it asks get_accelerator()
    # instead.
    SeedManager.set_mode = lambda self, mode: None

    # nn/layer/base_layer.py: state_dict() gathers, with errors (LayerNorm3D transposes a vector). False
    # is the
    # library's own switch (use_local_state_dict) for the slices themselves; `gather` does the gathering here.
    ParallelLayer.global_state_dict = False

    # nn/layer/parallel_3d/_utils.py, _async_grad_hook: Classifier3D's weight gets no gradient where j !=
    # k, and torch
    # hands None to the hook. Can go when the hook tests for it.
    library_hook = utils_3d._async_grad_hook
    utils_3d._async_grad_hook = lambda grad, param_id: None if grad is None else library_hook(grad, param_id)

    # nn/layer/parallel_*/_operation.py: torch.cuda.amp's custom_fwd(cast_inputs=torch.float16) makes fp16 of
    # autocast's bf16, and does nothing on a CPU. Can go when the decorators name no type.
    for module in (operation_2d, operation_2p5d, operation_3d):
        for function in vars(module).values():
            if inspect.isclass(function) and issubclass(function, torch.autograd.Function):
                _follow_autocast(function)


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _follow_autocast(function: type[torch.autograd.Function]) -> None:
    """Replace the decorators of an autograd function: inputs are cast to autocast's type, whatever it is."""
    forward, backward = inspect.unwrap(function.forward), inspect.unwrap(function.backward)
    exact = any(
        word in function.__name__ for word in ("Gather", "Norm", "norm", "Reduce")
    )  # keep the input's type

    @functools.wraps(forward)
    def cast_forward(ctx, *args):
        kind = _device_type()
        if torch.is_autocast_enabled(kind) and not exact:
            dtype = torch.get_autocast_dtype(kind)
            args = [a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        with torch.autocast(kind, enabled=False):
            return forward(ctx, *args)

    @functools.wraps(backward)
    def plain_backward(ctx, *grads):
        with torch.autocast(_device_type(), enabled=False):
            return backward(ctx, *grads)

    function.forward, function.backward = staticmethod(cast_forward), staticmethod(plain_backward)
