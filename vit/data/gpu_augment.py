"""Random augmentation of image batches on the device: crop, flip, AutoAugment and RandAugment."""

import torch
import torch.nn.functional as F

from vit.data.transforms import hash_seed

_MASK = 2**32 - 1


def send(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of ``part`` on the device. From contiguous, pinned memory: otherwise the CPU waits there for all
    work that the GPU has left, if the copy has more than 64 KiB.
    """
    part = part.contiguous().pin_memory() if device.type == "cuda" else part
    return part.to(device, non_blocking=True)


def _hash32(x: torch.Tensor) -> torch.Tensor:
    """Hash the 32 low bits of an int64. The factors are odd and below 2^31: no product reaches 2^63."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & _MASK
    return x ^ (x >> 16)


def counter_uniform(seed: int, epoch: int, index: torch.Tensor, draws: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float (N, draws), that depend on seed, epoch and image index (N,) alone.

    So they are equal on all processes of a tensor-parallel group, on any device, in any batch and after a
    resume. They are a hash of a counter, not a generator's state (Salmon et al., 2011, "Parallel random
    numbers: as easy as 1, 2, 3").
    """
    key = hash_seed(seed, epoch)
    image = _hash32(_hash32((index + (key & _MASK)) & _MASK) ^ (key >> 32))
    counter = torch.arange(1, draws + 1, device=index.device) * 0x9E3779B9
    return (_hash32((image[:, None] + counter) & _MASK) >> 8).float() / 2**24


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


def _gather_pixels(pixels: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``pixels[n, :, y, x]`` for integers x, y (N, H, W); black outside the image. -> (N, C, H, W)"""
    n, channels, height, width = pixels.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    flat = (
        (y.clamp(0, height - 1) * width + x.clamp(0, width - 1))
        .long()
        .view(n, 1, -1)
        .expand(-1, channels, -1)
    )
    return pixels.flatten(2).gather(2, flat).view_as(pixels) * inside[:, None]


def _affine(pixels: torch.Tensor, operation: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Shear, translate or rotate, to the nearest pixel. ``operation`` (N,) is an index into `OPERATIONS`."""
    height, width = pixels.shape[-2:]

    def amount(name: str) -> torch.Tensor:
        return torch.where(operation == OPERATIONS.index(name), magnitude, 0.0).view(-1, 1, 1)

    # pixel centres from the top left corner; row and column terms are broadcast to (N, H, W) in one sum
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
    return _gather_pixels(pixels, from_x.floor_().int(), from_y.floor_().int())


def _grey(image: torch.Tensor) -> torch.Tensor:
    """Luminance, float (N, 1, H, W), rounded down as PIL does."""
    red, green, blue = image.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor()[:, None]


def _blend(image: torch.Tensor, other: torch.Tensor | float, magnitude: torch.Tensor) -> torch.Tensor:
    """Extrapolate away from ``other`` (magnitude > 0) or interpolate towards it (< 0); float -> uint8."""
    factor = 1 + magnitude.view(-1, 1, 1, 1)
    return (factor * image + (1 - factor) * other).clamp(0, 255).to(torch.uint8)


def _brightness(pixels: torch.Tensor, _, magnitude: torch.Tensor) -> torch.Tensor:
    return _blend(pixels.float(), 0.0, magnitude)


def _color(pixels: torch.Tensor, _, magnitude: torch.Tensor) -> torch.Tensor:
    image = pixels.float()
    return _blend(image, _grey(image), magnitude)


def _contrast(pixels: torch.Tensor, _, magnitude: torch.Tensor) -> torch.Tensor:
    image = pixels.float()
    return _blend(image, _grey(image).mean((2, 3), keepdim=True), magnitude)


def _sharpness(pixels: torch.Tensor, _, magnitude: torch.Tensor) -> torch.Tensor:
    image = pixels.float()
    kernel = torch.ones(3, 1, 3, 3, device=pixels.device)
    kernel[:, :, 1, 1] = 5
    blurred = image.clone()
    blurred[..., 1:-1, 1:-1] = F.conv2d(image, kernel / 13, groups=3).round()  # the border stays
    return _blend(image, blurred, magnitude)


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
    one = torch.ones((), dtype=torch.int32, device=pixels.device)  # expanded below, not stored per pixel
    counts = (
        torch.zeros(*levels.shape[:2], 256, dtype=torch.int32, device=pixels.device)
        .scatter_add_(2, levels, one.expand_as(levels))
        .long()
    )
    # as in PIL, pixels of the brightest level do not count for the step
    step = (counts.sum(2, keepdim=True) - counts.gather(2, levels.amax(2, keepdim=True))) // 255
    flat = ((counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)).clamp(0, 255)
    flat = torch.where(step > 0, flat, torch.arange(256, device=pixels.device))
    return flat.gather(2, levels).view_as(pixels).to(torch.uint8)


def _invert(pixels: torch.Tensor, *_) -> torch.Tensor:
    return 255 - pixels


# The function of each entry of `OPERATIONS`. The first five move pixels and share one function.
CHANGES = (
    *[_affine] * 5,
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


def apply_operations(pixels: torch.Tensor, operation: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Apply one operation to each image of a batch, as torchvision's AutoAugment does to a single image.

    Args:
        pixels: uint8 (N, 3, H, W).
        operation: (N,) index into `OPERATIONS`; -1: none. On the CPU, so that choosing the images of each
            operation needs no synchronisation with the GPU.
        magnitude: (N,) in the operation's own unit (Posterize: bits kept). On the CPU.

    Returns:
        uint8 (N, 3, H, W)
    """
    changed = pixels.clone()
    for change in dict.fromkeys(CHANGES):
        meant = torch.tensor([i for i, own in enumerate(CHANGES) if own is change])
        chosen = torch.isin(operation, meant).nonzero()[:, 0]
        if len(chosen):
            there, *asked = (
                send(part, pixels.device) for part in (chosen, operation[chosen], magnitude[chosen])
            )
            changed.index_copy_(0, there, change(pixels[there], *asked))
    return changed


def magnitude_of(name: str, bin: int | None, size: int, bins: int = 10) -> float:
    """Magnitude ``bin`` of ``bins`` in the operation's own unit, as in torchvision's auto-augment classes.

    After Cubuk et al., 2019 ("AutoAugment"), table 6, which has ten. ``size``: pixels of the image's side.
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


class BatchAugment:
    """Random crop of the padded image, random flip, then AutoAugment or RandAugment.

    Cubuk et al., 2019, "AutoAugment", arXiv:1805.09501, and "RandAugment", arXiv:1909.13719.

    Args:
        seed: with epoch and image index it decides every draw (`counter_uniform`).
        size: pixels of the images' sides.
        padding: black pixels around the image before the crop; 0: no crop.
        flip: mirror half of the images.
        policy: torchvision's name of an AutoAugment policy, or None.
        rand_augment: (operations per image, magnitude, number of magnitudes) of RandAugment, or None.
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

            # pairs of (operation, probability, bin)
            policies = AutoAugment(AutoAugmentPolicy(policy)).policies
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
            # torchvision's fourteen: these, with the identity (-1) instead of Invert
            self.rand_magnitudes = torch.tensor([magnitude_of(name, bin, size, bins) for name in OPERATIONS])

    def __call__(self, pixels: torch.Tensor, epoch: int, index: torch.Tensor) -> torch.Tensor:
        """Augment uint8 (N, 3, H, W), on the device, of images ``index`` (N,), on the CPU. -> same shape"""
        right, down, mirrored, policy, *chances = counter_uniform(
            self.seed, epoch, index, 8 + 2 * self.layers
        ).unbind(1)
        if self.padding or self.flip:
            pixels = self._crop(pixels, *(send(draws, pixels.device) for draws in (right, down, mirrored)))
        if self.policy:
            chosen = (policy * len(self.operations)).long()
            for i in (0, 1):
                operation = torch.where(
                    chances[i] < self.probabilities[chosen, i], self.operations[chosen, i], -1
                )
                pixels = apply_operations(
                    pixels, operation, _signed(operation, self.magnitudes[chosen, i], chances[2 + i])
                )
        if self.layers:
            for chosen, sign in zip(chances[4::2], chances[5::2]):
                operation = (chosen * len(OPERATIONS)).long()
                magnitude = _signed(operation, self.rand_magnitudes[operation], sign)
                pixels = apply_operations(
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
        return _gather_pixels(pixels, x, y)


def _signed(operation: torch.Tensor, magnitude: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Negate half of the magnitudes, for the operations that have a direction."""
    return torch.where((operation <= OPERATIONS.index("Sharpness")) & (chance < 0.5), -magnitude, magnitude)
