"""The table of plugins: what each training strategy supports, and how Colossal-AI builds it.

To add one, write its `build` function and its entry in `PLUGINS`; nothing else asks for a plugin by name.
This module imports neither torch nor Colossal-AI, so that settings can be checked without them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vit.settings import Settings

# Loss scale of the first fp16 step. The published runs start at 32 (zero, gemini) and 1 (hybrid_parallel).
# A scale of 1 loses small gradients to underflow; Colossal-AI's default of 2**32 skips the first twenty
# steps.
INITIAL_LOSS_SCALE = 2**8

# False: the library's ZeRO and Gemini reduce gradients after the backward pass, not during it. Measured on
# four H200s (ViT-B/16, bf16, 256 images each): 11,480 images/s instead of 6,830 with ZeRO, 9,830 instead of
# 8,050 with Gemini. ZeRO closes a bucket at every change of parameter group, and weights (decayed) and biases
# (not) alternate: `reduce_during_backward` in vit/patches/colossalai_zero.py has buckets of its own.
OVERLAP_COMMUNICATION = False

NO_LORA = "has no LoRA in Colossal-AI (its support_lora() is False)"


@dataclass(frozen=True)
class Plugin:
    """One training strategy.

    Attributes:
        build: settings -> (Booster plugin, MixedPrecision or None). Called after the process group was
            joined.
        precisions: that it trains in; the published one first.
        replicates_model: every rank holds the whole model and optimizer, as in DistributedDataParallel.
        model_parallel: takes tp_size and pp_size.
        zero_stages: allowed values of --zero_stage, the default first; empty: the flag has no meaning.
        shards_weights: ranks hold different pieces of each weight, in chunks that only the same number of
            ranks can read back.
        clips: clips gradients by itself; otherwise the train step does.
        boosted: "module:class" of the operations that training and checkpoints need.
        reentrant_checkpoint: gradient checkpointing by its re-entrant form, which costs the CPU less.
        own_adam: accepts only Colossal-AI's Adam classes (see `vit.optim.GeminiAdamW`).
        records: its whole train steps can be recorded as CUDA graphs; see `why_not_recorded`.
        why_not_compiled: why torch.compile does not work with it; empty: it does.
        why_no_lora: why it cannot train LoRA; empty: it can, with neither tensor nor pipeline parallelism.
        offloads: what it can keep in CPU memory: "optim", "param".
        published_offload: part of the optimizer states that the published runs keep there.
    """

    build: Callable[[Settings], tuple] | None
    precisions: tuple[str, ...]
    replicates_model: bool = False
    model_parallel: bool = False
    zero_stages: tuple[int, ...] = ()
    shards_weights: bool = False
    clips: bool = True
    boosted: str = "vit.parallel.boosted:BoostedModel"
    reentrant_checkpoint: bool = True
    own_adam: bool = False
    records: bool = True
    why_not_compiled: str = ""
    why_no_lora: str = ""
    offloads: tuple[str, ...] = ()
    published_offload: float = 0.0

    @property
    def compiles(self) -> bool:
        return not self.why_not_compiled

    def why_not_recorded(self, settings: Settings) -> str:
        """Why train steps cannot be recorded as CUDA graphs; empty: they can, see `records_passes`."""
        if self.own_adam and settings.max_norm:
            return "a step of gemini asks for the norm to clip by"
        if self.records_passes(settings):
            return ""
        if settings.precision == "fp16":
            return "a step in fp16 asks whether a gradient overflowed"
        if settings.may_offload:
            return "what is offloaded waits for the CPU"
        return ""

    def records_passes(self, settings: Settings) -> bool:
        """Whether the graph of a step holds forward and backward pass, and the optimizer steps beside it.

        So does gemini on one rank, where its step asks whether a gradient overflowed (fp16) or runs on the
        CPU.
        """
        stays = settings.layout.world_size == 1 and not settings.moves_weights and not settings.max_norm
        return self.own_adam and stays and (settings.precision == "fp16" or settings.may_offload)

    def shards_optimizer(self, zero_stage: int) -> bool:
        """Whether data-parallel ranks hold different optimizer states."""
        return self.shards_weights or zero_stage > 0

    def can_skip_sync(self, zero_stage: int) -> bool:
        """Whether a backward pass may leave gradients unreduced, as in all micro-steps but the last."""
        return self.replicates_model or (bool(self.zero_stages) and zero_stage < 2)


def build_torch_ddp(settings: Settings) -> tuple:
    from colossalai.booster.mixed_precision import FP16TorchMixedPrecision
    from colossalai.booster.plugin import TorchDDPPlugin

    from vit.parallel.plain import bf16_autocast

    # gradients live in the reduction buckets: one copy of them, not two
    plugin = TorchDDPPlugin(broadcast_buffers=False, gradient_as_bucket_view=True)
    if settings.precision == "fp16":
        return plugin, FP16TorchMixedPrecision(init_scale=INITIAL_LOSS_SCALE)
    return plugin, bf16_autocast() if settings.precision == "bf16" else None


def build_low_level_zero(settings: Settings) -> tuple:
    from colossalai.booster.plugin import LowLevelZeroPlugin

    plugin = LowLevelZeroPlugin(
        stage=settings.zero_stage,
        precision=settings.precision,
        initial_scale=INITIAL_LOSS_SCALE,
        max_norm=settings.max_norm,
        cpu_offload=settings.offload_optim_frac > 0,
        overlap_communication=OVERLAP_COMMUNICATION,
    )
    return plugin, None


def build_gemini(settings: Settings) -> tuple:
    import torch
    from colossalai.booster.plugin import GeminiPlugin

    accumulates = settings.gradient_accumulation_steps > 1
    plugin = GeminiPlugin(
        precision=settings.precision,
        placement_policy=settings.placement_policy,
        offload_optim_frac=settings.offload_optim_frac,
        offload_param_frac=settings.offload_param_frac,
        enable_gradient_accumulation=accumulates,
        # Models below this size (in 2**20 parameters) are kept whole on each rank, and such chunks add up
        # wrongly when gradients accumulate (zero/gemini/chunk/manager.py,
        # rearrange_accumulated_grad_chunk). Otherwise, large chunks mean fewer messages between GPUs, small
        # ones less memory while one is offloaded.
        min_chunk_size_m=0 if accumulates else 8 if settings.offload_optim_frac else 32,
        search_range_m=2,  # the default of 32 searches for seconds and saves less than 1 % of memory
        enable_async_reduce=OVERLAP_COMMUNICATION,
        pin_memory=torch.cuda.is_available(),
        initial_scale=INITIAL_LOSS_SCALE,
        max_norm=settings.max_norm,
    )
    return plugin, None


def build_torch_fsdp(settings: Settings) -> tuple:
    from vit.parallel.fsdp import FSDPPlugin

    return FSDPPlugin(settings.precision), None


def build_hybrid_parallel(settings: Settings) -> tuple:
    from colossalai.booster.plugin import HybridParallelPlugin

    from vit.parallel.policy import ViTPolicy

    layout = settings.layout
    micro_batches = settings.num_microbatches * settings.gradient_accumulation_steps
    plugin = HybridParallelPlugin(
        tp_size=layout.tensor_size,
        pp_size=layout.pipeline_size,
        custom_policy=ViTPolicy(),
        num_microbatches=micro_batches if layout.pipeline_size > 1 else None,
        zero_stage=settings.zero_stage,
        precision=settings.precision,
        initial_scale=INITIAL_LOSS_SCALE,
        max_norm=settings.max_norm,
        cpu_offload=settings.offload_optim_frac > 0,
        overlap_communication=OVERLAP_COMMUNICATION,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )
    return plugin, None


PLUGINS = {
    "torch_ddp": Plugin(build_torch_ddp, ("fp32", "bf16"), replicates_model=True, clips=False),
    "torch_ddp_fp16": Plugin(build_torch_ddp, ("fp16",), replicates_model=True, clips=False),
    "low_level_zero": Plugin(
        build_low_level_zero, ("fp16", "bf16", "fp32"), zero_stages=(1, 2), offloads=("optim",)
    ),
    "gemini": Plugin(
        build_gemini,
        ("fp16", "bf16"),
        shards_weights=True,
        boosted="vit.parallel.boosted:BoostedGemini",
        own_adam=True,
        why_not_compiled="swaps parameter storage under the compiler",
        why_no_lora=NO_LORA,
        offloads=("optim", "param"),
        published_offload=1.0,
    ),
    "torch_fsdp": Plugin(
        build_torch_fsdp,
        ("bf16", "fp32"),
        clips=False,
        shards_weights=True,
        boosted="vit.parallel.fsdp:BoostedFSDP",
        reentrant_checkpoint=False,
        records=False,
        why_not_compiled="is not tested under the compiler",
        why_no_lora=NO_LORA,
    ),
    "hybrid_parallel": Plugin(
        build_hybrid_parallel,
        ("fp16", "bf16", "fp32"),
        model_parallel=True,
        zero_stages=(0, 1, 2),
        offloads=("optim",),
    ),
    "none": Plugin(  # plain PyTorch, the baseline
        None,
        ("fp32", "fp16", "bf16"),
        replicates_model=True,
        clips=False,
        why_no_lora="has no Booster, which adds it",
    ),
}

# 2D, 2.5D and 3D tensor parallelism, chosen by a config file of train.py: vit/parallel/mesh.py builds them.
MESH_PLUGINS = {mode: Plugin(None, ("fp32", "fp16", "bf16")) for mode in ("2d", "2.5d", "3d")}

# Other libraries' programs, for the benchmark: vit/peers.py builds them. Their names are their packages'.
PEERS = {
    name: Plugin(None, ("fp16", "bf16", "fp32"), replicates_model=True, clips=False)
    for name in ("timm", "transformers")
}


def plugin_named(name: str) -> Plugin:
    return (PLUGINS | MESH_PLUGINS | PEERS)[name]
