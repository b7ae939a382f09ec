"""CIFAR-10 in torchvision's form, and the augmentation of batches on the device.

A batch is cut and augmented by a few kernels over all its images, each image with its own draw, so no
loader can
hold the GPU back. CIFAR-10: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from data import DataError, ImageData, Split

# ---------------------------------------------------------------------------------------------- reading

FOLDER = "cifar-10-batches-py"
TRAIN_FILES = [f"data_batch_{i}" for i in range(1, 6)]


class _Arrays(pickle.Unpickler):
    """Unpickles numpy arrays, and refuses to run anything else that a file may name."""

    NEEDED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
        (f"numpy.{core}.{where}", name)
        for core in ("core", "_core")  # numpy 1 and 2
        for where, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    }

    def find_class(self, module: str, name: str):
        if (module, name) in self.NEEDED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def batches_folder(name: str) -> Path | None:
    """The folder in torchvision's format that ``name`` is or holds; None where there is none."""
    for folder in (Path(name), Path(name) / FOLDER):
        if (
            folder.name == FOLDER
            and folder.is_dir()
            or any((folder / file).is_file() for file in (*TRAIN_FILES, "batches.meta"))
        ):
            return folder
    return None


def is_folder(name: str) -> bool:
    """Whether ``name`` is, or holds, torchvision's folder, with all of the training images.

    Raises:
        DataError: files of it are missing.
    """
    folder = batches_folder(name)
    if folder and (
        missing := [file for file in (*TRAIN_FILES, "batches.meta") if not (folder / file).is_file()]
    ):
        raise DataError(
            f"DATA={name}: {folder} lacks {', '.join(missing)}: unpack cifar-10-python.tar.gz again"
        )
    return folder is not None


def _unpickle(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            return _Arrays(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises many kinds
        raise DataError(f"DATA: {path} is damaged ({error}): unpack cifar-10-python.tar.gz again") from None


def _read_batches(folder: Path) -> dict[str, Split]:
    splits = {}
    for name, files in (("train", TRAIN_FILES), ("test", ["test_batch"])):
        if not all((folder / file).is_file() for file in files):
            continue  # a copy without the test batch
        batches = [_unpickle(folder / file) for file in files]
        try:
            pixels = (
                np.concatenate([batch["data"] for batch in batches]).astype(np.uint8).reshape(-1, 3, 32, 32)
            )
            labels = np.concatenate([batch["labels"] for batch in batches]).astype(np.int64)
        except (KeyError, ValueError, TypeError):
            raise DataError(
                f"DATA: {folder}/{files[0]} is no CIFAR-10 batch (data, N x 3072, and labels)"
            ) from None
        splits[name] = Split(name, None, labels, resized=pixels)
    return splits


def label_names(name: str) -> list[str]:
    return list(_unpickle(batches_folder(name) / "batches.meta")["label_names"])


def check_size(name: str, size: int) -> None:
    if size != 32:
        raise DataError(f"DATA={name}: its images have 32 px, the config's IMG_SIZE is {size}")


def read(name: str, size: int = 32) -> ImageData:
    """The images of such a folder as uint8 (3, 32, 32); ``test`` is None in a copy without the test batch.

    Raises:
        DataError: the folder is damaged, or ``size`` is not that of its images.
    """
    check_size(name, size)
    splits, labels = _read_batches(batches_folder(name)), label_names(name)
    return ImageData(splits["train"], None, splits.get("test"), labels)


# ---------------------------------------------------------------------------------------------- draws

_MASK = 2**32 - 1


def _hash(x: torch.Tensor) -> torch.Tensor:
    """Mix the 32 low bits of an int64: shifts and odd factors below 2^31, so that no product reaches 2^63."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & _MASK
    return x ^ (x >> 16)


def uniform(seed: int, epoch: int, index: torch.Tensor, draws: int) -> torch.Tensor:
    """Numbers in [0, 1), (N, draws), that depend on seed, epoch and the image's index alone.

    So they are equal on all processes of a tensor-parallel group, on any device, in any batch and after a
    resume. A
    hash of a counter instead of a generator's state (Salmon et al., 2011, "Parallel random numbers: as easy
    as 1, 2, 3").
    """
    key = data._mix(seed, epoch)
    image = _hash(_hash((index + (key & _MASK)) & _MASK) ^ (key >> 32))
    counter = torch.arange(1, draws + 1, device=index.device) * 0x9E3779B9
    return (_hash((image[:, None] + counter) & _MASK) >> 8).float() / 2**24


# ---------------------------------------------------------------------------------------------- augmentation

OPERATIONS = (
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
    "Invert",
)


def _take(pixels: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``pixels[n, :, y, x]`` with whole numbers x, y (N, H, W); black outside."""
    n, channels, height, width = pixels.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    flat = (
        (y.clamp(0, height - 1) * width + x.clamp(0, width - 1))
        .long()
        .view(n, 1, -1)
        .expand(-1, channels, -1)
    )
    return pixels.flatten(2).gather(2, flat).view_as(pixels) * inside[:, None]


def _move(pixels: torch.Tensor, operation: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Shear, translate and rotate, to the nearest pixel. ``operation`` (N,) is an index into `OPERATIONS`."""
    height, width = pixels.shape[-2:]

    def amount(name: str) -> torch.Tensor:
        return torch.where(operation == OPERATIONS.index(name), magnitude, 0.0).view(-1, 1, 1)

    # centres of the pixels, from the top left corner; a sum of a row and a column is made whole only once
    y = torch.arange(height, device=pixels.device).view(1, -1, 1) + 0.5
    x = torch.arange(width, device=pixels.device).view(1, 1, -1) + 0.5
    angle = amount("Rotate").deg2rad()
    cos, sin = angle.cos(), angle.sin()
    from_x = (cos * (x - width / 2) + width / 2 - amount("TranslateX").trunc()) + (
        amount("ShearX") * y - sin * (y - height / 2)
    )
    from_y = (cos * (y - height / 2) + height / 2 - amount("TranslateY").trunc()) + (
        amount("ShearY") * x + sin * (x - width / 2)
    )
    return _take(pixels, from_x.floor_().int(), from_y.floor_().int())


def _grey(image: torch.Tensor) -> torch.Tensor:
    red, green, blue = image.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor()[:, None]


def _away_from(image: torch.Tensor, other: torch.Tensor | float, magnitude: torch.Tensor) -> torch.Tensor:
    """Further from ``other`` by a magnitude above 0, nearer to it by one below; both are floats."""
    factor = 1 + magnitude.view(-1, 1, 1, 1)
    return (factor * image + (1 - factor) * other).clamp(0, 255).to(torch.uint8)


def _brightness(pixels: torch.Tensor, _, magnitude: torch.Tensor) -> torch.Tensor:
    return _away_from(pixels.float(), 0.0, magnitude)


def _color(pixels: torch.Tensor, _, magnitude: torch.Tensor) -> torch.Tensor:
    image = pixels.float()
    return _away_from(image, _grey(image), magnitude)


def _contrast(pixels: torch.Tensor, _, magnitude: torch.Tensor) -> torch.Tensor:
    image = pixels.float()
    return _away_from(image, _grey(image).mean((2, 3), keepdim=True), magnitude)


def _sharpness(pixels: torch.Tensor, _, magnitude: torch.Tensor) -> torch.Tensor:
    image = pixels.float()
    kernel = torch.ones(3, 1, 3, 3, device=pixels.device)
    kernel[:, :, 1, 1] = 5
    blurred = image.clone()
    blurred[..., 1:-1, 1:-1] = F.conv2d(image, kernel / 13, groups=3).round()  # the border stays
    return _away_from(image, blurred, magnitude)


def _posterize(pixels: torch.Tensor, _, magnitude: torch.Tensor) -> torch.Tensor:
    return pixels & ~((1 << (8 - magnitude.int())) - 1).to(torch.uint8).view(-1, 1, 1, 1)


def _solarize(pixels: torch.Tensor, _, magnitude: torch.Tensor) -> torch.Tensor:
    return torch.where(pixels >= magnitude.view(-1, 1, 1, 1), 255 - pixels, pixels)


def _autocontrast(pixels: torch.Tensor, *_) -> torch.Tensor:
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    stretched = ((pixels - low) * (255 / (high - low).clamp(min=1))).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, pixels)


def _equalize(pixels: torch.Tensor, *_) -> torch.Tensor:
    levels = pixels.flatten(2).long()
    one = torch.ones((), dtype=torch.int32, device=pixels.device)  # not a whole tensor of them
    counts = (
        torch.zeros(*levels.shape[:2], 256, dtype=torch.int32, device=pixels.device)
        .scatter_add_(2, levels, one.expand_as(levels))
        .long()
    )
    # as PIL: the brightest level's pixels are left out of the step
    step = (counts.sum(2, keepdim=True) - counts.gather(2, levels.amax(2, keepdim=True))) // 255
    flat = ((counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)).clamp(0, 255)
    flat = torch.where(step > 0, flat, torch.arange(256, device=pixels.device))
    return flat.gather(2, levels).view_as(pixels).to(torch.uint8)


def _invert(pixels: torch.Tensor, *_) -> torch.Tensor:
    return 255 - pixels


# Each image goes through its own operation only; those that move pixels are one.
CHANGES = (
    *[_move] * 5,
    _brightness,
    _color,
    _contrast,
    _sharpness,
    _posterize,
    _solarize,
    _autocontrast,
    _equalize,
    _invert,
)


def apply(pixels: torch.Tensor, operation: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """One operation on each image of a batch, as torchvision's AutoAugment does it on one.

    Args:
        pixels: uint8 (N, 3, H, W).
        operation: (N,) index into `OPERATIONS`; -1: none. On the CPU, which thus knows what to do without
            waiting for a GPU.
        magnitude: (N,) in the operation's own unit (Posterize: bits kept). On the CPU.
    """
    changed = pixels.clone()
    for change in dict.fromkeys(CHANGES):
        meant = torch.tensor([i for i, own in enumerate(CHANGES) if own is change])
        chosen = torch.isin(operation, meant).nonzero()[:, 0]
        if len(chosen):
            there, *asked = (
                part.to(pixels.device, non_blocking=True)
                for part in (chosen, operation[chosen], magnitude[chosen])
            )
            changed.index_copy_(0, there, change(pixels[there], *asked))
    return changed


def magnitude_of(name: str, bin: int | None, size: int, bins: int = 10) -> float:
    """The magnitude number ``bin`` of ``bins`` of an operation in its own unit, as torchvision's
    AutoAugment and RandAugment have it.

    After Cubuk et al., 2019, table 6, where there are ten.
    """
    part = (bin or 0) / (bins - 1)
    if name == "Posterize":
        return 8 - round(4 * part)
    if name == "Solarize":
        return 255 * (1 - part)
    largest = {
        "ShearX": 0.3,
        "ShearY": 0.3,
        "TranslateX": 150 / 331 * size,
        "TranslateY": 150 / 331 * size,
        "Rotate": 30,
    }
    largest |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9)
    return largest.get(name, 0.0) * part


class Augment:
    """Random crop out of the padded image, random flip, then AutoAugment or RandAugment (Cubuk et al.,
    2019, both).

    Args:
        seed: with epoch and image it decides every draw (`uniform`).
        size: of the images.
        padding: black pixels around the image before the crop; 0: no crop.
        policy: torchvision's name of an AutoAugment policy, or None.
        rand_augment: (layers, magnitude, magnitudes there are) of RandAugment, or None.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        padding: int = 0,
        flip: bool = False,
        policy: str | None = None,
        rand_augment: tuple[int, int, int] | None = None,
    ):
        self.seed, self.padding, self.flip, self.policy = seed, padding, flip, policy
        if policy:
            from torchvision.transforms import AutoAugment, AutoAugmentPolicy

            policies = AutoAugment(
                AutoAugmentPolicy(policy)
            ).policies  # pairs of (operation, probability, bin)
            self.operations = torch.tensor(
                [[OPERATIONS.index(name) for name, _, _ in pair] for pair in policies]
            )
            self.probabilities = torch.tensor(
                [[probability for _, probability, _ in pair] for pair in policies]
            )
            self.magnitudes = torch.tensor(
                [[magnitude_of(name, bin, size) for name, _, bin in pair] for pair in policies]
            )
        self.layers = 0
        if rand_augment:
            self.layers, bin, bins = rand_augment
            # all but Invert, with the identity at its place, as -1: torchvision's fourteen
            self.rand_magnitudes = torch.tensor([magnitude_of(name, bin, size, bins) for name in OPERATIONS])

    def __call__(self, pixels: torch.Tensor, epoch: int, index: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W), on the device, of the images ``index`` (N,), on the CPU -> the same shape"""
        right, down, mirrored, policy, *chances = uniform(
            self.seed, epoch, index, 8 + 2 * self.layers
        ).unbind(1)
        if self.padding or self.flip:
            pixels = self._crop(
                pixels, *(draws.to(pixels.device, non_blocking=True) for draws in (right, down, mirrored))
            )
        if self.policy:
            chosen = (policy * len(self.operations)).long()
            for i in (0, 1):
                operation = torch.where(
                    chances[i] < self.probabilities[chosen, i], self.operations[chosen, i], -1
                )
                pixels = apply(
                    pixels, operation, _signed(operation, self.magnitudes[chosen, i], chances[2 + i])
                )
        if self.layers:
            for chosen, sign in zip(chances[4::2], chances[5::2]):
                operation = (chosen * len(OPERATIONS)).long()
                magnitude = _signed(operation, self.rand_magnitudes[operation], sign)
                pixels = apply(
                    pixels, torch.where(operation == OPERATIONS.index("Invert"), -1, operation), magnitude
                )
        return pixels

    def _crop(
        self, pixels: torch.Tensor, right: torch.Tensor, down: torch.Tensor, mirrored: torch.Tensor
    ) -> torch.Tensor:
        height, width = pixels.shape[-2:]
        shift = [((u * (2 * self.padding + 1)).long() - self.padding).view(-1, 1, 1) for u in (right, down)]
        x = torch.arange(width, device=pixels.device).view(1, 1, -1)
        y = torch.arange(height, device=pixels.device).view(1, -1, 1)
        if self.flip:
            x = torch.where((mirrored < 0.5).view(-1, 1, 1), width - 1 - x, x)
        x, y = torch.broadcast_tensors(x + shift[0], y + shift[1])
        return _take(pixels, x, y)


def _signed(operation: torch.Tensor, magnitude: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Of operations that go both ways, half of the magnitudes negated."""
    return torch.where((operation <= OPERATIONS.index("Sharpness")) & (chance < 0.5), -magnitude, magnitude)
