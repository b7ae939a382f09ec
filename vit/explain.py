"""Where a Vision Transformer looks: attention rollout, and the attention of each head of the last layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vit.classify import Classifier
from vit.data.dataset import DataError
from vit.report.charts import new_figure, save_figure


@dataclass
class Explanation:
    """What the model sees of an image, and where it looks. The maps have one value a patch and sum up to 1.

    Args:
        pixels: the model's input as an image, floats (S, S, 3) from 0 to 1.
        rollout: (G, G), G patches a side.
        heads: (heads, G, G), of the last layer.
        label, probability: the predicted class.
    """

    pixels: np.ndarray
    rollout: np.ndarray
    heads: np.ndarray
    label: str
    probability: float


def attention_rollout(attentions: list[torch.Tensor]) -> torch.Tensor:
    """How much each token of the last layer holds of each patch and class token of the input.

    Abnar and Zuidema, 2020, "Quantifying Attention Flow in Transformers": half of a layer's output is what it
    attends to, half is the residual connection.

    Args:
        attentions: of each layer, from the first: (heads, tokens, tokens), rows sum up to 1.

    Returns:
        (tokens, tokens), rows sum up to 1.
    """
    tokens = attentions[0].shape[-1]
    identity = torch.eye(tokens)
    flow = identity
    for attention in attentions:
        flow = (attention.mean(0) + identity) / 2 @ flow
    return flow


def patch_maps(attention: torch.Tensor) -> torch.Tensor:
    """The part of an attention that decides the class, on the grid of patches.

    Args:
        attention: (..., tokens, tokens), with a class token in front if tokens are not a square number.

    Returns:
        (..., G, G), sums up to 1: of the class token's row, or of the mean over all patches without one.
    """
    tokens = attention.shape[-1]
    side = math.isqrt(tokens)
    has_class_token = side * side != tokens
    if has_class_token:
        side = math.isqrt(tokens - 1)
    row = attention[..., 0, 1:] if has_class_token else attention.mean(-2)
    return (row / row.sum(-1, keepdim=True)).unflatten(-1, (side, side))


@torch.inference_mode()
def explain(classifier: Classifier, path: Path) -> Explanation:
    """Classify an image and record its attention.

    Raises:
        DataError: the model has no attention to patches.
        Exception: PIL raises many types for a damaged file.
    """
    model = classifier.model
    model.config._attn_implementation = "eager"  # the other forms do not return their attention
    pixels = classifier.pixels(path)
    output = model(pixel_values=pixels[None].float().to(classifier.device), output_attentions=True)
    attentions = [layer[0].float().cpu() for layer in output.attentions or () if layer is not None]
    if not attentions:
        raise DataError(f"is a {model.config.model_type} model, which returns no attention")
    probability, label = output.logits[0].float().softmax(-1).max(-1)
    shown = pixels.permute(1, 2, 0).float()
    shown = (shown - shown.min()) / (shown.max() - shown.min()).clamp(min=1e-6)
    return Explanation(
        shown.numpy(),
        patch_maps(attention_rollout(attentions)).numpy(),
        patch_maps(attentions[-1]).numpy(),
        classifier.labels[int(label)],
        float(probability),
    )


def draw(explanation: Explanation, path: Path) -> None:
    """A PNG of the image, the rollout over it, and the heads of the last layer."""
    panels = [("what the model sees", None), ("attention rollout", explanation.rollout)]
    panels += [(f"last layer, head {i + 1}", head) for i, head in enumerate(explanation.heads)]
    columns = min(7, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(2.4 * columns, 2.6 * rows + 0.4, rows, columns)
    flat = [axis for row in axes for axis in row]
    extent = (0, explanation.pixels.shape[1], explanation.pixels.shape[0], 0)
    for axis in flat:
        axis.axis("off")
    for axis, (title, values) in zip(flat, panels):
        axis.imshow(explanation.pixels, extent=extent)
        if values is not None:
            axis.imshow(values, extent=extent, cmap="inferno", alpha=0.6, interpolation="bilinear")
        axis.set_title(title, fontsize=9)
    figure.suptitle(f"{explanation.label.replace('$', chr(92) + '$')}  {explanation.probability:.3f}")
    save_figure(figure, path)
