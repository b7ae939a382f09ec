"""Patches of the way through the layers of transformers' ViT: from pixels to logits, with the same
parameters. What happens within attention and the patch embedding is in transformers_vit.py.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import nn

from vit.modules import has_new_names, layer_list, numbered_layers, self_attention
from vit.patches import patch
from vit.patches.transformers_vit import any_given, attend_from_class_token


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
        hidden_states = embed(base, pixel_values)
        for layer in layer_list(base):
            hidden_states = run_layer(base, layer, hidden_states)
        if hasattr(base.embeddings, "cls_token"):
            pooled = base.layernorm(hidden_states[:, 0])  # of the class token alone, not of every token
        else:
            pooled = base.layernorm(hidden_states).mean(dim=1)
        return ImageClassifierOutput(logits=self.classifier(pooled))

    model.forward = MethodType(classify, model)  # type: ignore[method-assign]


def embed(base: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, tokens, hidden), in the precision of the weights"""
    return base.embeddings(pixel_values.to(base.embeddings.patch_embeddings.projection.weight.dtype))


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
    context = attend_from_class_token(self_attention(self), self.layernorm_before(hidden_states))
    token = hidden_states[:, :1]
    if has_new_names(self):
        token = token + self.dropout(context)
        return token + self.dropout(self.mlp(self.layernorm_after(token)))
    token = token + self.attention.output(context, token)
    return self.output(self.intermediate(self.layernorm_after(token)), token)
