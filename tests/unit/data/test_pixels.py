"""Images of more than 8 bits, by the range of the data set; and what else is unusual in an image."""

import re
import struct
import zlib

import numpy as np
import pytest
from helpers import decode_images, load_images, pixels_of
from PIL import Image, ImageCms

from vit.data.dataset import DataError, PixelRange
from vit.data.pixels import open_image
from vit.data.transforms import RandomResizedCrop, Resize, ResizeCenterCrop


def write_set(folder, convert, suffix=".tif", images: int = 8):
    """Grey images of two classes; ``convert`` makes an image of uint8 pixels (H, W)."""
    rng = np.random.default_rng(0)
    for i in range(images):
        pixels = rng.integers(40 + 100 * (i % 2), 100 + 100 * (i % 2), (20, 24)).astype(np.uint8)
        path = folder / "ab"[i % 2] / f"{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        convert(pixels).save(path)
    return folder


def plain(pixels):
    return Image.fromarray(pixels)


KINDS = {  # how 0..255 is written -> black and white that are found
    "16 bit": (lambda p: Image.fromarray(p.astype(np.uint16) * 257), ".tif", (0, 65535)),
    "16-bit PNG": (lambda p: Image.fromarray(p.astype(np.uint16) * 257), ".png", (0, 65535)),
    "12 bit in 16": (lambda p: Image.fromarray(p.astype(np.uint16) * 16), ".tif", (0, 4095)),
    "8 bit in 16": (lambda p: Image.fromarray(p.astype(np.uint16)), ".tif", (0, 255)),
    "8 bit in 32": (lambda p: Image.fromarray(p.astype(np.int32)), ".tif", (0, 255)),
    "16 bit in 32": (lambda p: Image.fromarray(p.astype(np.int32) * 257), ".tif", (0, 65535)),
    "float 0..1": (lambda p: Image.fromarray(p.astype(np.float32) / 255), ".tif", (0, 1)),
    "float -1..1": (lambda p: Image.fromarray(p.astype(np.float32) / 127.5 - 1), ".tif", (-1, 1)),
    "float 0..255": (lambda p: Image.fromarray(p.astype(np.float32)), ".tif", (0, 255)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_deep_images_train_as_their_8_bit_form(tmp_path, kind):
    convert, suffix, expected = KINDS[kind]
    bytes_of = pixels_of(load_images(write_set(tmp_path / "bytes", plain)).train)
    images = load_images(write_set(tmp_path / "deep", convert, suffix))
    found = images.train.pixel_range
    assert (found.low, found.high) == expected
    pixels = pixels_of(images.train)["pixel_values"].int()
    assert (pixels - bytes_of["pixel_values"].int()).abs().max() <= 1
    assert any(f"{found} become black to white" in note for note in images.notes)
    # also when they are decoded before training, and in the other split
    decoded, _ = decode_images(images)
    assert (np.stack(decoded.train.cached_pixels) == pixels.numpy()).all()
    assert decoded.validation.pixel_range == found


COLOURS = np.random.default_rng(1).integers(0, 256, (8, 9, 4), dtype=np.uint8)
RGBA = Image.fromarray(COLOURS)
RGB, GREY = RGBA.convert("RGB"), RGBA.convert("L")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    "image, name, options, said",
    [
        (RGB, "rgb.png", {}, ""),
        (GREY, "l.png", {}, ""),
        (GREY.convert("1"), "1.png", {}, ""),
        (RGB.quantize(8), "p.png", {}, ""),
        (RGB.convert("CMYK"), "cmyk.jpg", {}, ""),
        (RGB.convert("YCbCr"), "ycbcr.jpg", {}, ""),
        *((RGB, f"exif{i}.png", {"exif": turned(i)}, "") for i in range(1, 9)),
        (RGB, "a.gif", {"save_all": True, "append_images": [Image.new("RGB", (9, 8))]}, ""),
        (RGB, "a.tif", {"save_all": True, "append_images": [Image.new("RGB", (9, 8))]}, ""),
        (Image.fromarray(np.asarray(GREY).astype(np.uint16)), "8 in 16.tif", {}, ""),
        (Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "16.png", {}, "reads them otherwise"),
        (
            Image.fromarray(np.asarray(GREY).astype(np.uint16) * 16),
            "12 in 16.tif",
            {},
            "reads them otherwise",
        ),
        (Image.fromarray(np.asarray(GREY) / np.float32(255)), "f.tif", {}, "reads them otherwise"),
        (RGBA, "rgba.png", {}, "pipeline ignores"),
        (RGBA.convert("LA"), "la.png", {}, "pipeline ignores"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_transformers_pipeline_sees_the_same_pixels_or_the_run_says_so(tmp_path, image, name, options, said):
    from transformers.image_utils import load_image

    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(3):
            image.save(tmp_path / label / f"{i} {name}", **options)
    images = load_images(tmp_path)
    path = images.train.images[0]
    ours = np.asarray(open_image(path, images.train.pixel_range))
    same = (np.asarray(load_image(path)) == ours).all()
    assert same == (not said) and (said in "".join(images.notes))


def test_the_range_is_that_of_the_data_set_and_not_of_an_image(tmp_path):
    write_set(tmp_path, lambda p: Image.fromarray(p.astype(np.uint16) * 16))
    dark = np.full((20, 24), 255, np.uint16)  # as bright as white in 8 bits, nearly black in 12
    Image.fromarray(dark).save(tmp_path / "a" / "dark.tif")
    images = load_images(tmp_path)
    assert np.asarray(open_image(tmp_path / "a" / "dark.tif", images.train.pixel_range)).max() == 16


@pytest.mark.parametrize(
    "convert, values",
    [
        (lambda p: Image.fromarray(p.astype(np.int32) - 100), "integers from -60 to 99"),
        (lambda p: Image.fromarray(p.astype(np.int32) * 1000), "integers from 40000 to 199000"),
        (lambda p: Image.fromarray(p.astype(np.float32) / 100), "floats from 0.4 to 1.99"),
    ],
    ids=["signed", "32 bit", "float to 2"],
)
def test_an_ambiguous_range_is_an_error_that_names_file_and_option(tmp_path, convert, values):
    write_set(tmp_path, convert)
    with pytest.raises(
        DataError, match=rf"{re.escape(str(tmp_path))}/[ab]/\d.tif and others have {values}; say"
    ):
        load_images(tmp_path)
    low, high = values.split()[2], values.split()[4]
    images = load_images(tmp_path, "--pixel_range", low, high)
    assert images.train.pixel_range == PixelRange(float(low), float(high), given=True)
    pixels = pixels_of(images.train)["pixel_values"]
    assert pixels.min() < 40 and pixels.max() > 215  # black to white


def test_an_image_beyond_the_range_is_named_before_training(tmp_path, monkeypatch):
    write_set(tmp_path, lambda p: Image.fromarray(p.astype(np.uint16) * 16))
    Image.fromarray(np.full((20, 24), 5000, np.uint16)).save(tmp_path / "b" / "9.tif")
    monkeypatch.setattr("vit.data.pixels.LOOKED_AT", 1)
    images = load_images(tmp_path)
    with pytest.raises(
        DataError, match=r"b/9.tif \(has values from 5000 to 5000, other images have 0 to 4095"
    ):
        decode_images(images)
    # a range that is given clips
    images = load_images(tmp_path, "--pixel_range", 0, 4095)
    assert np.asarray(open_image(tmp_path / "b" / "9.tif", images.train.pixel_range)).min() == 255


def test_a_deep_image_among_8_bit_ones_is_an_error(tmp_path, monkeypatch):
    write_set(tmp_path, plain)
    Image.fromarray(np.full((20, 24), 300, np.uint16)).save(tmp_path / "b" / "9.tif")
    monkeypatch.setattr("vit.data.pixels.LOOKED_AT", 1)
    with pytest.raises(DataError, match=r"b/9.tif \(has more than 8 bits .*--pixel_range LOW HIGH"):
        decode_images(load_images(tmp_path))


def test_values_that_are_no_numbers_make_an_image_unreadable(tmp_path):
    write_set(tmp_path, lambda p: Image.fromarray(p.astype(np.float32) / 255))
    Image.fromarray(np.full((20, 24), np.nan, np.float32)).save(tmp_path / "a" / "nan.tif")
    with pytest.raises(DataError, match=r"a/nan.tif \(has values that are no numbers\)"):
        decode_images(load_images(tmp_path))


def test_16_bit_colours_that_pillow_would_lose_are_refused(tmp_path):
    path = tmp_path / "a" / "0.png"
    write_set(tmp_path, plain, ".png")
    path.write_bytes(deep_png(np.full((4, 4, 3), 4000, np.uint16)))
    with pytest.raises(DataError, match="a/0.png has 16-bit colours up to about 4095"):
        load_images(tmp_path)
    path.write_bytes(deep_png(np.full((4, 4, 3), 60000, np.uint16)))
    load_images(tmp_path)


def deep_png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint16 (H, W, 3)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_transparency_and_frames_are_said(tmp_path):
    write_set(tmp_path / "opaque", lambda p: Image.fromarray(p).convert("RGBA"), ".png")
    assert len(load_images(tmp_path / "opaque").notes) == 1  # the validation split
    write_set(tmp_path / "clear", plain, ".png")
    Image.new("RGBA", (9, 9), (0, 0, 0, 100)).save(tmp_path / "clear" / "a" / "1.png")
    first, second = Image.new("RGB", (9, 9), (250, 0, 0)), Image.new("RGB", (9, 9), (0, 0, 250))
    for name in ("2.gif", "3.gif"):
        first.save(tmp_path / "clear" / "b" / name, save_all=True, append_images=[second])
    text = "\n".join(load_images(tmp_path / "clear", "--validation_fraction", 0.1).notes)
    assert "transparency is laid over white" in text and "vit_predict.py" in text
    assert "of several frames or pages the first is used" in text
    assert open_image(tmp_path / "clear" / "b" / "2.gif").getpixel((0, 0)) == (250, 0, 0)


def test_lab_colours(tmp_path):
    colours = Image.new("RGB", (6, 4), (200, 30, 90))
    lab = ImageCms.profileToProfile(
        colours, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    lab.save(tmp_path / "lab.tif")
    pixels = np.asarray(open_image(tmp_path / "lab.tif")).astype(int)
    assert np.abs(pixels - (200, 30, 90)).max() <= 3


def test_scans_of_hundreds_of_megapixels_are_read(tmp_path):
    Image.new("1", (20_000, 9_500)).save(tmp_path / "scan.png")  # 190 megapixels, 25 kB
    assert open_image(tmp_path / "scan.png").size == (20_000, 9_500)


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1)])
def test_an_image_of_one_pixel_is_read_and_cropped(tmp_path, size):
    image = Image.new("RGB", size, (10, 200, 30))
    assert Resize(16)(image).shape == (3, 16, 16)
    assert ResizeCenterCrop(16, 18)(image).shape == (3, 16, 16)
    crop = RandomResizedCrop(16, seed=0)
    assert crop(crop.keep(image), 0, 0).shape == (3, 16, 16)
