"""Resizing, cropping and random augmentation of one image on the CPU."""

import functools
import hashlib
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vit.data.dataset import DataError


@dataclass(frozen=True)
class Resize:
    """The model's own preprocessing of an image.

    Squeezed to size x size pixels, with the processor's filter.
    """

    size: int
    resample: int = 2  # PIL's number of the filter; 2 is bilinear

    def __call__(self, image: Image.Image) -> np.ndarray:
        """-> uint8 (3, size, size)"""
        pixels = np.asarray(image.resize((self.size, self.size), resample=self.resample))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def processor(self, mean, std):
        """The same as transformers saves it beside a model.

        ``mean`` and ``std`` of each channel, in units of 255.
        """
        from transformers import ViTImageProcessor

        size = {"height": self.size, "width": self.size}
        return ViTImageProcessor(
            size=size, image_mean=list(mean), image_std=list(std), resample=self.resample
        )


@dataclass(frozen=True)
class ResizeCenterCrop:
    """Preprocessing that keeps the proportions, as ImageNet's is: the shorter side to ``shorter`` pixels,
    then the middle size x size of it.

    ``squeezed``: both sides to ``shorter`` pixels, as DeiT has it.
    """

    size: int
    shorter: int
    resample: int = 2
    squeezed: bool = False

    def __call__(self, image: Image.Image) -> np.ndarray:
        """-> uint8 (3, size, size)"""
        if self.squeezed:
            image = image.resize((self.shorter, self.shorter), resample=self.resample)
        else:
            image = resize_shorter_side(image, self.shorter, self.resample)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def processor(self, mean, std):
        """As `Resize.processor`."""
        from transformers import BitImageProcessor

        size, crop = {"shortest_edge": self.shorter}, {"height": self.size, "width": self.size}
        return BitImageProcessor(
            size=size, crop_size=crop, image_mean=list(mean), image_std=list(std), resample=self.resample
        )


def transform_of_processor(processor) -> Resize | ResizeCenterCrop:
    """What a model's image processor of transformers does before it normalises.

    Raises:
        DataError: something else than these two.
    """
    sizes, resample = dict(processor.size), int(processor.resample)
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
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
            + ", is neither a square size nor a square cut out of one"
        )
    return ResizeCenterCrop(size, shorter, resample, squeezed) if crop else Resize(size, resample)


def set_processor_size(processor, size: int) -> None:
    """Let an image processor make ``size`` x ``size`` pixels, of the same part of an image as before, in
    place.
    """
    now = transform_of_processor(processor)
    processor.size = {side: round(size / now.size * pixels) for side, pixels in processor.size.items()}
    if isinstance(now, ResizeCenterCrop):
        processor.crop_size = {"height": size, "width": size}


def resize_shorter_side(image: Image.Image, shorter: int, resample: int = 2) -> Image.Image:
    """The image with ``shorter`` pixels on its shorter side, the longer one cut off to a whole number.

    Antialiased.
    """
    if min(image.size) == shorter:
        return image
    sides = [
        shorter if side == min(image.size) else int(shorter * side / min(image.size)) for side in image.size
    ]
    return image.resize(sides, resample=resample)


@dataclass(frozen=True)
class RandomResizedCrop:
    """Random resized crop and horizontal flip, as torchvision draws them.

    Drawn from (seed, epoch, image) alone: the same on all processes of a tensor- or pipeline-parallel
    group, for
    any number of workers, and after a resume.
    """

    size: int
    seed: int
    resample: int = 2
    smallest_crop: float = 0.35  # of the image's area
    flip: bool = True
    policy: str | None = None  # a key of POLICIES: what else happens to the crop

    def shrink(self, image: Image.Image) -> Image.Image:
        """What later crops are taken from: at most twice the model's size on the shorter side."""
        short = min(image.size)
        if short > 2 * self.size:
            scale = 2 * self.size / short
            image = image.resize(
                (round(image.width * scale), round(image.height * scale)), resample=self.resample
            )
        return image

    def keep(self, image: Image.Image) -> np.ndarray:
        """What is kept of an image: uint8 (H, W, 3)"""
        return np.asarray(self.shrink(image))

    def __call__(self, source: np.ndarray | Image.Image, epoch: int, index: int) -> torch.Tensor:
        """uint8 (H, W, 3), or the image itself -> uint8 (3, size, size)"""
        from torchvision.transforms import RandomResizedCrop

        decoded = isinstance(source, np.ndarray)
        sides = source.shape[:2] if decoded else (source.height, source.width)
        with fork_rng_for(self.seed, epoch, index):
            blank = torch.empty(1).expand(3, *sides)  # get_params wants an image, and reads its sides
            top, left, height, width = RandomResizedCrop.get_params(
                blank, (self.smallest_crop, 1.0), (3 / 4, 4 / 3)
            )
            mirrored = self.flip and torch.rand(1).item() < 0.5
        # nothing but the crop is touched; in one piece, for which torch's resizing of uint8 is made
        if decoded:
            crop = source[top : top + height, left : left + width].copy()
        else:
            crop = np.array(source.crop((left, top, left + width, top + height)))
        mode = {0: "nearest-exact", 3: "bicubic"}.get(self.resample, "bilinear")
        pixels = F.interpolate(
            torch.from_numpy(crop).permute(2, 0, 1)[None],
            (self.size,) * 2,
            mode=mode,
            antialias=mode[0] == "b",
        )[0]
        pixels = pixels.flip(-1) if mirrored else pixels
        if self.policy:
            with fork_rng_for(self.seed, epoch, index, 1):
                pixels = _policy(self.policy)(pixels)
        return pixels


POLICIES = {
    "trivial": "TrivialAugmentWide",
    "rand": "RandAugment",
}  # Mueller and Hutter, 2021; Cubuk et al., 2020; in torchvision


@functools.cache
def _policy(name: str):
    from torchvision.transforms import v2

    return getattr(v2, POLICIES[name])()


@contextmanager
def fork_rng_for(*numbers: int):
    """Inside, torch's draws on the CPU depend on ``numbers`` alone.

    Outside, and on a GPU, nothing changes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash_seed(*numbers))  # torch.manual_seed would seed the GPUs too
        yield


def hash_seed(*numbers: int) -> int:
    """A 63-bit seed from several numbers; near numbers give unrelated seeds."""
    digest = hashlib.blake2b(np.array(numbers, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
