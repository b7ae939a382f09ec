"""An exponential moving average of the weights, for every plugin and layout."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Averages what this process holds of the weights: all of them, its tensor-parallel slices, or its pipeline stage's.

    The average of a slice is the slice of the average, so no process asks another for anything. Kept in fp32, beside
    the weights.

    Args:
        tensors: -> (the tensors that the forward pass reads, their fp32 originals or the same again), always in one order.
            Asked anew each time, for a plugin may move them.
        decay: the average after a step is ``decay`` of itself and ``1 - decay`` of the new weights.
    """

    def __init__(self, tensors: Callable[[], tuple[list[torch.Tensor], list[torch.Tensor]]], decay: float):
        self.tensors = tensors
        self.blend = get_ema_multi_avg_fn(decay)
        self.averages = [original.detach().float().clone() for original in tensors()[1]]

    @torch.no_grad()
    def update(self) -> None:
        """After every optimizer step."""
        self.blend(self.averages, [original.float() for original in self.tensors()[1]], None)

    @contextmanager
    @torch.no_grad()
    def applied(self):
        """The weights are their averages inside."""
        weights, _ = self.tensors()
        kept = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, self.averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self.tensors()[0], kept)

    def load(self, averages: list[torch.Tensor]) -> None:
        for average, saved in zip(self.averages, averages, strict=True):
            average.copy_(saved)
