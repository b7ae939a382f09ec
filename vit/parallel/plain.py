"""Plain PyTorch behind the interface of a Booster: the baseline that plugins are compared with."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn

from vit.distributed import device

# Loss scale at the first fp16 step. The published runs start at 32 (zero, gemini) and 1 (hybrid_parallel);
# 1 loses small gradients to underflow, the library's 2**32 skips the first twenty steps, and torch's
# 2**16 the first on
# four processes.
INITIAL_LOSS_SCALE = 2**8


class PlainOptimizer:
    """What Booster's optimizer wrappers offer, around a plain torch optimizer.

    The reference the plugins are held against.
    """

    def __init__(self, optim: torch.optim.Optimizer, fp16: bool):
        self.optim = optim
        self.scaler = torch.amp.GradScaler(device().type, init_scale=INITIAL_LOSS_SCALE, enabled=fp16)

    @property
    def param_groups(self) -> list[dict]:
        return self.optim.param_groups  # load_state_dict makes them anew

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
    """autocast around a model (DistributedDataParallel when there are several processes)."""

    def __init__(self, module: nn.Module, precision: str, parallel: bool):
        super().__init__()
        module = module.to(device())
        self.module = (
            nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True) if parallel else module
        )
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
    """PyTorch without Colossal-AI (`--plugin none`), behind the two Booster calls that the engine makes."""

    plugin = None

    def backward(self, loss: torch.Tensor, optimizer: PlainOptimizer) -> None:
        optimizer.backward(loss)

    def save_model(self, model: PlainModel, path: str, shard: bool = False) -> None:
        if dist.get_rank() == 0:
            torch.save(model.unwrap().state_dict(), path)
