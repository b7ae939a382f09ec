"""Patches that let Colossal-AI 0.5.0 run without a GPU, in data, tensor and pipeline parallelism over gloo.

Imported only where torch sees no GPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator

from vit.patches import patch


def run_on_cpu() -> None:
    """Make Colossal-AI use the CPU as its device in this process. Called once, at start."""
    cpu_accelerator()
    cpu_pipeline()
    cpu_zero()
    cpu_gemini()
    cpu_fp16()


@patch
def cpu_accelerator() -> None:
    """Use an accelerator whose methods all work.

    Why: those for streams, seeds and random states raise "not supported for cpu accelerator", and autocast
    returns the wrong type. Library: accelerator/cpu_accelerator.py, colossalai 0.5.0. Can go when these
    methods stop raising.
    """
    set_accelerator(CpuDevice())


class _NoStream:
    """CPU work is synchronous: waiting for a stream is done when the call is made."""

    def wait_stream(self, stream) -> None: ...

    def synchronize(self) -> None: ...


class CpuDevice(CpuAccelerator):
    """Colossal-AI's CPU accelerator with the missing methods filled in."""

    def synchronize(self, device=None) -> None: ...

    def device_count(self) -> int:
        return 1

    def current_device(self) -> None:
        return None  # compared with torch.device("cpu").index in pipeline/p2p.py

    # randomness: shardformer's Randomizer seeds dropout through these
    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.get_rng_state()  # the library passes torch an argument that it does not take

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    # streams: the low-level ZeRO optimizer asks for them even when it overlaps nothing
    def Stream(self, device=None, priority=0, **kwargs) -> _NoStream:
        return _NoStream()

    def current_stream(self, device=None) -> _NoStream:
        return _NoStream()

    def stream(self, stream_):
        return nullcontext()

    def empty_cache(self) -> None: ...

    def autocast(self, enabled=True, dtype=torch.float16, cache_enabled=True):
        return torch.autocast(
            "cpu", dtype=dtype, enabled=enabled
        )  # the library returns a class, not a context


@patch
def cpu_pipeline() -> None:
    """Do not ask a pipeline's process group for its backend.

    Why: it reads Backend.HCCL, which torch does not define.
    Library: pipeline/p2p.py, _check_for_nccl_hccl_backend, colossalai 0.5.0. Can go when it does not.
    """
    from colossalai.pipeline import p2p

    p2p._check_for_nccl_hccl_backend = lambda group: False


@patch
def cpu_zero() -> None:
    """Let ZeRO start.

    Why: it asserts that the accelerator is cuda or npu.
    Library: zero/low_level/low_level_optim.py, _sanity_checks, colossalai 0.5.0. Can go when it allows cpu.
    """
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    LowLevelZeroOptimizer._sanity_checks = lambda self: None


@patch
def cpu_gemini() -> None:
    """Treat Gemini's shards as resident: the CPU is the device, so nothing moves and nothing is offloaded.

    Why: a shard on the device "cpu" counts as offloaded, and is moved away.
    Library: zero/gemini/chunk/chunk.py, colossalai 0.5.0. Can go when chunks compare with their own device.
    """
    from colossalai.zero.gemini.chunk import Chunk, ChunkManager

    library_init = Chunk.__init__

    def init(self, *args, **kwargs):
        library_init(self, *args, **kwargs)
        self.shard_device = torch.device("meta")  # only ever compared with "cpu", which would mean offloaded

    Chunk.__init__ = init
    Chunk.device_type = property(lambda self: "cuda")
    ChunkManager.move_chunk = lambda self, chunk, device, *args, **kwargs: None


@patch
def cpu_fp16() -> None:
    """Scale the loss of torch_ddp_fp16.

    Why: torch.cuda's GradScaler disables itself without a GPU.
    Library: booster/mixed_precision/fp16_torch.py, colossalai 0.5.0. Can go when it makes torch.amp's.
    """
    from colossalai.booster.mixed_precision import fp16_torch

    library_init = fp16_torch.TorchAMPOptimizer.__init__

    def init(self, optim, **scaling):
        library_init(self, optim, **scaling)
        self.scaler = torch.amp.GradScaler("cpu", **scaling)

    fp16_torch.TorchAMPOptimizer.__init__ = init
