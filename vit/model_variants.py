"""Changes to a ViT for training from scratch: drop path, mean pooling, fixed positions, initial weights."""

import re

import torch
from torch import nn


def add_drop_path(model: nn.Module, rate: float, layers: int) -> None:
    """Stochastic depth (Huang et al., 2016): in training an image skips a layer's attention, and its MLP,
    at random.

    Args:
        model: boosted already, for sharding puts other modules in the place of those changed here.
        rate: chance in the last of ``layers``; falls linearly to 0 in the first.
    """
    from torchvision.ops import StochasticDepth

    for name, module in model.named_modules():
        if layer := re.search(r"\.layer\.(\d+)\.(attention\.)?output$", name):
            # the last thing that happens to a branch before it is added
            module.dropout = nn.Sequential(
                module.dropout, StochasticDepth(rate * int(layer[1]) / max(1, layers - 1), "row")
            )


def mean_pooled_config(config):
    """The same sizes without a class token, the mean of the patches classified.

    In transformers that is I-JEPA's ViT (Assran et al., 2023).
    """
    from transformers import IJepaConfig

    return IJepaConfig(
        **{
            name: value
            for name, value in config.to_dict().items()
            if name not in ("model_type", "encoder_stride", "transformers_version")
        }
    )


@torch.no_grad()
def sincos_position_embeddings_(model: nn.Module) -> None:
    """Sines and cosines of each patch's place as position embeddings, not trained, in place.

    Half of the channels tell x, half y, as in Beyer et al., 2022 (after MoCo v3); a class token has zeros.
    """
    positions = model.base_model.embeddings.position_embeddings  # (1, [1 +] patches, hidden)
    side, quarter = model.config.image_size // model.config.patch_size, positions.shape[-1] // 4
    frequencies = 10000 ** -(torch.arange(quarter) / (quarter - 1))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    x, y = (place.flatten()[:, None] * frequencies for place in (x, y))
    positions.zero_()
    positions[0, -side * side :] = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
    positions.requires_grad_(False)


@torch.no_grad()
def mimetic_init(model: nn.Module) -> None:
    """Initial weights of attention as pretrained ViTs have them, from torch's current seed, in place.

    Trockman and Kolter, 2023, "Mimetic initialization of self-attention layers" (arXiv:2305.09828): in each
    head queries times
    keys are near the identity, so that a patch looks at those like itself, and values times the output
    projection near its
    negative. Their numbers for ViTs. It asks for positions that tell near from far: learned ones start as
    sines and cosines.
    """
    config = model.config
    hidden, width = config.hidden_size, config.hidden_size // config.num_attention_heads

    def factors(noise: float, identity: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Two (hidden, hidden) matrices, whose product is noise plus a multiple of the identity, both the
        same in size
        """
        draws = torch.empty(hidden, hidden).uniform_(-1, 1) * (3 / hidden) ** 0.5
        left, sizes, right = torch.linalg.svd(noise * draws + identity * torch.eye(hidden))
        return left * sizes.sqrt(), sizes.sqrt()[:, None] * right

    for layer in model.base_model.encoder.layer:
        attention, output = layer.attention.attention, layer.attention.output.dense
        for rows in torch.arange(hidden).split(width):
            left, right = factors(0.7, 0.7)
            attention.query.weight[rows], attention.key.weight[rows] = (
                left[:, :width].T,
                right[:width],
            )  # the largest part of it
        left, right = factors(0.4, -0.4)
        output.weight.copy_(left)
        attention.value.weight.copy_(right)
    positions = model.base_model.embeddings.position_embeddings
    learned = positions.requires_grad
    sincos_position_embeddings_(model)
    positions.requires_grad_(learned)


def initialise(model: nn.Module, positions: str = "learned", weights: str = "usual") -> None:
    """The position embeddings and initial weights that a config file names, in place."""
    if positions == "sincos":
        sincos_position_embeddings_(model)
    if weights == "mimetic":
        mimetic_init(model)
