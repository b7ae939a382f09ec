"""What a model's image processor (transformers) does to an image, in this project's own operations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vit.data.dataset import DataError
from vit.data.transforms import Resize, ResizeCenterCrop
from vit.model_folder import PREPROCESSING, check_preprocessing, given_sides, per_channel


def load_processor(name: str, size: int) -> tuple[object, list[str]]:
    """The image processor of a model, set to the ``size`` in pixels that the model takes.

    Returns:
        The processor of transformers, and notes: what was changed or is missing, one line each.

    Raises:
        DataError: it is damaged, or does what training here does not do.
    """
    from transformers import AutoImageProcessor

    if Path(name).is_dir() and not (Path(name) / PREPROCESSING).exists():
        note = f"the model has no {PREPROCESSING}: images are resized to {size} px, mean and std 0.5"
        return Resize(size).processor((0.5,) * 3, (0.5,) * 3), [note]
    try:
        processor = AutoImageProcessor.from_pretrained(name, use_fast=False)
        notes = fit_processor(processor, size)
        check_processor(processor)
    except DataError:
        raise
    except Exception as error:  # of many types: no such class, own code, a value of another type
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"its {PREPROCESSING} cannot be used: {reason}") from None
    return processor, notes


def fit_processor(processor, size: int) -> list[str]:
    """Make an image processor return ``size`` x ``size`` pixels, in place. -> notes: what was changed"""
    notes = []
    if not processor.do_resize and not getattr(processor, "do_center_crop", False):
        # images of the model's size stay as they are, and others can be used too
        processor.do_resize, processor.size = True, {"height": size, "width": size}
        notes.append(f"the model's preprocessing has do_resize off: other images are resized to {size} px")
    if (now := transform_of_processor(processor).size) != size:
        set_processor_size(processor, size)
        notes.append(f"images are resized to the {size} px of the model; its preprocessing says {now}")
    return notes


def transform_of_processor(processor) -> Resize | ResizeCenterCrop:
    """The resizing and cropping of a model's image processor (transformers), which also normalises.

    Raises:
        DataError: the processor does something else.
    """
    check_preprocessing({"do_center_crop": False} | vars(processor))
    sides, resample = given_sides(processor.size), int(processor.resample)
    if not getattr(processor, "do_center_crop", False):
        return Resize(sides["height"], resample)
    size = given_sides(processor.crop_size)["height"]
    squeezed = "height" in sides
    return ResizeCenterCrop(size, sides["height" if squeezed else "shortest_edge"], resample, squeezed)


def set_processor_size(processor, size: int) -> None:
    """Make an image processor return ``size`` x ``size`` pixels of the same part of an image, in place."""
    now, sides = transform_of_processor(processor), given_sides(processor.size)
    processor.size = {side: round(size / now.size * pixels) for side, pixels in sides.items()}
    if isinstance(now, ResizeCenterCrop):
        processor.crop_size = {"height": size, "width": size}


def check_processor(processor) -> None:
    """Compare transformers' own class with what training does, on two small images.

    Raises:
        DataError: the class does something more, such as padding, or ignores one of its settings.
    """
    resize, normalize = transform_of_processor(processor), Normalize.of(processor)
    for height, width in ((30, 40), (40, 30)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        theirs = processor(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        ours = normalize(torch.from_numpy(resize(Image.fromarray(image)))[None])
        if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, rtol=1e-4, atol=1e-4):
            kind = type(processor).__name__
            problem = f"its image processor, {kind}, does not do what its size, crop and scale say"
            raise DataError(f"{problem}; use a ViTImageProcessor in {PREPROCESSING}")


@dataclass
class Normalize:
    """uint8 pixels (N, 3, H, W) to floats: (x / unit - mean) / std of each channel, on the device."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    unit: float = 255.0  # the pixel value that is 1

    @classmethod
    def of(cls, processor) -> Normalize:
        """As an image processor of transformers does it, whatever of it is switched on."""
        unit = 1 / processor.rescale_factor if processor.do_rescale else 1.0
        if not processor.do_normalize:
            return cls((0.0,) * 3, (1.0,) * 3, unit)
        return cls(per_channel(processor.image_mean), per_channel(processor.image_std), unit)

    def __str__(self) -> str:
        mean, std = (", ".join(f"{x:.3f}" for x in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}"

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, std = (
            _channel_tensor(tuple(values), self.unit, pixels.device) for values in (self.mean, self.std)
        )
        return (pixels - mean).div_(std)  # one float copy of the batch


@cache
def _channel_tensor(values: tuple[float, ...], unit: float, device: torch.device) -> torch.Tensor:
    """(1, 3, 1, 1) in units of a pixel. Cached: sending it again makes the CPU wait for the GPU."""
    return unit * torch.tensor(values, device=device).view(1, 3, 1, 1)
