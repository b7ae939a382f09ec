"""Patches of Colossal-AI's Gemini: one for a fault, the others for speed.

Those for speed change results by rounding at most.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from types import MethodType

import torch

from vit.patches import patch


@patch
def accumulate_anew(model, optimizer) -> None:
    """Let gradients accumulate from zero again after a step that was skipped for an overflow.

    Why: only a step that is taken ends the accumulation. After one that is skipped, gradients are added to
    the infinite ones, so that all later steps are skipped, too.
    Library: zero/gemini/gemini_optimizer.py, GeminiOptimizer.step, colossalai 0.5.0. Can go when it sets
    accumulating_grads to False before it returns from an overflow.
    """
    usual, manager = optimizer.step, model.chunk_manager

    def step(self, *args, **kwargs):
        result = usual(*args, **kwargs)
        manager.accumulating_grads = False
        return result

    optimizer.step = MethodType(step, optimizer)


@patch
def operations_without_hooks(model, settings, recorded: bool) -> None:
    """Let a `GeminiDDP` model of one rank gather its chunks before the forward pass, not in a hook of each
    operation, and copy gradients into a chunk several at a time, not each in a hook of its own.

    Why: the hooks run Python before and after every operation with a weight, forward and backward, and give
    up chunks that the next operation has to gather again, by copies. Where one rank has all of the weights on
    its GPU there is nothing to decide. Copies from and to the CPU's memory, of an optimizer there, made the
    CPU wait for each of them.
    Library: zero/gemini/gemini_ddp.py, forward, backward and grad_handle; tensor/colo_parameter.py,
    __torch_function__, colossalai 0.5.0. Can go when the hooks are left out on one rank.

    Args:
        recorded: whether the passes are recorded as a CUDA graph.
    """
    if settings.layout.world_size > 1 or settings.moves_weights:
        return
    from colossalai.zero.gemini.chunk import TensorState

    usual, chunks = model.forward, model.chunk_manager.get_chunks(model.fp16_params)
    collector = _collect_gradients(model) if model.chunk_manager.reuse_fp16_chunk else None
    offloaded = [chunk for chunk in chunks if _is_offloaded(model, chunk)]

    def forward(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return usual(*args, **kwargs)
        if recorded:
            _return_chunks(self.chunk_manager, offloaded)
        with torch._C.DisableTorchFunctionSubclass():  # the hooks are in the parameters' __torch_function__
            for chunk in chunks:
                if work := self.chunk_manager.access_chunk(chunk, async_access=True):
                    work.wait()  # the GPU does, not the CPU
            return usual(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            self._pre_backward()
            if collector:
                collector.arrived.clear()  # of a backward pass that ended in an error
            for chunk in chunks:  # as the hooks would leave it for `grad_handle`
                chunk._Chunk__update_tensors_state(TensorState.HOLD_AFTER_BWD)
            loss.backward()
            if offloaded and not recorded:  # otherwise `update_after_replay` waits
                torch.cuda.current_stream().synchronize()  # the CPU reads the gradients next
            self._post_backward()

    model.forward = MethodType(forward, model)
    model.backward = MethodType(backward, model)


def _is_offloaded(model, chunk) -> bool:
    """Whether the optimizer updates a chunk on the CPU, where there is a GPU."""
    first = next(iter(chunk.tensors_info))
    return torch.cuda.is_available() and model.grads_device[first].type == "cpu"


def _return_chunks(manager, offloaded: list) -> None:
    """Let go of the GPU's copy of offloaded chunks, which an evaluation leaves there: a recorded step begins
    and ends on the CPU. The weights are in the fp32 chunks, too, and the CPU's 16-bit memory may hold the
    gradients of a replay, so nothing may be copied into it.
    """
    for chunk in offloaded:
        manager.release_chunk(chunk)
        chunk.cpu_vis_flag = chunk.optim_sync_flag = True  # so that `move_chunk` copies nothing
        manager.move_chunk(chunk, torch.device("cpu"))
        chunk.optim_sync_flag = False  # the next pass reads the fp32 chunk, as every replay does


@patch
def update_after_replay(model, optimizer) -> None:
    """Let a `GeminiOptimizer` update after a CUDA graph of forward and backward pass was replayed.

    Why: a replay runs no Python. The factor of the loss was read by the CPU, so a graph would keep its first
    value; it changed its place in memory when it changed; and Python noted that a backward pass has scaled
    the loss. The CPU must wait for gradients that it reads, and find them where the graph leaves them.
    Library: amp/naive_amp/mixed_precision_mixin/fp16.py, FP16MixedPrecisionMixin.pre_backward;
    grad_scaler/dynamic_grad_scaler.py, DynamicGradScaler.update, colossalai 0.5.0. Can go when the factor is
    used on the GPU and stays in its place.
    """
    from colossalai.amp.naive_amp.mixed_precision_mixin.fp16 import OptimState

    usual, mixin, manager = optimizer.step, optimizer.mix_precision_mixin, model.chunk_manager
    scaler = getattr(mixin, "grad_scaler", None)  # in fp16
    offloaded = [chunk for chunk in manager.get_chunks(model.fp16_params) if _is_offloaded(model, chunk)]

    def step(self, *args, **kwargs):
        torch.cuda.current_stream().synchronize()
        _return_chunks(manager, offloaded)
        if scaler:
            mixin.optim_state = OptimState.SCALED
        return usual(*args, **kwargs)

    optimizer.step = MethodType(step, optimizer)
    if not scaler:
        return
    change = scaler.update

    def pre_backward(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * scaler.scale[0]

    def update(self, overflow: bool) -> None:
        place = self._scale
        change(overflow)
        self._scale = place.copy_(self._scale)

    mixin.pre_backward = MethodType(pre_backward, mixin)
    scaler.update = MethodType(update, scaler)


def _collect_gradients(model) -> GradientCollector:
    """Replace the hooks of a model's gradients, which take the place of its weights, by a collector's.

    It must not refer to the model, whose end removes the hooks: they keep the weights in memory.
    """
    collector = GradientCollector(model)
    model._setup_grads_ptr = lambda: None  # removes gradients, of which the collector leaves none
    for param in model.fp16_params:
        param._grad_handle.remove()
        param._grad_handle = param.register_post_accumulate_grad_hook(collector.add)
    return collector


@dataclass
class Arrived:
    """Gradients of a chunk that have arrived.

    Attributes:
        params: whose gradients are not copied yet; ``elements``: of these.
        total: how many have arrived, with those that are copied.
    """

    params: list[torch.nn.Parameter] = field(default_factory=list)
    elements: int = 0
    total: int = 0


class GradientCollector:
    """Copies the gradients of a `GeminiDDP` model into its chunks, several by one call.

    Args:
        model: of one rank, whose gradients take the place of the weights.
    """

    ELEMENTS = 2**21  # so many are kept before they are copied: memory beside the chunks

    def __init__(self, model):
        self.manager, self.handle = model.chunk_manager, type(model).grad_handle
        self.options = dict(
            chunk_manager=model.chunk_manager,
            param2name=model.param2name,
            grads_device=model.grads_device,
            master_weights=model.master_weights,
            enable_gradient_accumulation=False,
        )
        self.arrived: dict = defaultdict(Arrived)  # of each chunk

    def add(self, param: torch.nn.Parameter) -> None:
        """Take a gradient. The last one of a chunk goes the library's way, which then reduces the chunk."""
        chunk = self.manager.get_chunk(param)
        arrived = self.arrived[chunk]
        arrived.total += 1
        param._gemini_reduced = True  # the others are named in an error
        if arrived.total < chunk.num_tensors:
            arrived.params.append(param)
            arrived.elements += param.numel()
            if arrived.elements >= self.ELEMENTS:
                self.copy(chunk, arrived)
            return
        self.copy(chunk, self.arrived.pop(chunk))
        gradient, param.grad = param.grad, None
        # with a stream, copies to the CPU do not wait for the GPU
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        self.handle(gradient, p=param, async_reduce_stream=stream, **self.options)

    def copy(self, chunk, arrived: Arrived) -> None:
        """Copy the gradients that have arrived into their chunk."""
        from colossalai.zero.gemini.chunk import TensorState

        places = [chunk.tensors_info[param] for param in arrived.params]
        parts = [chunk.cuda_global_chunk[place.offset : place.end] for place in places]
        if parts:
            torch._foreach_copy_(parts, [param.grad.flatten() for param in arrived.params])
        for param in arrived.params:
            param.grad = None
            chunk.tensor_trans_state(param, TensorState.READY_FOR_REDUCE)
        arrived.params, arrived.elements = [], 0


@patch
def steady_chunks(model, recorded: bool) -> None:
    """Let the chunks of a `GeminiDDP` model that are not offloaded keep their memory.

    Why: a chunk is gathered into new memory and cut into new memory several times a step, also where one
    rank holds the whole of it, so that a step cannot be recorded as a CUDA graph; and each bf16 gradient is
    searched for infinities that nobody asks for.
    Library: zero/gemini/chunk/chunk.py, Chunk.__gather, __scatter, reduce and has_inf_or_nan, colossalai
    0.5.0. Can go when a shard stays where it is.

    Args:
        recorded: whether steps are recorded; shards of several ranks then take more memory.
    """
    whole, shard = _chunk_classes()
    for param in model.fp16_params:
        chunk = model.chunk_manager.get_chunk(param)
        if chunk.keep_gathered or _is_offloaded(model, chunk):
            continue
        if chunk.pg_size == 1:
            chunk.__class__ = whole
        elif recorded:
            chunk.__class__ = shard


@cache
def _chunk_classes() -> tuple[type, type]:
    """-> (a chunk of one rank, a shard of several ranks)"""
    from colossalai.zero.gemini.chunk import Chunk

    class QuietChunk(Chunk):
        cuda_shard: torch.Tensor | None
        cuda_global_chunk: torch.Tensor | None
        is_gathered: bool

        @property
        def has_inf_or_nan(self) -> bool:
            """Asked for after each reduction; only the fp16 loss scaler uses the answer."""
            return super().has_inf_or_nan if self.dtype == torch.float16 else False

    class WholeChunk(QuietChunk):
        """Of one rank: its shard is the whole chunk, so gathering and cutting copy nothing."""

        def _Chunk__gather(self, async_op: bool = False) -> None:
            if not self.is_gathered:
                self.cuda_global_chunk, self.cuda_shard, self.is_gathered = self.cuda_shard, None, True

        def _Chunk__scatter(self) -> None:
            if self.is_gathered:
                self.cuda_shard, self.is_gathered = self.cuda_global_chunk, False

    class SteadyShard(QuietChunk):
        """Of several ranks: the shard is kept while the chunk is gathered, the next one copied into it."""

        kept: torch.Tensor | None = None

        def access_chunk(self, async_access: bool = False):
            self.kept = self.cuda_shard if self.cuda_shard is not None else self.kept
            return super().access_chunk(async_access)

        def release_chunk(self) -> None:
            super().release_chunk()
            self.keep()

        def reduce(self, async_op: bool = False) -> None:
            super().reduce(async_op)
            self.wait_async_reduce()
            self.keep()

        def keep(self) -> None:
            if self.cuda_shard is not None and self.cuda_shard is not self.kept:
                self.cuda_shard = self.kept.copy_(self.cuda_shard)

    return WholeChunk, SteadyShard
