"""Which kind of source the name of a data set is."""

from __future__ import annotations

from pathlib import Path

from vit.data.cifar10 import is_cifar10
from vit.data.dataset import DataError
from vit.data.folders import has_class_folders, has_images
from vit.data.image_files import visible_folders
from vit.data.image_tables import METADATA, SUFFIXES, tables_of
from vit.data.prepared import PREPARED_INDEX, read_complete_index

DEMO_DATASET = "drawn"  # synthetic leaf images: vit/data/leaves.py
SYNTHETIC = "synthetic"  # noise with random labels, made on the device: vit/data/loaders.py
TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # read by `datasets`


def find_source(name: str) -> str:
    """The kind of source: drawn, synthetic, imagefolder, image_table, cifar10, prepared, saved, hub, or a
    value of `TABLE_SUFFIXES`.

    A local path takes precedence over a hub name. Reads directory entries, no images.

    Raises:
        DataError: the path exists and contains none of these, or looks like a path and does not exist.
    """
    path = Path(name)
    if name == DEMO_DATASET:
        return "drawn"
    if name.partition(":")[0] == SYNTHETIC:
        count = name.partition(":")[2] or "1"
        if not (count.isdecimal() and int(count)):
            raise DataError(f"must be {SYNTHETIC}, or {SYNTHETIC}:N with a number of training images", name)
        return "synthetic"
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return "image_table"
    if path.is_file() and path.suffix in TABLE_SUFFIXES:
        return TABLE_SUFFIXES[path.suffix]
    if path.is_dir():
        return _source_of_folder(path, name)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError("no such folder or file (a hub name has the form owner/name)", name)
    return "hub"


def _source_of_folder(path: Path, name: str) -> str:
    if (path / PREPARED_INDEX).exists():
        read_complete_index(path)
        return "prepared"
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return "saved"
    if is_cifar10(name):
        return "cifar10"
    folders = visible_folders(path)
    if has_images(path):  # found before a million image files are searched for tables
        tables, classes = tables_of(path), has_class_folders(path)
        if tables and (tables[0].name in METADATA or not classes):
            return "image_table"
        columns = next(
            (kind for suffix, kind in TABLE_SUFFIXES.items() if any(path.glob(f"*{suffix}"))), None
        )
        if columns and not classes:
            return columns
        if any(has_images(folder) for folder in folders):
            return "imagefolder"
    for suffix, kind in TABLE_SUFFIXES.items():
        if next(path.rglob(f"*{suffix}"), None) is not None:
            return kind
    if folders:
        return "imagefolder"
    raise DataError(
        f"the folder holds no data set. Expected {name}/train/<class>/*.jpg (and validation/, test/), or "
        f"{name}/<class>/*.jpg, or images and a table train.csv, or parquet or arrow files, or a saved "
        "`datasets` directory",
        name,
    )
