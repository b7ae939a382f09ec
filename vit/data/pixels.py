"""Decodes images of any mode to 8-bit RGB, by one rule for a whole data set.

8-bit images keep their values. In images of more bits a `PixelRange` says which values are black and white.
It is found from the values of the data set, never image by image: a dark photograph stays dark.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from vit.data.dataset import RANGE_OPTION, DataError, PixelRange, Split
from vit.data.image_files import register_plugins

# A whole panorama or scan is read: Pillow's own limit, 179 megapixels, is for uploads to a server.
MAX_PIXELS = 2**30  # 3 GiB as RGB
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns from here on, and refuses twice as many

INTEGER_RANGES = (1, 255, 1023, 4095, 16383, 65535)  # white of 1, 8, 10, 12, 14 and 16 bits
LOOKED_AT = 256  # images of a split whose headers are read before training; of these
DECODED = 64  # unusual ones are decoded


def open_image(encoded, pixel_range: PixelRange | None = None) -> Image.Image:
    """Decode an entry of `Split.images` to RGB.

    Args:
        encoded: a path, the bytes of a file, a PIL image, or uint8 (H, W, 3).
        pixel_range: of the data set; None: it has 8-bit images only.

    Raises:
        DataError: an image has more than 8 bits and there is no range, or see `PixelRange.to_bytes`.
        Exception: PIL raises many kinds for a damaged file.
    """
    if isinstance(encoded, np.ndarray):
        return Image.fromarray(encoded)
    if isinstance(encoded, Image.Image):
        return to_rgb(encoded, pixel_range)
    register_plugins()
    with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
        return to_rgb(image, pixel_range)


def to_rgb(image: Image.Image, pixel_range: PixelRange | None = None) -> Image.Image:
    """Convert any mode to 8-bit RGB.

    EXIF orientation is applied, transparency is laid over white, and of several frames or pages the first is
    taken. ``pixel_range`` as for `open_image`.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image.load()
    if is_deep(image):
        if pixel_range is None:
            raise DataError(
                f"has more than 8 bits (mode {image.mode}), the other images have 8; {RANGE_OPTION}"
            )
        image = Image.fromarray(pixel_range.to_bytes(np.asarray(image)))
    if may_be_transparent(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    return image if image.mode == "RGB" else image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether an image has integers of 16 or 32 bits, or floats."""
    return image.mode.startswith("I") or image.mode == "F"


def may_be_transparent(image: Image.Image) -> bool:
    """Whether an image has an alpha channel, which may be opaque all over, or a transparent colour."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


# ---- what a data set has


@dataclass
class Survey:
    """What evenly spaced images of a split are like."""

    low: float = np.inf  # of the images of more than 8 bits
    high: float = -np.inf
    floats: bool = False
    deepest: str = ""  # the image with the highest value
    notes: list[str] = field(default_factory=list)

    def add_deep(self, image: Image.Image, name: str) -> None:
        values = np.asarray(image)
        if not np.isfinite(values).all():
            return  # it is named as unreadable when the images are decoded
        self.floats |= image.mode == "F"
        self.low = min(self.low, float(values.min()))
        if values.max() > self.high:
            self.high, self.deepest = float(values.max()), name

    @property
    def pixel_range(self) -> PixelRange | None:
        """The smallest usual range that has all values; None: all images have 8 bits.

        Raises:
            DataError: no usual range has them.
        """
        low, high = self.low, self.high
        if not self.deepest:
            return None
        if self.floats:
            if -1 <= low and high <= 1:
                return PixelRange(0 if low >= 0 else -1, 1)
            if low >= 0 and 127 < high <= 255:
                return PixelRange(0, 255)
        else:
            white = next((white for white in INTEGER_RANGES if high <= white), None)
            if low >= 0 and white:
                return PixelRange(0, white)
        kind = "floats" if self.floats else "integers"
        raise DataError(f"{self.deepest} and others have {kind} from {low:g} to {high:g}; {RANGE_OPTION}")


def survey_images(split: Split) -> Survey:
    """Read the headers of up to `LOOKED_AT` images of a split, and decode up to `DECODED` unusual ones.

    Raises:
        DataError: Pillow would lose the bits of a colour image.
    """
    survey, decoded, seen = Survey(), 0, set()
    for name, image in _sample(split):
        alpha = may_be_transparent(image)
        if "deep colour" not in seen and has_deep_colour(image):
            seen.add("deep colour")
            check_deep_colour(image, name)
        if getattr(image, "is_animated", False) and "frames" not in seen:
            seen.add("frames")
            survey.notes.append(f"of several frames or pages the first is used ({name} and maybe others)")
        if not (is_deep(image) or alpha and "alpha" not in seen) or decoded == DECODED:
            continue
        decoded += 1
        if is_deep(image):
            survey.add_deep(image, name)
        elif image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            seen.add("alpha")
            survey.notes.append(
                f"transparency is laid over white ({name} and maybe others); transformers' pipeline ignores "
                "it, so classify with vit_predict.py, or lay such images over white first"
            )
    return survey


def _sample(split: Split) -> Iterator[tuple[str, Image.Image]]:
    """Name and header of evenly spaced images of a split; those that cannot be opened are left out."""
    register_plugins()
    for i in range(0, len(split), max(1, len(split) // LOOKED_AT)):
        try:
            encoded = split.images[i]
            if isinstance(encoded, Image.Image):
                yield split.describe(i), encoded
                continue
            with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
                yield split.describe(i), image
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # it is named when the images are decoded


def has_deep_colour(image: Image.Image) -> bool:
    """Whether a colour image has 16 bits a channel, of which Pillow reads the 8 high ones."""
    tiles = getattr(image, "tile", None) or [()]
    return image.mode.startswith("RGB") and ";16" in str(tiles[0])


def check_deep_colour(image: Image.Image, name: str) -> None:
    """Raise `DataError` if the 8 high bits of a 16-bit colour image are nearly all 0."""
    if (highest := max(high for _, high in image.convert("RGB").getextrema())) < 32:
        raise DataError(
            f"{name} has 16-bit colours up to about {256 * highest + 255}, of which Pillow reads only the 8 "
            "high bits: convert these images to 8 bits"
        )


def choose_pixel_range(
    split: Split, given: Sequence[float] | None = None
) -> tuple[PixelRange | None, list[str]]:
    """The pixel range of a data set, from its training images. -> (range, notes for the user)

    Args:
        given: black and white of --pixel_range, or None.

    Raises:
        DataError: the values of the images have no usual range, and none is given.
    """
    if split.cached_pixels is not None or split.cached_images is not None or split.pixel_range:
        return split.pixel_range, []  # CIFAR-10, and prepared folders
    survey = survey_images(split)
    if given:
        low, high = given
        return PixelRange(low, high, given=True), survey.notes
    pixel_range = survey.pixel_range
    if pixel_range is None:
        return None, survey.notes
    note = f"images of more than 8 bits: {pixel_range} become black to white (--pixel_range chooses others)"
    if (pixel_range.low, pixel_range.high) != (0, 255):
        note += "; transformers' pipeline reads them otherwise, so classify with vit_predict.py"
    return pixel_range, [note, *survey.notes]
