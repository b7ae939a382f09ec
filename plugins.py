"""A plugin's name to a ready Booster: the one place where Colossal-AI is set up.

boosted = boost(model, args, layout)        # -> Boosted(booster, model, optimizer, ...)
"""

import os
import re
import resource
import signal
import socket
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from console import say, silence_colossalai_logger
from ema import WeightAverage
from layout import Layout
from speedups import rebuild_buckets_early, remove_waits, use_eager_dropout, use_larger_products


def import_libraries() -> None:
    """The slow imports (4 to 10 s), in one place, so that what comes after them can be timed by itself."""
    # torch's compiler would start a process for each core now, which take the cores from the first
    # seconds of training
    # (a step of batch 8 on two cores: 128 ms instead of 16); so it does when there is something to compile
    os.environ.setdefault("TORCH_WARM_POOL", "0")
    import colossalai.booster.plugin  # noqa: F401
    import transformers.models.vit.modeling_vit  # noqa: F401


def start_distributed(seed: int) -> None:
    """Join the process group of this launch (torchrun's environment variables) and pick the device.

    Without a GPU, mends Colossal-AI for the CPU first.
    """
    import colossalai

    silence_colossalai_logger()
    if not torch.cuda.is_available():
        import cpu_accelerator

        cpu_accelerator.install()
    # started without a launcher: a group of one
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    with _signals_end_at_once():
        colossalai.launch_from_torch(seed=seed, verbose=False)
    if "LOCAL_WORLD_SIZE" not in os.environ:  # one process at a time
        host = socket.gethostname()
        os.environ["LOCAL_WORLD_SIZE"] = str(all_of(host).count(host))


@contextmanager
def _signals_end_at_once():
    """While processes wait for each other no Python runs, and a handler in Python would never be called."""
    previous = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_distributed() -> None:
    """Leave the process group; a process that just exits makes the others' libraries complain."""
    dist.barrier()
    dist.destroy_process_group()


def local_processes() -> int:
    """Processes of this launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def device() -> torch.device:
    """The device of this process."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


DDP = ("torch_ddp", "torch_ddp_fp16", "none")  # every process holds the whole model and optimizer


@dataclass
class Boosted:
    """A model and its optimizer under a plugin, and the few things that differ between plugins."""

    booster: object
    model: nn.Module
    optimizer: object
    layout: Layout
    plugin: str
    zero_stage: int
    clip_here: float  # clip to this norm in the train step; 0: the plugin clips by itself, or nothing clips
    can_defer_sync: bool  # whether all but the last micro-step may skip the gradient reduction
    graph_stream: torch.cuda.Stream | None = (
        None  # where whole steps are recorded as CUDA graphs; None: they are not
    )
    average: WeightAverage | None = None  # of the weights, over the steps

    def gemini_chunks(self) -> list:
        """Gemini's 16-bit chunks in the order of the parameters they hold.

        Each has an fp32 ``paired_chunk``.
        """
        chunks = {}
        for param in self.model.fp16_params:
            chunk = self.model.chunk_manager.get_chunk(param)
            chunks[id(chunk)] = chunk
        return list(chunks.values())

    def keep_average(self, decay: float) -> None:
        """Average the weights over the coming steps; evaluation and export use the average."""
        self.average = WeightAverage(self._weights, decay)

    def _weights(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What this process holds of the weights, and their fp32 originals where the plugin keeps them in
        the same pieces.
        """
        if self.plugin == "gemini":
            chunks = self.gemini_chunks()
            return [chunk.payload for chunk in chunks], [chunk.paired_chunk.payload for chunk in chunks]
        weights = [param.data for param in self.model.parameters()]
        return weights, weights

    def averaged_weights(self):
        """Context in which the model has its averaged weights, if it keeps any."""
        return self.average.applied() if self.average else nullcontext()

    def no_sync(self):
        """Context in which a backward pass leaves gradients unreduced (for accumulation)."""
        if not self.can_defer_sync:
            return nullcontext()
        if self.plugin in DDP:
            # the plugin's own no_sync does not look through the mixed-precision wrapper
            ddp = next(
                (m for m in self.model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None
            )
            return ddp.no_sync() if ddp is not None else nullcontext()
        return self.booster.no_sync(self.model, self.optimizer)


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Biases, LayerNorms and embeddings are not decayed; matrices are.

    ``layer_decay``: learning rates fall by this factor a layer, from the head (1) down to the embeddings,
    as ``lr_scale``
    of a group (Clark et al., 2020; for ViTs Bao et al., 2022).
    """
    layers = model.config.num_hidden_layers
    groups = {}
    for name, param in model.named_parameters():
        is_matrix = param.ndim > 1 and not name.endswith(("cls_token", "position_embeddings", "pos_embed"))
        layer = re.search(r"\.layer\.(\d+)\.", name)
        below = layers - int(layer[1]) if layer else layers + 1 if ".embeddings." in name else 0
        scale = layer_decay**below
        group = groups.setdefault(
            (scale, is_matrix), {"params": [], "weight_decay": weight_decay * is_matrix, "lr_scale": scale}
        )
        group["params"].append(param)
    return [groups[key] for key in sorted(groups, reverse=True)]  # fastest first, matrices before the rest


def build_optimizer(model: nn.Module, args, layer_decay: float = 1.0) -> torch.optim.Optimizer:
    """AdamW: torch's fused kernel, or Colossal-AI's HybridAdam by ``--optimizer hybrid_adam``."""
    groups, lr = parameter_groups(model, args.weight_decay, layer_decay), args.learning_rate
    if args.optimizer == "hybrid_adam":
        from colossalai.nn.optimizer import HybridAdam

        try:
            return HybridAdam(groups, lr=lr)
        except Exception as error:  # no nvcc, or one that does not match torch: many kinds
            reason = str(error).strip().splitlines()[0]
            say(
                f"  note      HybridAdam's kernels cannot be built here ({reason}): using torch's "
                "fused AdamW, the same update"
            )
    if args.plugin == "gemini":
        from colossalai.zero.gemini import gemini_optimizer

        from adamw import GeminiAdamW

        gemini_optimizer._AVAIL_OPTIM_LIST.add(GeminiAdamW)
        return GeminiAdamW(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


# Loss scale at the first fp16 step. The published runs start at 32 (zero, gemini) and 1 (hybrid_parallel);
# 1 loses small gradients to underflow, the library's 2**32 skips the first twenty steps, and torch's
# 2**16 the first on
# four processes.
INITIAL_SCALE = 2**8

# ZeRO and Gemini reduce gradients after the backward pass, not during it. Measured on four H200s
# (ViT-B/16, bf16, 256 images
# each): 11,480 images/s instead of 6,830, and 9,830 instead of 8,050. ZeRO's hooks close a bucket at
# every change of the
# parameter group, and weights (decayed) and biases (not) take turns, so each tensor was sent alone.
REDUCE_IN_BACKWARD = False


class PlainOptimizer:
    """What Booster's optimizer wrappers offer, around a plain torch optimizer.

    The reference the plugins are held against.
    """

    def __init__(self, optim: torch.optim.Optimizer, fp16: bool):
        self.optim = optim
        self.scaler = torch.amp.GradScaler(device().type, init_scale=INITIAL_SCALE, enabled=fp16)

    @property
    def param_groups(self) -> list[dict]:
        return self.optim.param_groups  # load_state_dict makes them anew

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clip_grad_by_norm(self, max_norm: float) -> None:
        self.scaler.unscale_(self.optim)
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], max_norm)

    def step(self) -> None:
        self.scaler.step(self.optim)
        self.scaler.update()

    def zero_grad(self) -> None:
        self.optim.zero_grad()


class PlainModel(nn.Module):
    """autocast around a model (DistributedDataParallel when there are several processes)."""

    def __init__(self, module: nn.Module, precision: str, parallel: bool):
        super().__init__()
        module = module.to(device())
        self.module = (
            nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True) if parallel else module
        )
        self.dtype = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]

    def unwrap(self) -> nn.Module:
        return (
            self.module.module
            if isinstance(self.module, nn.parallel.DistributedDataParallel)
            else self.module
        )

    def forward(self, *args, **kwargs):
        with torch.autocast(device().type, dtype=self.dtype) if self.dtype else nullcontext():
            return self.module(*args, **kwargs)


class PlainBooster:
    """PyTorch without Colossal-AI (`--plugin none`), behind the two Booster calls that the engine makes."""

    plugin = None

    def backward(self, loss: torch.Tensor, optimizer: PlainOptimizer) -> None:
        optimizer.backward(loss)

    def save_model(self, model: PlainModel, path: str, shard: bool = False) -> None:
        if dist.get_rank() == 0:
            torch.save(model.unwrap().state_dict(), path)


class MeshOptimizer(PlainOptimizer):
    """A torch optimizer over the slices of a 2D, 2.5D or 3D tensor-parallel model (tensor_parallel.py)."""

    def __init__(self, optim: torch.optim.Optimizer, fp16: bool, model: nn.Module):
        super().__init__(optim, fp16)
        self.model, self.complete = model, False

    def complete_gradients(self) -> None:
        """Once a step, after the last micro-step."""
        import tensor_parallel

        if self.complete:
            return
        tensor_parallel.sync_gradients(self.model)
        if self.scaler.is_enabled():
            # what overflowed in one slice must be skipped in all: 0 times a norm is 0, but NaN when it is
            # not finite
            grads = [param.grad for param in self.model.parameters() if param.requires_grad]
            grads[0].add_(all_sum(0 * torch.stack(torch._foreach_norm(grads, torch.inf)).sum()))
            self.scaler.unscale_(self.optim)
        self.complete = True

    def clip_grad_by_norm(self, max_norm: float) -> None:
        import tensor_parallel

        self.complete_gradients()
        tensor_parallel.clip_(self.model, max_norm)

    def step(self) -> None:
        self.complete_gradients()
        super().step()
        self.complete = False


class MeshBooster(PlainBooster):
    """The Booster calls for such a model."""

    def save_model(self, model: PlainModel, path: str, shard: bool = False) -> None:
        import tensor_parallel

        state = tensor_parallel.gather(model.unwrap())
        if dist.get_rank() == 0:
            torch.save(state, path)


def build_plugin(args, layout: Layout):
    """-> (plugin, mixed_precision): what Booster takes. ``args`` has been checked by args.py."""
    from colossalai.booster import plugin as library
    from colossalai.booster.mixed_precision import FP16TorchMixedPrecision

    on_gpu = torch.cuda.is_available()
    if args.plugin in ("torch_ddp", "torch_ddp_fp16"):
        # gradients live in the reduction buckets: one copy of them, not two
        plugin = library.TorchDDPPlugin(broadcast_buffers=False, gradient_as_bucket_view=True)
        fp16 = FP16TorchMixedPrecision(init_scale=INITIAL_SCALE)  # its own 2**16 skips the first steps
        return plugin, {"fp32": None, "fp16": fp16, "bf16": _bf16_autocast()}[args.precision]
    if args.plugin == "low_level_zero":
        return (
            library.LowLevelZeroPlugin(
                stage=args.zero_stage,
                precision=args.precision,
                initial_scale=INITIAL_SCALE,
                max_norm=args.max_norm,
                cpu_offload=args.offload_optim_frac > 0,
                overlap_communication=REDUCE_IN_BACKWARD,
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
                enable_async_reduce=REDUCE_IN_BACKWARD,
                pin_memory=on_gpu,
                initial_scale=INITIAL_SCALE,
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
            initial_scale=INITIAL_SCALE,
            max_norm=args.max_norm,
            cpu_offload=args.offload_optim_frac > 0,
            overlap_communication=REDUCE_IN_BACKWARD,
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


def avoid_broken_attention(config) -> None:
    """Let attention with dropout go by other kernels than cuDNN's, for the whole process.

    On an H200 with torch 2.11 cuDNN's gives NaN for the gradient of a query whose products with all keys
    are far below zero,
    where the number of tokens is 64 more than a multiple of 128 (pytorch/pytorch#196678): ViT-Lite without
    a class token met
    it in step 3,491. Without dropout or mask another kernel runs, which does not.
    """
    if config.attention_probs_dropout_prob:
        torch.backends.cuda.enable_cudnn_sdp(False)


def boost(model: nn.Module, args, layout: Layout, layer_decay: float = 1.0) -> Boosted:
    """Shard, wrap and cast ``model`` as ``args.plugin`` does. Collective: every process calls it.

    ``layer_decay``: see `parameter_groups`.
    """
    from colossalai.booster import Booster

    avoid_broken_attention(model.config)
    use_larger_products(model)
    if args.grad_checkpoint:
        # the re-entrant form costs the CPU less; Gemini's hooks know no other
        model.gradient_checkpointing_enable({"use_reentrant": True})
    # fp16 reads back whether a gradient overflowed, and the other plugins' steps wait for more
    record = args.cuda_graphs and args.plugin in ("torch_ddp", "none") and args.precision != "fp16"
    stream = torch.cuda.Stream() if record else None
    if args.compile or args.cuda_graphs:
        use_eager_dropout()
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
            remove_waits(optimizer, clips=args.max_norm > 0)
    if record:
        torch.cuda.current_stream().wait_stream(stream)
    ddp = args.plugin in DDP
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            rebuild_buckets_early(module, adamw)
            if record:
                module._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # its timers cannot be recorded
    return Boosted(
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


def boost_mesh(model: nn.Module, args, layout: Layout) -> Boosted:
    """`boost` for what tensor_parallel.build returned. ``args``.

    Precision, max_norm, weight_decay, learning_rate.
    """
    avoid_broken_attention(model.config)
    adamw = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate, fused=True)
    return Boosted(
        booster=MeshBooster(),
        model=PlainModel(model, args.precision, parallel=False),
        optimizer=MeshOptimizer(adamw, args.precision == "fp16", model),
        layout=layout,
        plugin=args.plugin,
        zero_stage=0,
        clip_here=args.max_norm,
        can_defer_sync=False,  # gradients are completed once a step in any case
    )


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place."""
    dist.all_reduce(values)
    return values


def all_of(value) -> list:
    """What every process has, by rank; anything that can be pickled. Collective."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def all_max(values: torch.Tensor) -> torch.Tensor:
    """Maximum over all processes, in place."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


PROCESS = Path("/proc/self")  # Linux


def reset_peak_memory() -> None:
    """Let `peak_memory` count from here, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif PROCESS.exists():
        with suppress(OSError):
            (PROCESS / "clear_refs").write_text("5")


def peak_memory() -> float:
    """GiB: the most that any process has had allocated on its GPU so far; without a GPU, its resident set.

    Collective.
    """
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    elif PROCESS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", (PROCESS / "status").read_text())):
        peak = 1024 * int(found[1])
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return all_max(torch.tensor(peak / 2**30, device=device())).item()
