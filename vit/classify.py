"""Classifying images with any image classifier that transformers opens, such as the folder of a run."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vit.checksums import SUMS_HINT, sums_problem
from vit.data.dataset import DataError, PixelRange
from vit.data.image_files import LeftOut, find_images
from vit.data.pixels import open_image
from vit.hub import lacks_safetensors, weights_options
from vit.model_folder import class_names
from vit.versions import pickles_refused


@dataclass
class Found:
    """An image file, and the folders that it was found in."""

    path: Path
    folders: tuple[str, ...] = ()  # below the folder that was named, from the top, then that folder itself
    encoded: bytes | None = None  # its content, if it is not on the disk


@dataclass
class Prediction:
    """What the model says of an image, or why it says nothing."""

    image: Found
    best: list[tuple[str, float]]  # (label, probability), the most probable first
    problem: str = ""


def named_images(paths: list[str], left_out: LeftOut | None = None) -> list[Found]:
    """The given files, and all images below the given folders. ``left_out`` gets what is no image there."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            images = [Path(image) for image in find_images(path, left_out)]
            top = path.resolve().name
            found += [Found(image, (*image.relative_to(path).parent.parts, top)) for image in images]
        else:
            found.append(Found(path))
    return found


def true_class(image: Found, labels: Collection[str]) -> str | None:
    """The class of the folder that an image lies in, as in a training set; None if no folder is a class."""
    return next((name for name in image.folders if name in labels), None)


class Classifier:
    """A model of a folder or of the hub, with its image processor.

    Args:
        pixel_range: black and white in images of more than 8 bits; None: as in the model's training.

    Attributes:
        temperature: what logits are divided by before the softmax, see vit/calibration.py.

    Raises:
        DataError: something is missing or damaged; transformers would draw a missing classifier at random.
    """

    def __init__(self, name: str, pixel_range: tuple[float, float] | None = None):
        from transformers import AutoImageProcessor

        if problem := sums_problem(Path(name)):
            raise DataError(f"{problem}: {SUMS_HINT}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model, self.labels = _read_model(name)
            self.processor = AutoImageProcessor.from_pretrained(name, use_fast=False)
        except DataError:
            raise
        except Exception as error:  # of many types: no weights, a damaged file, an unknown kind of model
            raise DataError(pickles_refused() if lacks_safetensors(error) else one_line(error)) from None
        self.model = model.eval().float().to(self.device)
        self.temperature = 1.0
        trained = getattr(model.config, "pixel_range", None)  # written by vit/run_folder.py
        self.pixel_range = PixelRange(*trained) if trained else None
        if pixel_range:
            self.pixel_range = PixelRange(*pixel_range, given=True)

    def predict(self, images: list[Found], topk: int, batch_size: int) -> Iterator[Prediction]:
        """Classify images, in their order. One that cannot be used has a problem instead."""
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            results = [Prediction(image, []) for image in batch]
            shapes: dict[torch.Size, list[tuple[Prediction, torch.Tensor]]] = {}
            for result in results:
                try:
                    pixels = self.pixels(result.image.encoded or result.image.path)
                except Exception as error:  # PIL raises many types for a damaged file
                    result.problem = f"cannot be read: {one_line(error)}"
                else:  # a processor that does not resize returns images of any size
                    shapes.setdefault(pixels.shape, []).append((result, pixels))
            for members in shapes.values():
                self._classify(members, topk)
            yield from results

    def pixels(self, encoded: Path | bytes | np.ndarray) -> torch.Tensor:
        """The model's input (3, H, W), of an image as `open_image` takes it."""
        # as an array whose form is given: transformers takes an image 3 px high for three channels
        pixels = np.asarray(open_image(encoded, self.pixel_range))
        inputs = self.processor(pixels, input_data_format="channels_last", return_tensors="pt")
        return inputs["pixel_values"][0]

    def _classify(self, members: list[tuple[Prediction, torch.Tensor]], topk: int) -> None:
        """Fill in the predictions of images of one size."""
        pixels = torch.stack([tensor for _, tensor in members]).float().to(self.device)
        try:
            with torch.inference_mode():
                logits = self.model(pixel_values=pixels).logits.float()
        except (ValueError, RuntimeError) as error:  # such as an image of another size than the model takes
            for result, _ in members:
                result.problem = f"cannot be classified: {one_line(error)}"
            return
        # chosen by the logits: after a division two of them can be equal, and the first would win
        best = logits.topk(min(topk, len(self.labels))).indices
        probabilities = (logits / self.temperature).softmax(-1).gather(1, best)
        for (result, _), values, indices in zip(members, probabilities.tolist(), best.tolist()):
            result.best = [(self.labels[i], value) for i, value in zip(indices, values)]


def _read_model(name: str) -> tuple[torch.nn.Module, list[str]]:
    """-> (the model, the names of its outputs)"""
    from transformers import CONFIG_MAPPING, AutoModelForImageClassification, PretrainedConfig

    given, _ = PretrainedConfig.get_config_dict(name)
    kind, labels = given.get("model_type"), class_names(given)
    if kind not in CONFIG_MAPPING:
        raise DataError(f"config.json has model_type {kind}, which is no model of transformers")
    if labels is None:
        raise DataError("config.json does not number its classes from 0; correct id2label")
    maps = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = CONFIG_MAPPING[kind].from_dict(given | maps)
    model, loading = AutoModelForImageClassification.from_pretrained(
        name, config=config, output_loading_info=True, **weights_options()
    )
    if missing := sorted(loading["missing_keys"]):
        raise DataError(
            f"has no weights for {len(missing)} parameters, e.g. {missing[0]}; fine-tune it first"
        )
    return model, labels


def one_line(error: Exception) -> str:
    """What an error says, for a message."""
    return " ".join(str(error).split()) or type(error).__name__
