"""One train step and one evaluation, the same for every plugin and layout."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from vit.data.transforms import fork_rng_for


@dataclass
class Normalize:
    """uint8 pixels (N, 3, H, W) to the model's floats, on the device: (x / 255 - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, std = (_channel_tensor(values, pixels.device) for values in (self.mean, self.std))
        return (pixels - mean).div_(std)  # one float copy of the batch


@cache
def _channel_tensor(values: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """(1, 3, 1, 1) on the device, in units of 1.

    Kept, for sending it makes the CPU wait until the GPU has caught up.
    """
    return 255 * torch.tensor(values, device=device).view(1, 3, 1, 1)


class Mixup:
    """MixUp (Zhang et al., 2018) and CutMix (Yun et al., 2019) of a batch, one of the two at random, by
    torchvision.

    Args:
        mixup, cutmix: alpha of the Beta distribution of the mixing ratio; 0: never.
        num_labels: true number of classes.
        seed: with the step it decides every draw.
        group: number of the data-parallel group; others draw otherwise.
    """

    def __init__(self, mixup: float, cutmix: float, num_labels: int, seed: int, group: int):
        from torchvision.transforms import v2

        kinds = {v2.MixUp: mixup, v2.CutMix: cutmix}
        self.transform = v2.RandomChoice(
            [kind(alpha=alpha, num_classes=num_labels) for kind, alpha in kinds.items() if alpha]
        )
        self.seed, self.group = seed, group

    def __call__(
        self, pixels: torch.Tensor, labels: torch.Tensor, step: int, micro_step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Floats (N, 3, H, W) and labels (N,) -> mixed floats, and a probability for each class (N,
        num_labels).
        """
        with fork_rng_for(self.seed, step, micro_step, self.group):
            return self.transform(pixels, labels)


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

    def __call__(self, batch: dict[str, torch.Tensor], scale: float, regular: bool) -> torch.Tensor:
        """``update`` of one batch. ``regular``: a step as most are, worth recording."""
        self.steps += 1
        if not regular or self.steps <= self.WARM_UP:
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
