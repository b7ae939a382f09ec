"""Patches of libraries. Each is one function that says why, which line of the library, and when it can go.

VIT_DISABLE_PATCHES=name,name switches patches off, to see whether they are still needed.
docs/performance.md lists them with what they gain.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

PATCHES = (
    # Colossal-AI without a GPU
    "cpu_accelerator",
    "cpu_pipeline",
    "cpu_zero",
    "cpu_gemini",
    "cpu_fp16",
    # start-up
    "lean_imports",
    # faults of Colossal-AI's optimizers
    "accumulate_anew",
    # speed of Colossal-AI's optimizers
    "silence_colossalai_logger",
    "single_overflow_check",
    "fused_zero_updates",
    "reduce_during_backward",
    "share_during_update",
    "fused_mixed_updates",
    "clip_on_device",
    "steady_chunks",
    "operations_without_hooks",
    "update_after_replay",
    # colossalai.legacy
    "seed_manager",
    "state_dict",
    "classifier3d_grad",
    "follow_autocast",
    # transformers and PyTorch
    "fuse_qkv",
    "cpu_attention",
    "attention_kernel",
    "class_token_alone",
    "layer_kernels",
    "direct_forward",
    "linear_patch_embedding",
    "safe_attention_kernels",
    "eager_dropout",
    "no_ddp_on_one_rank",
)


def disabled() -> list[str]:
    """The names in VIT_DISABLE_PATCHES."""
    return [name for name in os.environ.get("VIT_DISABLE_PATCHES", "").split(",") if name]


def unknown() -> list[str]:
    """Names in VIT_DISABLE_PATCHES that are no patch."""
    return [name for name in disabled() if name not in PATCHES]


def patch(function: Callable) -> Callable:
    """Let a function do nothing where its name is in VIT_DISABLE_PATCHES."""
    if function.__name__ not in PATCHES:
        raise ValueError(f"{function.__name__} is not in vit.patches.PATCHES")

    @functools.wraps(function)
    def apply(*args, **kwargs) -> None:
        if function.__name__ not in disabled():
            function(*args, **kwargs)

    return apply
