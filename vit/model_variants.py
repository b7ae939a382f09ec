"""Variants of a ViT for training from scratch: drop path, mean pooling, fixed positions, initial weights."""

import torch
from torch import nn

from vit.modules import branch_dropouts, numbered_layers, output_projection, qkv_projections, self_attention


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): a branch of a layer is left out, for each image by itself.

    torchvision's StochasticDepth does the same, but has its rate as a number, for each of which a layer is
    compiled: 24 s more for ViT-Lite-7/4 on an H100, and from the ninth layer on nothing is compiled.

    Args:
        rate: probability that the branch is left out.
    """

    def __init__(self, rate: float, device: torch.device):
        super().__init__()
        self.keep = torch.tensor(1.0 - rate, device=device)  # no buffer: gemini would save it with the model

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """(N, tokens, hidden) -> the same; what is kept is divided by its probability"""
        if not self.training:
            return branch
        factors = (torch.rand(len(branch), device=self.keep.device) < self.keep) / self.keep
        return branch * factors[:, None, None].to(branch.dtype)


def add_drop_path(model: nn.Module, rate: float, layers: int) -> None:
    """Let each image skip attention or MLP branches at random, in place: see `DropPath`.

    Args:
        model: after boosting, because sharding replaces the modules that are changed here.
        rate: probability in the last of ``layers`` layers; it falls linearly to 0 in the first.
    """
    device = next(model.parameters()).device
    for number, layer in numbered_layers(model).items():
        for module in branch_dropouts(layer):
            drop = DropPath(rate * number / max(1, layers - 1), device)
            module.dropout = nn.Sequential(module.dropout, drop)


@torch.no_grad()
def sincos_position_embeddings_(model: nn.Module) -> None:
    """Set fixed (not trained) position embeddings: sines and cosines of each patch's coordinates. In place.

    Half of the channels encode x, half y, as in Beyer et al., 2022 (after MoCo v3); a class token gets zeros.
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
    """Initialise attention similar to that of pretrained ViTs, from torch's current seed, in place.

    Trockman and Kolter, 2023, "Mimetic initialization of self-attention layers" (arXiv:2305.09828), with
    their numbers for ViTs. In each head the product of query and key weights is near the identity, so that a
    patch attends to similar ones; the product of value and output weights is near the negative identity. The
    method needs position embeddings that show distance, so learned ones start from sines and cosines.
    """
    config = model.config
    hidden, width = config.hidden_size, config.hidden_size // config.num_attention_heads

    def factors(noise: float, identity: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Two (hidden, hidden) matrices of equal norm; their product is noise plus the scaled identity."""
        draws = torch.empty(hidden, hidden).uniform_(-1, 1) * (3 / hidden) ** 0.5
        left, sizes, right = torch.linalg.svd(noise * draws + identity * torch.eye(hidden))
        return left * sizes.sqrt(), sizes.sqrt()[:, None] * right

    for layer in numbered_layers(model).values():
        query, key, value = qkv_projections(self_attention(layer))
        for rows in torch.arange(hidden).split(width):
            left, right = factors(0.7, 0.7)
            # the best approximation of the product by matrices of one head's width
            query.weight[rows], key.weight[rows] = left[:, :width].T, right[:width]
        left, right = factors(0.4, -0.4)
        output_projection(layer).weight.copy_(left)
        value.weight.copy_(right)
    positions = model.base_model.embeddings.position_embeddings
    learned = positions.requires_grad
    sincos_position_embeddings_(model)
    positions.requires_grad_(learned)


def initialise(model: nn.Module, positions: str = "learned", weights: str = "usual") -> None:
    """Apply POSITIONS (learned, sincos) and INITIAL_WEIGHTS (usual, mimetic) of a config, in place."""
    if positions == "sincos":
        sincos_position_embeddings_(model)
    if weights == "mimetic":
        mimetic_init(model)
