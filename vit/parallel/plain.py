"""Plain PyTorch behind the interface of a Booster: the baseline that plugins are compared with."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn

from vit.distributed import device
from vit.parallel.plugins import INITIAL_LOSS_SCALE


class PlainOptimizer:
    """A torch optimizer with the methods of Booster's optimizer wrappers."""

    def __init__(self, optim: torch.optim.Optimizer, fp16: bool):
        self.optim = optim
        self.scaler = torch.amp.GradScaler(device().type, init_scale=INITIAL_LOSS_SCALE, enabled=fp16)

    @property
    def param_groups(self) -> list[dict]:
        return self.optim.param_groups  # not stored: load_state_dict makes new ones

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clip_grad_by_norm(self, max_norm: float) -> None:
        self.scaler.unscale_(self.optim)
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], max_norm)

    def step(self) -> None:
        self.scaler.step(self.optim)
        self.scaler.update()

    def zero_grad(self) -> None:
        self.optim.zero_grad()


class PlainModel(nn.Module):
    """Autocast around a model, and DistributedDataParallel if ``parallel``."""

    def __init__(self, module: nn.Module, precision: str, parallel: bool):
        super().__init__()
        module = module.to(device())
        if parallel:
            module = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
        self.module = module
        self.dtype = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]

    def unwrap(self) -> nn.Module:
        return (
            self.module.module
            if isinstance(self.module, nn.parallel.DistributedDataParallel)
            else self.module
        )

    def forward(self, *args, **kwargs):
        with torch.autocast(device().type, dtype=self.dtype) if self.dtype else nullcontext():
            return self.module(*args, **kwargs)


class PlainBooster:
    """The two Booster calls that training and export make."""

    plugin = None

    def backward(self, loss: torch.Tensor, optimizer: PlainOptimizer) -> None:
        optimizer.backward(loss)

    def save_model(self, model: PlainModel, path: str, shard: bool = False) -> None:
        if dist.get_rank() == 0:
            torch.save(model.unwrap().state_dict(), path)


def boost_plain(model: nn.Module, optimizer: torch.optim.Optimizer, settings) -> tuple:
    """-> (booster, model, optimizer), as `Booster.boost` with a plugin would give them."""
    model = PlainModel(model, settings.precision, parallel=settings.layout.world_size > 1)
    return PlainBooster(), model, PlainOptimizer(optimizer, fp16=settings.precision == "fp16")


def bf16_autocast():
    """A MixedPrecision for Booster.

    Its own BF16MixedPrecision is abstract (booster/mixed_precision/bf16.py).
    """
    from colossalai.booster.mixed_precision import MixedPrecision
    from colossalai.interface import ModelWrapper

    class AutocastModel(ModelWrapper):
        def forward(self, *args, **kwargs):
            with torch.autocast(device().type, dtype=torch.bfloat16):
                return self.module(*args, **kwargs)

    class Autocast(MixedPrecision):
        def configure(self, model, optimizer=None, criterion=None):
            return AutocastModel(model), optimizer, criterion

    return Autocast()
