"""A whole train step recorded once as a CUDA graph and replayed.

One start, where a step of small kernels has hundreds.
"""

from collections.abc import Callable

import torch


class StepGraph:
    """Replays ``update``: forward, backward, the reduction over the processes, clipping and the optimizer's
    step.

    After PyTorch's notes on CUDA graphs ("Whole-network capture", "Usage with DistributedDataParallel").
    Steps of other
    shapes, kinds or scale have a graph of their own; the last one of an epoch, which has padding, is run as
    it is.

    Args:
        update: (batches, scale) -> a device scalar. Reads nothing back from the device, and draws from
            torch's own
            generator only.
        optimizer: whose ``param_groups`` have the learning rates; its step must be capturable.
        stream: where the model was made parallel; a recording cannot be made on the default stream.
    """

    # steps that are not recorded: the first set things up, and DistributedDataParallel's timers run in
    # ten
    WARM_UP = 11

    def __init__(self, update: Callable, optimizer, stream: torch.cuda.Stream):
        self.update, self.optimizer, self.stream = update, optimizer, stream
        self.steps = 0
        self.recorded = {}  # kind of step -> (graph, its inputs, its result)
        # what the recorded optimizer reads its learning rates from
        self.rates = [torch.zeros((), device=group["params"][0].device) for group in optimizer.param_groups]

    def __call__(self, batch: dict[str, torch.Tensor], scale: float, replayable: bool) -> torch.Tensor:
        """``update`` of one batch. ``replayable``: a step as most are, worth recording."""
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
        return result.clone()  # the next replay writes over it

    def _aside(self, work: Callable) -> torch.Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _record(
        self, batch: dict[str, torch.Tensor], scale: float
    ) -> tuple[torch.cuda.CUDAGraph, dict, torch.Tensor]:
        inputs, graph, groups = (
            {name: tensor.clone() for name, tensor in batch.items()},
            torch.cuda.CUDAGraph(),
            self.optimizer.param_groups,
        )
        usual = [(group["lr"], group["capturable"]) for group in groups]
        for group, rate in zip(groups, self.rates):
            group["lr"], group["capturable"] = rate, True
        try:
            # the threads of NCCL go on asking for its events meanwhile
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                result = self.update([dict(inputs)], scale)
        finally:
            for group, (rate, capturable) in zip(groups, usual):
                group["lr"], group["capturable"] = rate, capturable
        return graph, inputs, result
