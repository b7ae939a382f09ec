"""PyTorch's FullyShardedDataParallel through Booster, with our parameter groups and on a CPU too."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from colossalai.booster.plugin.torch_fsdp_plugin import FSDPOptimizerWrapper, TorchFSDPModel, TorchFSDPPlugin
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from vit.distributed import device
from vit.modules import numbered_layers, with_first_names
from vit.parallel.boosted import BoostedModel


class ShardedOptimizer(FSDPOptimizerWrapper):
    """Clips to the norm over all ranks; Booster's own class clips to that of this rank's shards."""

    def clip_grad_by_norm(self, max_norm: float, *args, **kwargs) -> torch.Tensor:
        return self.model.module.clip_grad_norm_(max_norm)


class FSDPPlugin(TorchFSDPPlugin):
    """Booster's plugin, but each transformer layer is a unit of its own, and the optimizer keeps its groups.

    Booster's `configure` asks for a CUDA device and makes a new optimizer with one group. With
    use_orig_params the parameters stay the same objects, so the optimizer that was built for the model
    stays valid.
    """

    def __init__(self, precision: str):
        half = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        super().__init__(mixed_precision=half if precision == "bf16" else None)

    def supported_devices(self) -> list[str]:
        return ["cuda", "cpu"]

    def supported_precisions(self) -> list[str]:
        return ["fp32", "bf16"]

    def configure(self, model, optimizer=None, criterion=None, dataloader=None, lr_scheduler=None):
        layer = type(numbered_layers(model)[0])
        options = self.fsdp_kwargs | {"auto_wrap_policy": ModuleWrapPolicy({layer}), "use_orig_params": True}
        wrapped = TorchFSDPModel(model, device_id=device(), **options)
        return wrapped, ShardedOptimizer(optimizer, wrapped), criterion, dataloader, lr_scheduler


class BoostedFSDP(BoostedModel):
    """Each rank keeps one flat fp32 shard of every unit's parameters."""

    def shards(self) -> list[torch.Tensor]:
        handles = (module._handle for module in FSDP.fsdp_modules(self.model))
        flat = [handle.flat_param for handle in handles if handle is not None]
        # before the first forward pass the parameter itself is the shard
        return [getattr(param, "_local_shard", param.data) for param in flat]

    def reshard(self) -> None:
        """Free the gathered parameters of the root, which a forward pass without a backward one leaves there.

        The next forward pass gathers them again; it would use old values otherwise.
        """
        for handle in (module._handle for module in FSDP.fsdp_modules(self.model)):
            # one rank has nothing to gather, and before the first forward pass nothing was gathered yet
            if handle and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):
                handle.reshard(free_unsharded_flat_param=True)

    def weight_tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        shards = self.shards()
        return shards, shards

    @contextmanager
    def ema_weights(self):
        with super().ema_weights():
            self.reshard()
            yield
        self.reshard()

    def master_weights(self) -> list[torch.Tensor]:
        return self.shards()

    def model_state(self) -> dict:
        return {}  # the shards are the master weights

    def load_weights(self, state: dict) -> None:
        for shard, saved in zip(self.shards(), state["masters"], strict=True):
            shard.copy_(saved)
        self.reshard()

    def gather_state_dict(self, scratch: Path) -> dict | None:
        """As `BoostedModel.gather_state_dict`, but not by Booster, whose way ends in a segmentation fault
        on a CPU.
        """
        module = self.model.module
        with self.ema_weights(), FSDP.summon_full_params(module, writeback=False):
            named = (
                (name.replace("_fsdp_wrapped_module.", ""), param)
                for name, param in module.named_parameters()
            )
            state = {name: param.detach().cpu().clone() for name, param in named}
        return with_first_names(state) if dist.get_rank() == 0 else None
