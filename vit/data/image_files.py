"""Which files are images, by suffix or by content, and what is left out of a data set and why."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, features

from vit.data.dataset import readable

# What systems and programs leave in folders, in lower case. Everything with a leading dot is left out too.
LITTER = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
LITTER |= {"thumbs.db", "ehthumbs.db", "desktop.ini"}
# Pillow knows the names of these formats, but needs another program to decode them
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# suffix: (module that teaches Pillow to read it, its package)
PLUGINS = dict.fromkeys((".heic", ".heif", ".hif"), ("pillow_heif", "pillow-heif"))
PLUGINS |= dict.fromkeys((".avif", ".avifs"), ("pillow_avif", "pillow-avif-plugin"))
# first bytes of the usual formats, for files with another suffix or none
FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")


@functools.cache
def register_plugins() -> frozenset[str]:
    """Let Pillow use the packages of `PLUGINS` that are installed. -> their modules"""
    found = set()
    for module, _ in set(PLUGINS.values()):
        try:
            plugin = importlib.import_module(module)  # pillow_avif registers itself
        except ImportError:
            continue
        found.add(module)
        if module == "pillow_heif":
            plugin.register_heif_opener()
    return frozenset(found)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of all formats that Pillow decodes here, in lower case."""
    plugins = register_plugins()
    Image.init()
    kinds = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    known = {suffix for suffix, kind in kinds.items() if kind not in NOT_DECODED}
    if "pillow_avif" not in plugins and not features.check("avif"):
        known -= {".avif", ".avifs"}  # Pillow knows them, but was built without the library
    return frozenset(known)


class LeftOut:
    """Files and folders that are not used: for each reason how many, and the first of them."""

    def __init__(self):
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, path: str, count: int = 1) -> None:
        before, first = self.found.get(reason, (0, path))
        self.found[reason] = (before + count, first)

    def lines(self) -> list[str]:
        """One line for each reason: `not used: hidden files or folders (3, such as cats/.trash)`."""
        return [
            f"not used: {reason} ({count}{', such as' if count > 1 else ':'} {readable(path)})"
            for reason, (count, path) in self.found.items()
        ]


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or left by a system or a program."""
    return name.startswith(".") or name.lower() in LITTER


def visible_folders(folder: Path) -> list[Path]:
    """The folders directly in ``folder``, linked ones too, sorted; without hidden ones and litter."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_litter(entry.name))


def walk_images(folder: str | Path, left_out: LeftOut | None = None, nested: bool = True) -> Iterator[str]:
    """Paths of all images under ``folder``, which need not exist. Opens only files without a known suffix.

    Links are followed, but no folder is entered twice, and none that ``folder`` lies in: links may lead in
    circles.

    Args:
        left_out: gets what is not an image, if given.
        nested: also in the folders below.
    """
    suffixes, left_out = image_suffixes(), LeftOut() if left_out is None else left_out
    waiting = [str(folder)] if os.path.isdir(folder) else []
    entered = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    while waiting:
        path = waiting.pop()
        if (real := os.path.realpath(path)) in entered:
            continue
        entered.add(real)
        with os.scandir(path) as entries:
            for entry in entries:
                if is_litter(entry.name):
                    left_out.add("hidden files or folders, or litter of other programs", entry.path)
                elif entry.is_dir():
                    waiting += [entry.path] * nested
                elif reason := why_no_image(entry, suffixes):
                    left_out.add(reason, entry.path)
                else:
                    yield entry.path


def why_no_image(file: os.DirEntry, suffixes: frozenset[str]) -> str | None:
    """Why a file is not read as an image; None: it is."""
    suffix = os.path.splitext(file.name)[1].lower()
    if file.is_symlink() and not os.path.exists(file.path):
        return "links to files that are not there"
    if suffix in suffixes:
        return None
    if suffix in PLUGINS:
        return f"{suffix} images, which need `pip install {PLUGINS[suffix][1]}`"
    if not file.is_file():
        return "pipes or devices"
    if is_image_by_content(file.path):
        return None
    return f"{suffix} files that are no images" if suffix else "files without a suffix that are no images"


def is_image_by_content(path: str) -> bool:
    """Whether a file starts like an image of a usual format, and Pillow can read its header."""
    with open(path, "rb") as file:
        if not file.read(8).startswith(FIRST_BYTES):
            return False
    try:
        with Image.open(path):
            return True
    except Exception:  # Pillow raises many kinds
        return False


def find_images(folder: str | Path, left_out: LeftOut | None = None) -> list[str]:
    """As `walk_images`, sorted."""
    return sorted(walk_images(folder, left_out))
