"""Patches that let Colossal-AI 0.5.0 run without a GPU."""

from contextlib import nullcontext

import torch
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator


class _NoStream:
    """CPU work is synchronous: waiting for a stream is done when the call is made."""

    def wait_stream(self, stream) -> None: ...

    def synchronize(self) -> None: ...


class CpuDevice(CpuAccelerator):
    """`colossalai/accelerator/cpu_accelerator.py` with the methods that raise, or return the wrong thing,
    filled in.

    Can go when the methods of that file stop raising "not supported for cpu accelerator".
    """

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


def patch_pipeline() -> None:
    """`colossalai/pipeline/p2p.py`, _check_for_nccl_hccl_backend.

    Reads Backend.HCCL, which torch does not define.
    """
    from colossalai.pipeline import p2p

    p2p._check_for_nccl_hccl_backend = lambda group: False


def patch_zero() -> None:
    """`colossalai/zero/low_level/low_level_optim.py`, _sanity_checks.

    Asserts that the accelerator is cuda or npu.
    """
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    LowLevelZeroOptimizer._sanity_checks = lambda self: None


def patch_gemini() -> None:
    """`colossalai/zero/gemini/chunk/chunk.py`: a shard on the device "cpu" counts as offloaded, and is
    moved away.

    Here the CPU is the device, so a shard is always resident: nothing moves, nothing is offloaded.
    """
    from colossalai.zero.gemini.chunk import Chunk, ChunkManager

    library_init = Chunk.__init__

    def init(self, *args, **kwargs):
        library_init(self, *args, **kwargs)
        self.shard_device = torch.device("meta")  # only ever compared with "cpu", which would mean offloaded

    Chunk.__init__ = init
    Chunk.device_type = property(lambda self: "cuda")
    ChunkManager.move_chunk = lambda self, chunk, device, *args, **kwargs: None


def patch_fp16() -> None:
    """`colossalai/booster/mixed_precision/fp16_torch.py`.

    Torch.cuda's GradScaler disables itself without a GPU.
    """
    from colossalai.booster.mixed_precision import fp16_torch

    library_init = fp16_torch.TorchAMPOptimizer.__init__

    def init(self, optim, **scaling):
        library_init(self, optim, **scaling)
        self.scaler = torch.amp.GradScaler("cpu", **scaling)

    fp16_torch.TorchAMPOptimizer.__init__ = init


def run_on_cpu() -> None:
    """Make Colossal-AI use the CPU as its device in this process. Idempotence is not needed.

    Called once, at start.
    """
    set_accelerator(CpuDevice())
    patch_pipeline()
    patch_zero()
    patch_gemini()
    patch_fp16()
