"""Records a complete train step as a CUDA graph and replays it: one launch, not hundreds of kernels."""

from collections.abc import Callable

import torch

from vit.distributed import device


class StepGraph:
    """Replays ``update``: forward, backward, gradient reduction, clipping and the optimizer step.

    After PyTorch's notes on CUDA graphs ("Whole-network capture", "Usage with DistributedDataParallel"). Each
    combination of shapes, types and scale has its own graph. The last step of an epoch, which has padding,
    runs without a graph.

    Args:
        update: (batches, scale) -> scalar on the device. Must not synchronise with the device, and must draw
            random numbers from torch's default generator only.
        optimizer: its ``param_groups`` have the learning rates; its step must be capturable.
        stream: on which the model was made parallel; the default stream cannot be captured.
    """

    # Steps before the first recording: the first ones initialise buffers, and DistributedDataParallel runs
    # its timers in the first ten.
    WARM_UP = 11

    def __init__(self, update: Callable, optimizer, stream: torch.cuda.Stream):
        self.update, self.optimizer, self.stream = update, optimizer, stream
        self.steps = 0
        self.recorded = {}  # (scale, shapes and types) -> (graph, its inputs, its result)
        # the recorded optimizer step reads its learning rates from these tensors
        self.rates = [torch.zeros((), device=device()) for _ in optimizer.param_groups]

    def __call__(self, batch: dict[str, torch.Tensor], scale: float, replayable: bool) -> torch.Tensor:
        """Run ``update`` on one batch. -> scalar on the device

        Args:
            replayable: whether the step has the usual form, without padding, so that recording it pays.
        """
        self.steps += 1
        if not replayable or self.steps <= self.WARM_UP:
            return self._aside(lambda: self.update([batch], scale))
        kind = (scale, *((tensor.shape, tensor.dtype) for tensor in batch.values()))
        if kind not in self.recorded:
            self.recorded[kind] = self._record(batch, scale)
        graph, inputs, result = self.recorded[kind]
        torch._foreach_copy_(list(inputs.values()), list(batch.values()))
        for rate, group in zip(self.rates, self.optimizer.param_groups):
            rate.fill_(group["lr"])
        graph.replay()
        return result.clone()  # the next replay overwrites it

    def _aside(self, work: Callable) -> torch.Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _record(
        self, batch: dict[str, torch.Tensor], scale: float
    ) -> tuple[torch.cuda.CUDAGraph, dict, torch.Tensor]:
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        graph, groups = torch.cuda.CUDAGraph(), self.optimizer.param_groups
        usual = [dict(group) for group in groups]
        for group, rate in zip(groups, self.rates):
            group.update(lr=rate, capturable=True)
        try:
            # thread_local: NCCL's threads query CUDA events during the capture
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                result = self.update([dict(inputs)], scale)
        finally:
            for group, values in zip(groups, usual):
                group.clear()
                group.update(values)
        return graph, inputs, result
