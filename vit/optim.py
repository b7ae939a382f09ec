"""Parameter groups, the optimizer, and the exponential moving average of the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vit.console import print_rank0
from vit.modules import layer_number
from vit.muon import Muon
from vit.parallel.plugins import plugin_named


class GeminiAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) for fp32 master weights with fp16 or bf16 gradients.

    Some parameters may be on the CPU (offloaded) and others on the GPU.
    """

    num_fp32_shards_per_param = 4  # weight, gradient, two moments: Gemini's `auto` placement budgets with it

    def __init__(
        self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.scratch = torch.empty(0)  # on the CPU

    @torch.no_grad()
    def step(self, closure=None, div_scale: float = -1) -> None:  # type: ignore[override]
        """One update. ``div_scale`` divides the gradients (loss scale x clipping factor); -1 means 1."""
        for group in self.param_groups:
            for params in buckets([param for param in group["params"] if param.grad is not None]):
                states = [self._state(param) for param in params]
                torch._foreach_add_([state["step"] for state in states], 1)
                gradients = self._gradients(params)
                scale = torch.tensor(float(div_scale), device=params[0].device) if div_scale > 0 else None
                torch._fused_adamw_(
                    [param.data for param in params],
                    gradients,
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                    grad_scale=scale,
                )

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for param, state in self.state.items():  # PyTorch leaves the number of steps where it was saved
            state["step"] = state["step"].to(param.device)

    def _gradients(self, params: list[torch.Tensor]) -> list[torch.Tensor]:
        """The gradients in fp32; on the CPU in memory that each call uses again, because new memory takes
        the system as long as the update itself.
        """
        sizes = [param.numel() for param in params]
        if params[0].device.type == "cpu":
            if self.scratch.numel() < sum(sizes):
                self.scratch = torch.empty(sum(sizes))
            parts = self.scratch[: sum(sizes)].split(sizes)
            gradients = [part.view(param.shape) for part, param in zip(parts, params)]
        else:
            gradients = [torch.empty_like(param) for param in params]
        torch._foreach_copy_(gradients, [param.grad for param in params])
        return gradients

    def _state(self, param: torch.Tensor) -> dict:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


def buckets(tensors: list[torch.Tensor], elements: int = 2**23) -> Iterator[list[torch.Tensor]]:
    """Lists of about ``elements`` elements, each on one device: few kernels, few copies at a time."""
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > elements or tensor.device != bucket[0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


class WeightEMA:
    """Exponential moving average of this rank's part of the weights, in fp32.

    The average of a slice is the slice of the average, so ranks need not communicate. (torch's AveragedModel
    copies the module, which sharded plugins do not allow; its averaging function is used here.)

    Args:
        tensors: returns (model weights, fp32 master weights) in a fixed order; the same list twice if there
            are no separate master weights. Called on every update, because Gemini may reallocate its chunks.
        decay: the average after a step is ``decay`` of itself and ``1 - decay`` of the new weights.
    """

    def __init__(self, tensors: Callable[[], tuple[list[torch.Tensor], list[torch.Tensor]]], decay: float):
        self.tensors = tensors
        self.blend = get_ema_multi_avg_fn(decay)
        self.averages = [original.detach().float().clone() for original in tensors()[1]]

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average. Call after every optimizer step."""
        self.blend(self.averages, [original.float() for original in self.tensors()[1]], None)

    @contextmanager
    @torch.no_grad()
    def applied(self):
        """Context in which the model has the averaged weights."""
        kept = [original.clone() for original in self.tensors()[1]]
        self._set(self.averages)
        try:
            yield
        finally:
            self._set(kept)

    def _set(self, values: list[torch.Tensor]) -> None:
        """Give the model these weights, and the master weights if there are any: gemini exports the latter.

        Gemini's own 16-bit weights cannot be kept and restored: those of an offloaded chunk make room for
        its gradients, until the next forward pass copies the master weights.
        """
        weights, originals = self.tensors()
        torch._foreach_copy_(originals, values)
        if weights is not originals:
            torch._foreach_copy_(weights, values)

    def load(self, averages: list[torch.Tensor]) -> None:
        """Restore averages from a checkpoint."""
        for average, saved in zip(self.averages, averages, strict=True):
            average.copy_(saved)


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, muon: bool = False
) -> list[dict]:
    """Parameter groups of what is trained: matrices get weight decay; biases, LayerNorms and embeddings do
    not.

    Args:
        layer_decay: factor of the learning rate per layer, from the classifier (1) down to the embeddings;
            stored as ``lr_scale`` of a group (Clark et al., 2020; for ViTs Bao et al., 2022).
        muon: put the layers' matrices into groups of their own, with ``muon`` True.
    """
    layers, groups = model.config.num_hidden_layers, {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue  # PEFT's prefix in front of a name of LoRA changes nothing of what follows
        is_matrix = param.ndim > 1 and not name.endswith(("cls_token", "position_embeddings", "pos_embed"))
        layer = layer_number(name)
        depth = layers + 1 if ".embeddings." in name else 0 if layer is None else layers - layer
        scale = layer_decay**depth
        group = {"params": [], "weight_decay": weight_decay * is_matrix, "lr_scale": scale}
        by_muon = muon and is_matrix and layer is not None
        if by_muon:
            group["muon"] = True
        groups.setdefault((scale, is_matrix, by_muon), group)["params"].append(param)
    return [groups[key] for key in sorted(groups, reverse=True)]  # fastest first, matrices before the rest


def build_optimizer(model: nn.Module, settings) -> torch.optim.Optimizer:
    """The optimizer of ``--optimizer``; torch's fused AdamW where Colossal-AI's does not compile."""
    muon, lr = settings.optimizer == "muon", settings.learning_rate
    groups = param_groups(model, settings.weight_decay, settings.layer_decay, muon)
    if muon:
        return Muon(groups, lr=lr)
    if settings.optimizer == "hybrid_adam":
        from colossalai.nn.optimizer import HybridAdam

        try:
            return HybridAdam(groups, lr=lr)
        except Exception as error:  # no nvcc, or one that does not match torch: many types
            reason = str(error).strip().splitlines()[0]
            print_rank0(
                f"  note      HybridAdam's kernels cannot be compiled on this machine ({reason}): "
                "using torch's fused AdamW, the same update"
            )
    if plugin_named(settings.plugin).own_adam:
        from colossalai.zero.gemini import gemini_optimizer

        gemini_optimizer._AVAIL_OPTIM_LIST.add(GeminiAdamW)
        return GeminiAdamW(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, fused=True)
