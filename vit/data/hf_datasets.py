"""Reads data sets with the `datasets` library: the hub, saved directories, parquet and arrow files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit.data.dataset import DataError, Split
from vit.data.sources import SPLIT_ALIASES


def read_hf_dataset(
    name: str, kind: str, image_column: str | None = None, label_column: str | None = None
) -> tuple[dict[str, Split], list[str]]:
    """Read all splits. Images stay encoded in the memory-mapped table until they are used.

    Args:
        kind: what `find_source` returned: hub, saved, parquet or arrow.
        image_column, label_column: names; None: found by their types.

    Returns:
        {name: Split} and the class names. Names such as "val" become "validation", others stay.

    Raises:
        DataError: the columns cannot be found, or differ between splits.
    """
    import datasets

    tables = open_tables(name, kind)
    features = next(iter(tables.values())).features
    image_column = image_column or find_image_column(name, features)
    label_column = label_column or find_label_column(name, features, image_column)
    for column in (image_column, label_column):
        if column not in features:
            raise DataError(f"has no column {column!r}; it has: {', '.join(features)}", name)
        if lacking := [split for split in tables if column not in tables[split].features]:
            problem = f"split {', '.join(lacking)} has no column {column!r}; add it, or leave the split out"
            raise DataError(problem, name)
    labels, label_ids = read_labels(name, tables, label_column)
    splits = {}
    for split, table in tables.items():
        images = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        key = SPLIT_ALIASES.get(split, split)
        splits[key] = Split(key, _ImageColumn(images, image_column), label_ids[split])
    return splits, labels


def open_tables(name: str, kind: str) -> dict:
    """The table of each split. The name or folder of a file names its split (test/0.parquet), as on the hub.

    Raises:
        DataError: parquet or arrow files have different columns.
    """
    import datasets

    datasets.disable_progress_bars()
    if kind == "saved":
        tables = datasets.load_from_disk(name)
    elif kind == "hub":
        tables = datasets.load_dataset(name)
    else:
        files: dict[str, list[str]] = {}
        for path in [Path(name)] if Path(name).is_file() else sorted(Path(name).rglob(f"*.{kind}")):
            words = re.split(r"[-._/]", str(path.relative_to(name)).lower())
            split = next((SPLIT_ALIASES[word] for word in words if word in SPLIT_ALIASES), "train")
            files.setdefault(split, []).append(str(path))
        try:
            tables = datasets.load_dataset(kind, data_files=files)
        except datasets.exceptions.DatasetsError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            problem = f"its {kind} files do not make one table ({reason}); give every split the same columns"
            raise DataError(problem, name) from None
    return {"train": tables} if isinstance(tables, datasets.Dataset) else dict(tables)


def read_labels(name: str, tables: dict, column: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """Class names, and for each split the class index of every image, int64 (N,); -1: no label.

    Raises:
        DataError: splits have different class names.
    """
    import datasets

    feature = next(iter(tables.values())).features[column]
    if isinstance(feature, datasets.ClassLabel):
        labels, index = feature.names, None
        used = [split for split in tables if split in SPLIT_ALIASES]
        names = {split: getattr(tables[split].features[column], "names", labels) for split in used}
        if other := [split for split in used if names[split] != labels]:
            raise DataError(
                f"split {', '.join(other)} has other class names, or another order of them, than "
                f"{next(iter(tables))}: give all splits one ClassLabel",
                name,
            )
    else:
        values = sorted(set().union(*(table.unique(column) for table in tables.values())) - {None})
        labels, index = [str(value) for value in values], {value: i for i, value in enumerate(values)}
    label_ids = {}
    for split, table in tables.items():
        found = table[column] if index is None else [index.get(value) for value in table[column]]
        label_ids[split] = np.array([-1 if label is None else label for label in found], dtype=np.int64)
    return labels, label_ids


class _ImageColumn(Sequence):
    """The image column of a table as a sequence of paths or bytes."""

    def __init__(self, table, column: str):
        self.table, self.column = table, column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i):
        value = self.table[int(i)][self.column]
        return value["bytes"] if value["bytes"] is not None else value["path"]


def find_image_column(name: str, features) -> str:
    """The only column that has images; `DataError` if there are none or several."""
    import datasets

    def holds_images(feature) -> bool:
        plain = isinstance(feature, dict) and set(feature) == {"bytes", "path"}  # parquet without metadata
        return isinstance(feature, datasets.Image) or plain

    found = [column for column, feature in features.items() if holds_images(feature)]
    if len(found) != 1:
        problem = f"has {len(found)} image columns among {', '.join(features)}: name one with --image_column"
        raise DataError(problem, name)
    return found[0]


def find_label_column(name: str, features, image_column: str) -> str:
    """The only ClassLabel column; without one `label` or `labels`, or the only column of integers or texts.

    Raises:
        DataError: none or several fit.
    """
    import datasets

    found = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not found:
        others = {column: getattr(feature, "dtype", "") for column, feature in features.items()}
        others.pop(image_column)
        plain = [column for column, dtype in others.items() if dtype.startswith(("int", "string"))]
        found = [column for column in plain if column in ("label", "labels")] or plain
    if len(found) != 1:
        problem = f"has {len(found)} label columns among {', '.join(features)}: name one with --label_column"
        raise DataError(problem, name)
    return found[0]
