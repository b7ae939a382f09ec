"""What a model's image processor (transformers) does to an image, in this project's own operations."""

from dataclasses import dataclass
from functools import cache

import torch

from vit.data.dataset import DataError
from vit.data.transforms import Resize, ResizeCenterCrop


def transform_of_processor(processor) -> Resize | ResizeCenterCrop:
    """The resizing and cropping of a model's image processor (transformers), which also normalises.

    Raises:
        DataError: the processor does something else.
    """
    sizes, resample = given_sides(processor.size), int(processor.resample)
    crop = given_sides(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
    size, shorter, squeezed = (
        (crop or sizes).get("height"),
        sizes.get("height") or sizes.get("shortest_edge"),
        "height" in sizes,
    )
    if (
        any(given and given.get("width") != given.get("height") for given in (sizes, crop))
        or not size
        or not shorter
        or size > shorter
    ):
        raise DataError(
            f"the model's preprocessing, size {sizes}"
            + f" and crop_size {crop}" * bool(crop)
            + ", is neither a resize to a square nor a square crop"
        )
    return ResizeCenterCrop(size, shorter, resample, squeezed) if crop else Resize(size, resample)


def given_sides(size) -> dict[str, int]:
    """A processor's size as a plain dict. Transformers 5 adds the sides that are not given, as None."""
    return {side: pixels for side, pixels in dict(size).items() if pixels is not None}


def set_processor_size(processor, size: int) -> None:
    """Make an image processor return ``size`` x ``size`` pixels of the same part of an image, in place."""
    now, sides = transform_of_processor(processor), given_sides(processor.size)
    processor.size = {side: round(size / now.size * pixels) for side, pixels in sides.items()}
    if isinstance(now, ResizeCenterCrop):
        processor.crop_size = {"height": size, "width": size}


@dataclass
class Normalize:
    """uint8 pixels (N, 3, H, W) to floats: (x / 255 - mean) / std of each channel, on the device."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, std = (_channel_tensor(tuple(values), pixels.device) for values in (self.mean, self.std))
        return (pixels - mean).div_(std)  # one float copy of the batch


@cache
def _channel_tensor(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(1, 3, 1, 1) in units of 1/255. Cached: sending it again makes the CPU wait for the GPU."""
    return 255 * torch.tensor(values, device=device).view(1, 3, 1, 1)
