"""A boosted model: what training and checkpoints need of a plugin."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vit.distributed import device
from vit.layout import ParallelLayout
from vit.modules import load_weights, with_first_names
from vit.optim import WeightEMA
from vit.parallel.lora import merge_lora
from vit.parallel.plugins import Plugin


@dataclass
class BoostedModel:
    """A model and its optimizer as Booster returned them, and the operations that differ between plugins.

    Attributes:
        clip_norm: the train step clips gradients to this norm; 0: the plugin clips by itself, or nobody does.
        graph_stream: stream on which steps are recorded as CUDA graphs; None: they are not recorded.
        graph_updates: whether the graph of a step holds the optimizer's step, too.
        ema: moving average of the weights, if any.
        frozen: parameters that are not trained, in fp32, on rank 0, where the plugin rounds them to 16 bit.
        lora_scale: factor of LoRA's matrices, which the export adds to the weights.
    """

    booster: Any
    model: Any
    optimizer: Any
    layout: ParallelLayout
    plugin: Plugin
    zero_stage: int = 0
    clip_norm: float = 0.0
    graph_stream: torch.cuda.Stream | None = None
    graph_updates: bool = True
    ema: WeightEMA | None = None
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    lora_scale: float = 0.0

    def no_sync(self):
        """Context in which a backward pass leaves gradients unreduced, where the plugin can (for
        accumulation).
        """
        if not self.plugin.can_skip_sync(self.zero_stage):
            return nullcontext()
        if not self.plugin.replicates_model:
            return self.booster.no_sync(self.model, self.optimizer)
        # the plugin's own no_sync does not look through the mixed-precision wrapper
        ddp = next(
            (m for m in self.model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None
        )
        return ddp.no_sync() if ddp is not None else nullcontext()

    # ---- moving average of the weights

    def start_ema(self, decay: float) -> None:
        """Average the weights over the coming steps; evaluation and export use the average."""
        self.ema = WeightEMA(self.weight_tensors, decay)

    def ema_weights(self):
        """Context in which the model has its averaged weights, if there are any."""
        return self.ema.applied() if self.ema else nullcontext()

    def weight_tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """This rank's part of the weights, and their fp32 master weights if the plugin keeps them in equal
        pieces.
        """
        weights = [param.data for param in self.model.parameters()]
        return weights, weights

    # ---- state, for checkpoints

    @property
    def is_sharded(self) -> bool:
        """Whether data-parallel ranks hold different optimizer states."""
        return self.plugin.shards_optimizer(self.zero_stage)

    def master_weights(self) -> list[torch.Tensor]:
        """The fp32 tensors that the optimizer updates, where they are not the model's own parameters."""
        own = {id(param) for param in self.model.parameters()}
        params = [param for group in self.optimizer.optim.param_groups for param in group["params"]]
        return [param.data for param in params if id(param) not in own]

    def model_state(self) -> dict:
        """This rank's state dict of the model."""
        return with_first_names(self.model.unwrap().state_dict())

    def load_weights(self, state: dict) -> None:
        """Restore `model_state` and `master_weights`, in place, from the entries "weights" and "masters"."""
        load_weights(self.model.unwrap(), state["weights"])
        for master, saved in zip(self.master_weights(), state["masters"], strict=True):
            master.copy_(saved)

    def loss_scaler(self):
        """The fp16 loss scaler, wherever the plugin keeps it; None without one."""
        if hasattr(self.optimizer, "scaler"):
            return self.optimizer.scaler
        for name in ("mixed_precision", "mixed_precision_mixin", "mix_precision_mixin"):
            if scaler := getattr(getattr(self.optimizer, name, None), "grad_scaler", None):
                return scaler
        return None

    def dropout_rngs(self) -> list:
        """The random states of tensor-parallel dropout layers, which draw other masks on each rank."""
        return [module.randomizer for module in self.model.modules() if hasattr(module, "randomizer")]

    @torch.no_grad()
    def capture_state(self) -> dict:
        """Everything that this rank holds of model and optimizer, between two steps."""
        scaler = self.loss_scaler()
        kinds = (int, float, torch.Tensor)
        return {
            "weights": self.model_state(),
            "masters": self.master_weights(),
            "averages": self.ema.averages if self.ema else [],
            "optimizer": self.optimizer.optim.state_dict(),
            "scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, kinds)} if scaler else {},
        } | ({"frozen": self.frozen} if self.frozen else {})

    @torch.no_grad()
    def restore_state(self, state: dict) -> None:
        """Inverse of `capture_state`, in place."""
        self.load_weights(state)
        self.optimizer.optim.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load(state["averages"])
        if self.frozen:
            self.frozen = state["frozen"]
        if scaler := self.loss_scaler():
            for name, value in state["scaler"].items():
                current = getattr(scaler, name)
                if isinstance(current, torch.Tensor):
                    current.copy_(value)
                else:
                    setattr(scaler, name, value.to(device()) if isinstance(value, torch.Tensor) else value)

    def merge_shards(self, shards: list[dict]) -> dict:
        """ZeRO shards that another number of ranks saved, cut for this number.

        Every master tensor is one slice of its flattened, zero-padded parameter; so are its moments.
        """
        dp, dp_rank = self.layout.data_parallel_size, self.layout.data_parallel_rank
        params = [param for group in self.optimizer.optim.param_groups for param in group["params"]]

        def slice_of(pieces: list[torch.Tensor], master: torch.Tensor) -> torch.Tensor:
            size = self.optimizer.master_to_working_param[id(master)].numel()
            whole = torch.cat([piece.flatten() for piece in pieces])[:size]
            whole = nn.functional.pad(whole, (0, master.numel() * dp - size))
            return whole.chunk(dp)[dp_rank].clone()

        state = shards[0]
        state["masters"] = [
            slice_of([s["masters"][i] for s in shards], master) for i, master in enumerate(params)
        ]
        for i, master in enumerate(params):
            moments = state["optimizer"]["state"][i]
            for name, value in moments.items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    moments[name] = slice_of([s["optimizer"]["state"][i][name] for s in shards], master)
        return state

    def gather_state_dict(self, scratch: Path) -> dict | None:
        """The state dict of the whole model (of the averaged weights, if any) on rank 0, None elsewhere.
        Collective.

        Gathered by the plugin's own code, through a file in ``scratch`` that is removed again.
        """
        path = scratch / ".weights.partial"
        with self.ema_weights():
            self.booster.save_model(self.model, str(path), shard=False)
        dist.barrier()
        state = None
        if dist.get_rank() == 0:
            state = torch.load(path, map_location="cpu", weights_only=True)
            path.unlink()
            state = merge_lora(with_first_names(state) | self.frozen, self.lora_scale)
        dist.barrier()
        return state


class BoostedGemini(BoostedModel):
    """Gemini keeps weights in 16-bit chunks, each paired with an fp32 one that the optimizer updates."""

    def chunks(self) -> list:
        """The 16-bit chunks in the order of the parameters that they hold."""
        found = {}
        for param in self.model.fp16_params:
            chunk = self.model.chunk_manager.get_chunk(param)
            found[id(chunk)] = chunk
        return list(found.values())

    def weight_tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        chunks = self.chunks()
        return [chunk.payload for chunk in chunks], [chunk.paired_chunk.payload for chunk in chunks]

    def master_weights(self) -> list[torch.Tensor]:
        return [chunk.paired_chunk.payload for chunk in self.chunks()]

    def model_state(self) -> dict:
        return {}  # the weights are the master weights, rounded

    def load_weights(self, state: dict) -> None:
        for chunk, saved in zip(self.chunks(), state["masters"], strict=True):
            chunk.paired_chunk.payload.copy_(saved)
            chunk.payload.copy_(chunk.paired_chunk.payload)
            chunk.cpu_vis_flag = False  # of two copies only the GPU's was changed
