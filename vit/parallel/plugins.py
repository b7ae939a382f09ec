"""From the name of a plugin to a boosted model."""

from contextlib import nullcontext

import torch
from torch import nn

from vit.distributed import device
from vit.layout import ParallelLayout
from vit.optim import build_optimizer, param_groups
from vit.parallel.boosted import DDP, BoostedModel
from vit.parallel.mesh import MeshBooster, MeshOptimizer
from vit.parallel.plain import INITIAL_LOSS_SCALE, PlainBooster, PlainModel, PlainOptimizer
from vit.patches.colossalai_zero import avoid_device_syncs
from vit.patches.torch_kernels import disable_cudnn_sdp_with_dropout, eager_dropout, early_ddp_buckets
from vit.patches.transformers_vit import fuse_qkv_and_patch_projection

# ZeRO and Gemini reduce gradients after the backward pass, not during it. Measured on four H200s
# (ViT-B/16, bf16, 256 images
# each): 11,480 images/s instead of 6,830, and 9,830 instead of 8,050. ZeRO's hooks close a bucket at
# every change of the
# parameter group, and weights (decayed) and biases (not) take turns, so each tensor was sent alone.
OVERLAP_COMMUNICATION = False


def build_plugin(args, layout: ParallelLayout):
    """-> (plugin, mixed_precision): what Booster takes. ``args`` has been checked by args.py."""
    from colossalai.booster import plugin as library
    from colossalai.booster.mixed_precision import FP16TorchMixedPrecision

    on_gpu = torch.cuda.is_available()
    if args.plugin in ("torch_ddp", "torch_ddp_fp16"):
        # gradients live in the reduction buckets: one copy of them, not two
        plugin = library.TorchDDPPlugin(broadcast_buffers=False, gradient_as_bucket_view=True)
        fp16 = FP16TorchMixedPrecision(init_scale=INITIAL_LOSS_SCALE)  # its own 2**16 skips the first steps
        return plugin, {"fp32": None, "fp16": fp16, "bf16": _bf16_autocast()}[args.precision]
    if args.plugin == "low_level_zero":
        return (
            library.LowLevelZeroPlugin(
                stage=args.zero_stage,
                precision=args.precision,
                initial_scale=INITIAL_LOSS_SCALE,
                max_norm=args.max_norm,
                cpu_offload=args.offload_optim_frac > 0,
                overlap_communication=OVERLAP_COMMUNICATION,
            ),
            None,
        )
    if args.plugin == "gemini":
        accumulating = args.gradient_accumulation_steps > 1
        return (
            library.GeminiPlugin(
                precision=args.precision,
                placement_policy=args.placement_policy,
                offload_optim_frac=args.offload_optim_frac,
                offload_param_frac=args.offload_param_frac,
                enable_gradient_accumulation=accumulating,
                # Models under this size (in 2**20 parameters) are kept whole on each process, and such
                # chunks add
                # up wrongly when gradients accumulate (`chunk/manager.py`, rearrange_accumulated_grad_chunk).
                # Otherwise large chunks are fewer messages between GPUs, small ones less memory while one
                # is offloaded.
                min_chunk_size_m=0 if accumulating else 8 if args.offload_optim_frac else 32,
                search_range_m=2,  # the default of 32 searches for seconds and saves under 1 % of memory
                enable_async_reduce=OVERLAP_COMMUNICATION,
                pin_memory=on_gpu,
                initial_scale=INITIAL_LOSS_SCALE,
                max_norm=args.max_norm,
            ),
            None,
        )
    return (
        library.HybridParallelPlugin(
            tp_size=layout.tp,
            pp_size=layout.pp,
            num_microbatches=args.num_microbatches * args.gradient_accumulation_steps
            if layout.pp > 1
            else None,
            zero_stage=args.zero_stage,
            precision=args.precision,
            initial_scale=INITIAL_LOSS_SCALE,
            max_norm=args.max_norm,
            cpu_offload=args.offload_optim_frac > 0,
            overlap_communication=OVERLAP_COMMUNICATION,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        ),
        None,
    )


def _bf16_autocast():
    """Booster's own BF16MixedPrecision is abstract (`booster/mixed_precision/bf16.py`); this is autocast."""
    from colossalai.booster.mixed_precision import MixedPrecision
    from colossalai.interface import ModelWrapper

    class AutocastModel(ModelWrapper):
        def forward(self, *args, **kwargs):
            with torch.autocast(device().type, dtype=torch.bfloat16):
                return self.module(*args, **kwargs)

    class Autocast(MixedPrecision):
        def configure(self, model, optimizer=None, criterion=None):
            return AutocastModel(model), optimizer, criterion

    return Autocast()


def boost(model: nn.Module, args, layout: ParallelLayout, layer_decay: float = 1.0) -> BoostedModel:
    """Shard, wrap and cast ``model`` as ``args.plugin`` does. Collective: every process calls it.

    ``layer_decay``: see `parameter_groups`.
    """
    from colossalai.booster import Booster

    disable_cudnn_sdp_with_dropout(model.config)
    fuse_qkv_and_patch_projection(model)
    if args.grad_checkpoint:
        # the re-entrant form costs the CPU less; Gemini's hooks know no other
        model.gradient_checkpointing_enable({"use_reentrant": True})
    # fp16 reads back whether a gradient overflowed, and the other plugins' steps wait for more
    record = args.cuda_graphs and args.plugin in ("torch_ddp", "none") and args.precision != "fp16"
    stream = torch.cuda.Stream() if record else None
    if args.compile or args.cuda_graphs:
        eager_dropout()
    if args.cuda_graphs and not record:
        # forward and backward of the whole model, for a graph is worth the more the less is left between
        # graphs
        model.compile(mode="reduce-overhead", dynamic=False)
    elif args.compile or record:
        # layer by layer: they are alike, so the first one's kernels serve them all
        for part in (model.base_model.embeddings, *model.base_model.encoder.layer):
            part.compile(dynamic=False)
    adamw = build_optimizer(model, args, layer_decay)
    with (
        torch.cuda.stream(stream) if record else nullcontext()
    ):  # DistributedDataParallel accumulates gradients where it was made
        if args.plugin == "none":
            booster, model = PlainBooster(), PlainModel(model, args.precision, parallel=layout.world > 1)
            optimizer = PlainOptimizer(adamw, fp16=args.precision == "fp16")
        else:
            plugin, mixed_precision = build_plugin(args, layout)
            booster = Booster(plugin=plugin, mixed_precision=mixed_precision)
            model, optimizer, *_ = booster.boost(model, adamw)
            avoid_device_syncs(optimizer, clips=args.max_norm > 0)
    if record:
        torch.cuda.current_stream().wait_stream(stream)
    ddp = args.plugin in DDP
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            early_ddp_buckets(module, adamw)
            if record:
                module._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # its timers cannot be recorded
    return BoostedModel(
        booster=booster,
        model=model,
        optimizer=optimizer,
        layout=layout,
        plugin=args.plugin,
        zero_stage=args.zero_stage,
        clip_here=args.max_norm if ddp else 0.0,
        can_defer_sync=ddp or (args.plugin in ("low_level_zero", "hybrid_parallel") and args.zero_stage < 2),
        graph_stream=stream,
    )


def boost_mesh(model: nn.Module, args, layout: ParallelLayout) -> BoostedModel:
    """`boost` for what tensor_parallel.build returned. ``args``.

    Precision, max_norm, weight_decay, learning_rate.
    """
    disable_cudnn_sdp_with_dropout(model.config)
    adamw = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=args.learning_rate, fused=True)
    return BoostedModel(
        booster=MeshBooster(),
        model=PlainModel(model, args.precision, parallel=False),
        optimizer=MeshOptimizer(adamw, args.precision == "fp16", model),
        layout=layout,
        plugin=args.plugin,
        zero_stage=0,
        clip_here=args.max_norm,
        can_defer_sync=False,  # gradients are completed once a step in any case
    )
