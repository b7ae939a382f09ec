"""A boosted model: what training and checkpoints need of a plugin."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from vit.layout import ParallelLayout
from vit.optim import WeightEMA

DDP = ("torch_ddp", "torch_ddp_fp16", "none")  # every process holds the whole model and optimizer


@dataclass
class BoostedModel:
    """A model and its optimizer under a plugin, and the few things that differ between plugins."""

    booster: object
    model: nn.Module
    optimizer: object
    layout: ParallelLayout
    plugin: str
    zero_stage: int
    clip_here: float  # clip to this norm in the train step; 0: the plugin clips by itself, or nothing clips
    can_defer_sync: bool  # whether all but the last micro-step may skip the gradient reduction
    graph_stream: torch.cuda.Stream | None = (
        None  # where whole steps are recorded as CUDA graphs; None: they are not
    )
    average: WeightEMA | None = None  # of the weights, over the steps

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
        self.average = WeightEMA(self._weights, decay)

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
