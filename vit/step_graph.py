"""Records train steps and evaluations as CUDA graphs and replays them: one launch for hundreds of kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from vit.distributed import device


class StepGraph:
    """Replays a train step: forward, backward and gradient reduction, and where they can be recorded clipping
    and the optimizer's step; and the forward pass of an evaluation.

    After PyTorch's notes on CUDA graphs ("Whole-network capture", "Usage with DistributedDataParallel"). Each
    combination of shapes and types has its own graph; all use the same memory, one after the other.

    It must be freed before the process group is left and before the plugin is freed: NCCL destroys no
    communicator that a graph uses, but waits for the graph, without an end.

    Args:
        optimizer: its ``param_groups`` have the learning rates; a recorded step of it must be capturable.
        stream: on which the model was made parallel; the default stream cannot be captured.
    """

    # Steps before the first recording: the first ones initialise buffers, and DistributedDataParallel runs
    # its timers in the first ten.
    WARM_UP = 11
    # Batches of evaluations before: the first one compiles. All have one shape.
    WARM_UP_EVALUATION = 11

    def __init__(self, optimizer, stream: torch.cuda.Stream):
        self.optimizer, self.stream = optimizer, stream
        self.steps = self.evaluated = 0
        self.recorded = {}  # shapes and types -> (graph, its inputs, its result)
        self.pool = None  # the graphs' memory
        # what a recorded step reads beside the batch: the scale, and the learning rate of each group
        self.scale = torch.zeros((), device=device())
        self.rates = [torch.zeros((), device=device()) for _ in optimizer.param_groups]

    def __call__(self, update: Callable, batch: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
        """Run ``update`` on one batch. -> scalar on the device

        Args:
            update: what is recorded, (batches, scale of the loss) -> scalar on the device; the same in every
                call. It must not synchronise with the device, must draw random numbers from torch's default
                generator only, and must leave nothing behind in memory that it allocated.
        """
        self.steps += 1
        if self.steps <= self.WARM_UP:
            return self._aside(lambda: update([batch], scale))
        kind = tuple((tensor.shape, tensor.dtype) for tensor in batch.values())
        if kind not in self.recorded:
            with self._rates_on_device():
                self.recorded[kind] = self._record(lambda copies: update([copies], self.scale), batch)
        self.scale.fill_(scale)
        for rate, group in zip(self.rates, self.optimizer.param_groups):
            rate.fill_(group["lr"])
        return self._replay(kind, batch)

    def evaluate(self, forward: Callable, pixels: torch.Tensor) -> torch.Tensor:
        """``forward``, pixels (N, 3, H, W) -> logits (N, C), of one batch; the same in every call.

        Recorded only where train steps are: who does not train frees no graphs.
        """
        self.evaluated += 1
        if self.steps <= self.WARM_UP or self.evaluated <= self.WARM_UP_EVALUATION:
            return self._aside(lambda: forward(pixels))
        batch, kind = {"pixels": pixels}, ("evaluation", pixels.shape, pixels.dtype)
        if kind not in self.recorded:
            self.recorded[kind] = self._record(lambda copies: forward(copies["pixels"]), batch)
        return self._replay(kind, batch)

    def _aside(self, work: Callable) -> torch.Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """The optimizer reads its learning rates from ``self.rates``, where later steps change them."""
        groups = self.optimizer.param_groups
        usual = [dict(group) for group in groups]
        for group, rate in zip(groups, self.rates):
            group.update(lr=rate, capturable=True)
        try:
            yield
        finally:
            for group, values in zip(groups, usual):
                group.clear()
                group.update(values)

    def _record(self, work: Callable, batch: dict) -> tuple[torch.cuda.CUDAGraph, dict, torch.Tensor]:
        """-> graph of ``work`` on copies of the batch's tensors, the copies, its result"""
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's threads query CUDA events during the capture
        capture = dict(stream=self.stream, capture_error_mode="thread_local", pool=self.pool)
        with torch.cuda.graph(graph, **capture):
            result = work(dict(inputs))
        self.pool = graph.pool()
        return graph, inputs, result

    def _replay(self, kind: tuple, batch: dict) -> torch.Tensor:
        graph, inputs, result = self.recorded[kind]
        torch._foreach_copy_(list(inputs.values()), list(batch.values()))
        graph.replay()
        return result.clone()  # the next replay overwrites it
