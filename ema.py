"""An exponential moving average of the weights, for every plugin and layout."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Averages what this process holds of the weights: all of them, its tensor-parallel slices, or its
    pipeline stage's.

    The average of a slice is the slice of the average, so no process asks another for anything. Kept in
    fp32, beside
    the weights.

    Args:
        tensors: -> (the tensors that the forward pass reads, their fp32 originals or the same again),
            always in one order.
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
        kept = [[tensor.clone() for tensor in tensors] for tensors in self._held()]
        for tensors in self._held():
            torch._foreach_copy_(tensors, self.averages)
        try:
            yield
        finally:
            for tensors, values in zip(self._held(), kept):
                torch._foreach_copy_(tensors, values)

    def _held(self) -> list[list[torch.Tensor]]:
        """The weights, and their originals where they are others: gemini's export reads those."""
        weights, originals = self.tensors()
        return [weights] if originals is weights else [weights, originals]

    def load(self, averages: list[torch.Tensor]) -> None:
        for average, saved in zip(self.averages, averages, strict=True):
            average.copy_(saved)
