"""A fine-tuned model as one ONNX file, which runs without PyTorch: `vit_predict.py --export onnx`.

Input `pixel_values`: float32 (N, 3, H, W), any N. Output `logits`: float32 (N, classes). What was done to the
images before, and the names of the classes, are in the file's metadata.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch

from vit.classify import Classifier, one_line
from vit.data.leaves import LABELS, draw_leaf
from vit.data.processor import Normalize

NAME = "model.onnx"
OPSET = 17  # of 2022, the first with LayerNormalization
MOST_BYTES = 2**31 - 2**20  # of a file in the format of Protocol Buffers, less the graph
TOLERANCE = 1e-4  # of a logit, and of each unit of its size


class ExportError(Exception):
    """The model cannot be exported, or the file does not compute what the model does."""


class LogitsOnly(torch.nn.Module):
    """A model of transformers with a tensor as its output."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


def export_onnx(classifier: Classifier, folder: Path) -> tuple[Path, float]:
    """Write ``folder``/model.onnx, after it was compared with the model on drawn images.

    Returns:
        The file, and the largest difference of a logit.

    Raises:
        ExportError: the model is too large, has an operation that ONNX lacks, or the results differ.
    """
    weights = sum(value.numel() * value.element_size() for value in classifier.model.state_dict().values())
    if weights > MOST_BYTES:
        raise ExportError(f"the weights have {weights / 1e9:.1f} GB, and an ONNX file holds 2.1 GB")
    model, pixels = LogitsOnly(classifier.model).cpu().eval(), drawn_pixels(classifier)
    partial = folder / f".{NAME}.partial"
    try:
        write_graph(model, pixels[:2], partial)
        add_metadata(partial, metadata(classifier, pixels))
        difference = largest_difference(model, pixels, partial)
        os.replace(partial, folder / NAME)
    except ExportError:
        raise
    except Exception as error:  # of three libraries, and of the disk
        raise ExportError(one_line(error)) from None
    finally:
        partial.unlink(missing_ok=True)
        classifier.model.to(classifier.device)
    return folder / NAME, difference


def drawn_pixels(classifier: Classifier) -> torch.Tensor:
    """The model's input of a drawn leaf of each class: (3, 3, H, W)."""
    size = getattr(classifier.model.config, "image_size", None)
    size = size if isinstance(size, int) else 224
    rng = np.random.default_rng(0)
    leaves = [np.asarray(draw_leaf(i, rng, max(16, size)).resize((size, size))) for i in range(len(LABELS))]
    return torch.stack([classifier.pixels(leaf) for leaf in leaves]).float()


def write_graph(model: torch.nn.Module, pixels: torch.Tensor, path: Path) -> None:
    """Trace the model with ``pixels`` (N, 3, H, W); N stays free."""
    torch.onnx.export(
        model,
        (pixels,),
        str(path),
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=OPSET,
        dynamo=False,  # newer releases' default needs onnxscript and writes a second file
    )


def metadata(classifier: Classifier, pixels: torch.Tensor) -> dict[str, str]:
    """What a program needs besides the graph; values are JSON.

    A pixel x of 0 to 255 becomes (x / pixel_unit - image_mean) / image_std.
    """
    normalize = Normalize.of(classifier.processor)
    facts = {
        "labels": classifier.labels,
        "image_size": list(pixels.shape[-2:]),
        "pixel_unit": normalize.unit,
        "image_mean": list(normalize.mean),
        "image_std": list(normalize.std),
        "temperature": classifier.temperature,
    }
    texts = {name: json.dumps(value) for name, value in facts.items()}
    # how images are resized and cropped, in the form of transformers
    return texts | {"preprocessor_config": classifier.processor.to_json_string()}


def add_metadata(path: Path, texts: dict[str, str]) -> None:
    import onnx

    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, texts)
    onnx.checker.check_model(graph)
    onnx.save(graph, str(path))


def largest_difference(model: torch.nn.Module, pixels: torch.Tensor, path: Path) -> float:
    """Of the logits of PyTorch and onnxruntime, for all images at once and for each alone.

    Raises:
        ExportError: it is more than `TOLERANCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = model(pixels).numpy()
    batches = [pixels.numpy(), *(pixels.numpy()[i : i + 1] for i in range(len(pixels)))]
    found = [session.run(["logits"], {"pixel_values": batch})[0] for batch in batches]
    found = np.concatenate(found)
    expected = np.concatenate([expected, expected])
    difference = float(np.abs(found - expected).max())
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise ExportError(
            f"onnxruntime's logits differ from PyTorch's by {difference:.2g}; nothing was written"
        )
    return difference
