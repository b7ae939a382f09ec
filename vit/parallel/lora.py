"""LoRA (Hu et al., 2021): small matrices beside query and value are trained, not the weights themselves.

A layer computes W x + alpha / rank * B (A x): A is (rank, inputs), B is (outputs, rank) and starts at 0.
PEFT puts them into the model, through Booster's `enable_lora`; the export adds them to the weights.
"""

from __future__ import annotations

import torch
from torch import nn

from vit.modules import numbered_layers, qkv_projections, self_attention

A, B = ".lora_A.default.weight", ".lora_B.default.weight"  # PEFT's names


def lora_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The query and value projections of all layers, by name."""
    layers = numbered_layers(model).values()
    chosen = {id(qkv_projections(self_attention(layer))[i]) for layer in layers for i in (0, 2)}
    return {name: module for name, module in model.named_modules() if id(module) in chosen}


def lora_parameters(model: nn.Module, rank: int) -> int:
    """The number of parameters that LoRA of this rank would add to ``model``."""
    return sum(rank * (m.in_features + m.out_features) for m in lora_modules(model).values())


def lora_scale(settings) -> float:
    """alpha / rank; 1 if no alpha is given."""
    return 1.0 if settings.lora_alpha is None else settings.lora_alpha / settings.lora_rank


def add_lora(booster, model: nn.Module, settings) -> nn.Module:
    """``model`` as PEFT wraps it: LoRA of query and value and the classifier are trained, all else is not.

    The matrices A are drawn from ``settings.seed``, on every rank the same.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=lora_scale(settings) * settings.lora_rank,
        target_modules=list(lora_modules(model)),
    )
    torch.manual_seed(settings.seed)
    wrapped = booster.enable_lora(model, lora_config=config)
    model.classifier.requires_grad_(True)
    return wrapped


def base_name(name: str) -> str:
    """The name of a parameter before PEFT wrapped the model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


@torch.no_grad()
def merge_lora(state: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """A state dict without LoRA: W + scale * B A in place of each W, in fp32. Others stay as they are."""
    merged = {name: tensor for name, tensor in state.items() if not name.endswith((A, B))}
    for name in (name.removesuffix(A) for name in state if name.endswith(A)):
        first, second = state[name + A].float(), state[name + B].float()
        merged[f"{name}.weight"] = state[f"{name}.weight"].float() + scale * (second @ first)
    return merged
