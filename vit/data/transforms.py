"""Resizing, cropping and random augmentation of one image on the CPU."""

import functools
import hashlib
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vit.settings import AUTO_AUGMENT


@dataclass(frozen=True)
class Resize:
    """Resizes an image to size x size pixels, ignoring its proportions, as ViT's image processor does."""

    size: int  # pixels
    resample: int = 2  # PIL's number of the filter; 2 is bilinear

    def __call__(self, image: Image.Image) -> np.ndarray:
        """-> uint8 (3, size, size)"""
        pixels = np.asarray(image.resize((self.size, self.size), resample=self.resample))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def processor(self, mean, std):
        """This transform as an image processor of transformers, which is saved with a model.

        ``mean`` and ``std``: of each channel, in 0..1.
        """
        from transformers import ViTImageProcessor

        size = {"height": self.size, "width": self.size}
        return ViTImageProcessor(
            size=size, image_mean=list(mean), image_std=list(std), resample=self.resample
        )


@dataclass(frozen=True)
class ResizeCenterCrop:
    """Resizes the shorter side to ``shorter`` pixels and takes the centre crop of size x size pixels.

    ``squeezed``: both sides are resized to ``shorter`` pixels, as DeiT does.
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


def resize_shorter_side(image: Image.Image, shorter: int, resample: int = 2) -> Image.Image:
    """Resize to ``shorter`` pixels on the shorter side, antialiased; the longer side is rounded down."""
    if min(image.size) == shorter:
        return image
    sides = [
        shorter if side == min(image.size) else int(shorter * side / min(image.size)) for side in image.size
    ]
    return image.resize(sides, resample=resample)


@dataclass(frozen=True)
class RandomResizedCrop:
    """Random resized crop and horizontal flip, with torchvision's distribution.

    Drawn from (seed, epoch, image index) alone: the same on all processes of a tensor- or pipeline-parallel
    group, for any number of workers, and after a resume.
    """

    size: int  # pixels
    seed: int
    resample: int = 2
    smallest_crop: float = 0.35  # part of the image's area
    flip: bool = True
    policy: str | None = None  # a key of `vit.settings.AUTO_AUGMENT`, applied after the crop

    def shrink(self, image: Image.Image) -> Image.Image:
        """Reduce an image to at most twice the model's size on the shorter side, to take crops from it."""
        sides = self.shrunk_sides(*image.size)
        return image if sides == image.size else image.resize(sides, resample=self.resample)

    def shrunk_sides(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after `shrink`."""
        scale = 2 * self.size / min(width, height)
        return (round(width * scale), round(height * scale)) if scale < 1 else (width, height)

    def keep(self, image: Image.Image) -> np.ndarray:
        """The pixels of an image to keep in memory: uint8 (H, W, 3)."""
        return np.asarray(self.shrink(image))

    def __call__(self, source: np.ndarray | Image.Image, epoch: int, index: int) -> torch.Tensor:
        """Crop image number ``index``, given as uint8 (H, W, 3) or as PIL image. -> uint8 (3, size, size)"""
        from torchvision.transforms import RandomResizedCrop

        sides = source.shape[:2] if isinstance(source, np.ndarray) else (source.height, source.width)
        with fork_rng_for(self.seed, epoch, index):
            blank = torch.empty(1).expand(3, *sides)  # get_params takes an image, but reads only its size
            top, left, height, width = RandomResizedCrop.get_params(
                blank, (self.smallest_crop, 1.0), (3 / 4, 4 / 3)
            )
            mirrored = self.flip and torch.rand(1).item() < 0.5
        # copy the crop alone, contiguous: torch's uint8 resizing is made for that layout
        if isinstance(source, np.ndarray):
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


@functools.cache
def _policy(name: str):
    from torchvision.transforms import v2

    return getattr(v2, AUTO_AUGMENT[name])()


@contextmanager
def fork_rng_for(*numbers: int):
    """Context in which torch's random numbers on the CPU depend on ``numbers`` alone.

    Generators outside the context and on GPUs are unchanged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash_seed(*numbers))  # torch.manual_seed would seed the GPUs too
        yield


def hash_seed(*numbers: int) -> int:
    """A 63-bit seed from several integers; similar integers give unrelated seeds."""
    digest = hashlib.blake2b(np.array(numbers, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
