"""Patches of the way through the layers of transformers' ViT: from pixels to logits, with the same
parameters. What happens within attention and the patch embedding is in transformers_vit.py.
"""

from __future__ import annotations

from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vit.model_variants import DropPath
from vit.modules import (
    branch_dropouts,
    has_new_names,
    layer_list,
    mlp_projections,
    numbered_layers,
    output_projection,
    project_output,
    self_attention,
)
from vit.patches import patch
from vit.patches.transformers_vit import any_given, attend, attend_from_class_token, runs_kernels


@patch
def class_token_alone(model: nn.Module) -> None:
    """Let the last layer compute its class token alone: all that the classifier reads.

    Why: what becomes of the other tokens goes nowhere. The class token needs their keys and values, but no
    query of theirs, and no MLP. Logits and gradients are the same up to rounding; 7 % of the matrix products
    of a ViT-B are left out, 11 % of a ViT-Lite-7/4's.
    Library: transformers/models/vit/modeling_vit.py, ViTLayer.forward. Can go when that does it.
    """
    if not hasattr(model.base_model.embeddings, "cls_token"):  # the mean of all tokens is read
        return
    *_, last = numbered_layers(model).values()
    last.forward = MethodType(_run_for_class_token, last)  # type: ignore[method-assign]
    last.for_class_token = True


@patch
def layer_kernels(model: nn.Module, precision: str) -> None:
    """Compute GELU, and residual sums with the LayerNorms after them, by kernels of this project: in 16 bit,
    on a Hopper GPU. Call after `class_token_alone`; not for tensor or pipeline parallelism, FSDP or
    checkpointing.

    Why: the compiler makes several passes over the activations where these kernels make one, and PyTorch's
    own kernels, which gemini has, make more. A step of ViT-B/16 at batch 256 takes 58.0 ms, not 61.4, with
    low_level_zero, and 59.6, not 67.5, with gemini (H200, torch 2.11).
    Library: torch/_inductor, and torch/nn/functional.py, layer_norm and gelu. Can go when these are as fast.
    """
    config = model.config
    fits = config.hidden_act == "gelu" and not config.hidden_dropout_prob and config.hidden_size <= 2048
    if precision == "fp32" or not fits or not runs_kernels():
        return
    from vit.layer_kernels import add_norm, gelu

    for layer in numbered_layers(model).values():
        layer.kernels = add_norm, gelu
        layer.forward = MethodType(_run_by_kernels, layer)  # type: ignore[method-assign]
    model.base_model.runs_by_kernels = True


@patch
def direct_forward(model: nn.Module) -> None:
    """Run embeddings, layers and classifier, and nothing of what transformers does around them.

    Why: since 5.0 each call builds attention masks, which a CUDA graph cannot record, and looks for outputs
    to collect.
    Library: transformers/models/vit/modeling_vit.py, ViTForImageClassification.forward and ViTModel.forward.
    Can go when these can be recorded.
    """
    from transformers.modeling_outputs import ImageClassifierOutput

    def classify(self, pixel_values: torch.Tensor, *args, **kwargs):
        """(N, C, H, W) -> an output whose ``logits`` are (N, labels)"""
        if any_given(args, kwargs):
            return type(self).forward(self, pixel_values, *args, **kwargs)
        base = self.base_model
        hidden_states = _run_layers(base, embed(base, pixel_values))
        if hasattr(base.embeddings, "cls_token"):
            pooled = base.layernorm(hidden_states[:, 0])  # of the class token alone, not of every token
        else:
            pooled = base.layernorm(hidden_states).mean(dim=1)
        return ImageClassifierOutput(logits=self.classifier(pooled))

    model.forward = MethodType(classify, model)  # type: ignore[method-assign]


def embed(base: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, tokens, hidden), in the precision of the weights"""
    return base.embeddings(pixel_values.to(base.embeddings.patch_embeddings.projection.weight.dtype))


class Branch(NamedTuple):
    """What is to be added to hidden states: ``(product + bias) * factors``; at first nothing."""

    product: torch.Tensor | None = None  # (N, tokens, hidden), of a linear layer without its bias
    bias: torch.Tensor | None = None  # (hidden)
    factors: torch.Tensor | None = None  # (N), of each image's drop path; None: 1


def _run_layers(base: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """(N, tokens, hidden) -> (N, tokens, hidden), or (N, 1, hidden) after `class_token_alone`"""
    if not hasattr(base, "runs_by_kernels"):
        for layer in layer_list(base):
            hidden_states = run_layer(base, layer, hidden_states)
        return hidden_states
    layers = list(layer_list(base))
    hidden_states, branch = hidden_states.contiguous(), Branch()  # the kernels need it
    for layer, factors in zip(layers, draw_factors(layers, len(hidden_states)), strict=True):
        hidden_states, branch = layer(hidden_states, branch, factors)
    added = branch.product + branch.bias
    if branch.factors is not None:
        added = added * branch.factors[:, None, None].to(added.dtype)
    return hidden_states + added


def draw_factors(layers: list[nn.Module], images: int) -> list[tuple]:
    """For each layer the factors (N) of its two branches, see `Branch`. In one draw: on a GPU that takes as
    long for one branch as for all.
    """
    ends = [branch_dropouts(layer) for layer in layers]
    paths = [_drop_path(end.dropout) for both in ends for end in (both[0], both[-1])]
    drawn = [path for path in paths if path]
    if not drawn:
        return [(None, None)] * len(layers)
    keep = torch.stack([path.keep for path in drawn])[:, None]
    rows = iter((torch.rand(len(drawn), images, device=keep.device) < keep) / keep)
    factors = [next(rows) if path else None for path in paths]
    return list(zip(factors[::2], factors[1::2], strict=True))


def _drop_path(dropout: nn.Module) -> DropPath | None:
    """The drop path within the last operation of a branch, if it drops now."""
    found = [module for module in dropout.modules() if isinstance(module, DropPath) and module.training]
    return found[0] if found else None


def run_layer(base: nn.Module, layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """One layer, whose activations are computed again in the backward pass under gradient checkpointing.

    Until transformers 4.52 the encoder does that, later each layer by itself.
    """
    encoder = getattr(base, "encoder", None)
    by_encoder = getattr(encoder, "gradient_checkpointing", False) and base.training
    if by_encoder and not hasattr(layer, "gradient_checkpointing"):
        output = encoder._gradient_checkpointing_func(layer.__call__, hidden_states)
    else:
        output = layer(hidden_states)
    return output[0] if isinstance(output, tuple) else output  # a tuple until 4.55


def _run_for_class_token(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """A layer: (N, tokens, hidden) -> (N, 1, hidden)"""
    if args or kwargs:  # from the loops of transformers, some of which expect a tuple
        return type(self).forward(self, hidden_states, *args, **kwargs)
    attention = self_attention(self)
    context = attend_from_class_token(attention, self.layernorm_before(hidden_states))
    context = project_output(attention, context)
    token = hidden_states[:, :1]
    if has_new_names(self):
        token = token + self.dropout(context)
        return token + self.dropout(self.mlp(self.layernorm_after(token)))
    token = token + self.attention.output(context, token)
    return self.output(self.intermediate(self.layernorm_after(token)), token)


def _run_by_kernels(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, Branch]:
    """A layer, but for its last sum, which is left to the kernel that computes the next layer's LayerNorm.

    Args:
        hidden_states: (N, tokens, hidden), without the branch of the layer before.
        args: that `Branch`, and the factors of this layer's branches.

    Returns:
        Hidden states without the branch of this layer, and that.
    """
    if not args or not isinstance(args[0], Branch):  # from the loops of transformers
        return type(self).forward(self, hidden_states, *args, **kwargs)
    _, gelu = self.kernels
    branch, factors = args
    widen, narrow = mlp_projections(self)
    hidden_states, normed = _add_norm(self, hidden_states, branch, self.layernorm_before)
    if hasattr(self, "for_class_token"):
        context = attend_from_class_token(self_attention(self), normed)
        hidden_states = hidden_states[:, :1].contiguous()
    else:
        context = attend(self_attention(self), normed)
    branch = _branch(context, output_projection(self), factors[0])
    hidden_states, normed = _add_norm(self, hidden_states, branch, self.layernorm_after)
    activated = gelu(F.linear(normed, widen.weight), widen.bias)
    return hidden_states, _branch(activated, narrow, factors[1])


def _add_norm(self, hidden_states: torch.Tensor, branch: Branch, norm: nn.LayerNorm):
    """-> hidden states with the branch, and their LayerNorm"""
    if branch.product is None:
        return hidden_states, norm(hidden_states)
    add_norm, _ = self.kernels
    hidden_states, normed, _ = add_norm(hidden_states, *branch, norm.weight, norm.bias, norm.eps)
    return hidden_states, normed


def _branch(inputs: torch.Tensor, linear: nn.Module, factors: torch.Tensor | None) -> Branch:
    """``linear(inputs) * factors``"""
    return Branch(F.linear(inputs, linear.weight), linear.bias, factors)
