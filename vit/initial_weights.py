"""Initial weights from torch's current seed, the same with every release of transformers.

Releases differ in distribution and order of the draws. Here both are those of transformers 4.51: weights from
a truncated normal distribution (Dosovitskiy et al., 2021), biases 0. So a seed means one set of weights.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from vit.modules import order_parameters


@torch.no_grad()
def build_vit(config) -> nn.Module:
    """The image classifier of a HuggingFace config, with random initial weights from torch's current seed."""
    model = empty_vit(config)
    for part in (model.base_model, model.classifier):
        _draw_as_constructors(part)
        _draw_weights(part, config.initializer_range)
    return model


def empty_vit(config) -> nn.Module:
    """The same with biases 0, scales of LayerNorms 1, and undefined weights."""
    from transformers import AutoModelForImageClassification

    with torch.device("meta"):  # nothing is drawn
        model = AutoModelForImageClassification.from_config(config)
    model = order_parameters(model.to_empty(device="cpu"))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1:
                param.fill_(0 if name.endswith("bias") else 1)
    return model


@torch.no_grad()
def draw_classifier(model: nn.Module, new: bool) -> None:
    """New weights for the classifier of a pretrained model, in place, if it is to be ``new``.

    Transformers 4.51 draws embeddings before it loads those of the file, so that is done in both cases.
    """
    _draw_embeddings(model.base_model.embeddings)
    if new:
        weight = model.classifier.weight
        weight.copy_(truncated_normal(weight.shape, model.config.initializer_range))
        model.classifier.bias.zero_()


def truncated_normal(shape: torch.Size, std: float) -> torch.Tensor:
    """Draws of torch 2.5's `trunc_normal_` with its bounds -2 and 2; later releases draw other numbers."""
    return torch.empty(shape).uniform_(-1, 1).erfinv_().mul_(std * math.sqrt(2)).clamp_(-2, 2)


def _draw_weights(module: nn.Module, std: float) -> None:
    """Initial values in the order of 4.51: children before their module."""
    for child in module.children():
        _draw_weights(child, std)
    weights = []
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        weights.append(module.weight)
        if module.bias is not None:
            module.bias.zero_()
    elif hasattr(module, "position_embeddings"):
        weights += [module.position_embeddings, *([module.cls_token] if hasattr(module, "cls_token") else [])]
    for weight in weights:
        weight.copy_(truncated_normal(weight.shape, std))


def _draw_as_constructors(part: nn.Module) -> None:
    """Constructors draw weights that are replaced. Those draws come first, so they are made here too."""
    if hasattr(part, "embeddings"):
        _draw_embeddings(part.embeddings, part.embeddings.patch_embeddings.projection)
    for module in part.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


def _draw_embeddings(embeddings: nn.Module, projection: nn.Module | None = None) -> None:
    if hasattr(embeddings, "cls_token"):
        torch.randn(embeddings.cls_token.shape)
    if projection is not None:
        projection.reset_parameters()
    torch.randn(embeddings.position_embeddings.shape)
