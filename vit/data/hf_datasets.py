"""Reads data sets with the `datasets` library: the hub, saved directories, parquet, arrow and tar files."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit.data.dataset import DEFAULT_OPTIONS, DataError, ReadOptions, Split
from vit.data.folders import SPLIT_ALIASES, split_named
from vit.data.image_tables import LABEL_COLUMNS
from vit.data.sources import TABLE_SUFFIXES

IMAGE_COLUMNS = "image img picture photo image_file pixels file_name filename file_path path file"


def read_hf_dataset(
    name: str, kind: str, options: ReadOptions = DEFAULT_OPTIONS
) -> tuple[dict[str, Split], list[str]]:
    """Read all splits. Images stay encoded in the memory-mapped table until they are used.

    Args:
        kind: what `find_source` returned: hub, saved, parquet, arrow or webdataset.

    Returns:
        {name: Split} and the class names. Names such as "val" become "validation", others stay.

    Raises:
        DataError: the columns cannot be found, or differ between splits; or two splits are the same one.
    """
    tables = open_tables(name, kind, options.dataset_config)
    features = next(iter(tables.values())).features
    image_column = options.image_column or find_image_column(name, features)
    label_column = options.label_column or find_label_column(name, features, image_column)
    for column in (image_column, label_column):
        if column not in features:
            raise DataError(f"has no column {column!r}; it has: {', '.join(features)}", name)
        if lacking := [split for split in tables if column not in tables[split].features]:
            problem = f"split {', '.join(lacking)} has no column {column!r}; add it, or leave the split out"
            raise DataError(problem, name)
    if is_list(features[image_column]):
        problem = f"column {image_column!r} has lists of numbers: store encoded images, such as PNG, instead"
        raise DataError(problem, name)
    labels, label_ids = read_labels(name, tables, label_column)
    path = Path(name)
    root = None if kind == "hub" else path if path.is_dir() else path.parent
    splits, names = {}, {}
    for split, table in tables.items():
        key = SPLIT_ALIASES.get(split, split)
        if names.setdefault(key, split) != split:
            raise DataError(f"{names[key]} and {split} are both a {key} split: leave one out", name)
        images = _ImageColumn(table, image_column, root, options.allow_external_images)
        splits[key] = Split(key, images, label_ids[split])
    return splits, labels


def open_tables(name: str, kind: str, config: str | None = None) -> dict:
    """The table of each split. The name or folder of a file names its split (test/0.parquet), as on the hub.

    Args:
        config: one of several configurations.

    Raises:
        DataError: files have different columns, or there are several configurations and none is named.
    """
    import datasets

    datasets.disable_progress_bars()
    if kind == "saved":
        tables = datasets.load_from_disk(name)
    elif kind == "hub":
        tables = _load_from_hub(name, config)
    else:
        try:
            tables = datasets.load_dataset(kind, data_files=table_files(name, kind, config))
        except datasets.exceptions.DatasetsError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            problem = f"its {kind} files do not make one table ({reason}); give every split the same columns"
            raise DataError(problem, name) from None
    return {"train": tables} if isinstance(tables, datasets.Dataset) else dict(tables)


def _load_from_hub(name: str, config: str | None):
    import datasets

    try:
        return datasets.load_dataset(name, config)
    except ValueError as error:  # several configurations, or none of this name
        raise DataError(f"{' '.join(str(error).split())}; choose by --dataset_config", name) from None


def table_files(name: str, kind: str, config: str | None = None) -> dict[str, list[str]]:
    """The files of each split, of one configuration.

    A configuration is a folder that is no split, as the hub keeps them: full/train-0.parquet.

    Raises:
        DataError: there are several configurations and none is named, or not the named one.
    """
    path = Path(name)
    if path.is_file():
        return {"train": [name]}
    suffix = next(suffix for suffix, value in TABLE_SUFFIXES.items() if value == kind)
    configs: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(path.rglob(f"*{suffix}")):
        relative = file.relative_to(path)
        folders = [part for part in relative.parts[:-1] if part != "data" and not split_named(part)]
        split = next(filter(None, map(split_named, relative.parts)), "train")
        configs["/".join(folders)][split].append(str(file))
    if config is None and len(configs) == 1:
        return dict(next(iter(configs.values())))
    if config not in configs:
        given = f"--dataset_config {config}: it " if config is not None else ""
        there = ", ".join(key or "." for key in configs)
        problem = f"has the configurations {there}: choose one by --dataset_config"
        raise DataError(given + ("has only one configuration" if set(configs) == {""} else problem), name)
    return dict(configs[config])


def read_labels(name: str, tables: dict, column: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """Class names, and for each split the class index of every image, int64 (N,); -1: no label.

    Raises:
        DataError: splits have different class names.
    """
    import datasets

    feature = next(iter(tables.values())).features[column]
    if is_list(feature):
        raise DataError(
            f"column {column!r} has lists; one label an image is needed: name another column", name
        )
    if not isinstance(feature, datasets.ClassLabel):
        values = {split: plain_labels(name, column, table[column]) for split, table in tables.items()}
        found = sorted({value for column in values.values() for value in column} - {None}, key=by_kind)
        index = {value: i for i, value in enumerate(found)} | {None: -1}
        label_ids = {split: [index[value] for value in column] for split, column in values.items()}
        return [str(value) for value in found], _as_arrays(label_ids)
    labels, used = feature.names, [split for split in tables if split in SPLIT_ALIASES]
    names = {split: getattr(tables[split].features[column], "names", labels) for split in used}
    if other := [split for split in used if names[split] != labels]:
        raise DataError(
            f"split {', '.join(other)} has other class names, or another order of them, than "
            f"{next(iter(tables))}: give all splits one ClassLabel",
            name,
        )
    return labels, _as_arrays({split: table[column] for split, table in tables.items()})


def _as_arrays(label_ids: dict[str, list]) -> dict[str, np.ndarray]:
    return {
        split: np.array([-1 if label is None else label for label in labels], dtype=np.int64)
        for split, labels in label_ids.items()
    }


def by_kind(value) -> tuple:
    """Sorts numbers by value, and texts after them."""
    return (isinstance(value, str), value)


def plain_labels(name: str, column: str, values) -> list:
    """Labels without what tables add to them: blanks around texts, and the point of whole numbers.

    Raises:
        DataError: a label is no whole number and no text.
    """

    def plain(value):
        if isinstance(value, float):
            if np.isnan(value):
                return None
            if not value.is_integer():
                raise DataError(
                    f"column {column!r} has {value}, which is no class: name another column", name
                )
            return int(value)
        return value.strip() or None if isinstance(value, str) else value

    return [plain(value) for value in values]


class _ImageColumn(Sequence):
    """The image column of a table as a sequence of paths or bytes.

    Args:
        root: the folder that paths are relative to; None: the hub's cache, with absolute paths.
        external: paths may lead out of ``root``.
    """

    def __init__(self, table, column: str, root: Path | None, external: bool):
        import datasets

        table = table.select_columns([column])
        plain = isinstance(table.features[column], datasets.Image) or _has_paths_or_bytes(table, column)
        self.table = table.cast_column(column, datasets.Image(decode=False)) if plain else table
        self.column, self.root, self.external = column, root, external

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i):
        value = self.table[int(i)][self.column]
        if isinstance(value, dict):
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if value is None:
            raise DataError("has no image: the table holds null")
        if isinstance(value, bytes) or self.root is None:
            return value
        path = os.path.realpath(self.root / value)
        if not self.external and not path.startswith(os.path.realpath(self.root) + os.sep):
            problem = f"names {value}, outside of the folder of the table; --allow_external_images reads it"
            raise DataError(problem)
        return path

    def sizes(self) -> np.ndarray:
        """Bytes of each encoded image, int64 (N,); 0 if the table holds its path. Reads no images."""
        import pyarrow.compute

        column = self.table.with_format("arrow")[:][self.column]
        if not column.type.num_fields:  # of paths alone
            return np.zeros(len(self), dtype=np.int64)
        encoded = pyarrow.compute.struct_field(column, "bytes")
        return pyarrow.compute.binary_length(encoded).fill_null(0).to_numpy().astype(np.int64)

    def files(self) -> list[str] | None:
        """The files that the images are read from; None: not known."""
        files = [file["filename"] for file in self.table.cache_files]
        return files if files and self.sizes().all() else None


def _has_paths_or_bytes(table, column: str) -> bool:
    """Whether `datasets.Image` takes a column as it is: texts, bytes, or {bytes, path} and nothing more."""
    feature = table.features[column]
    return set(feature) == {"bytes", "path"} if isinstance(feature, dict) else hasattr(feature, "dtype")


def holds_images(feature) -> bool:
    """Whether a column holds encoded images: of the type Image, bytes, or {bytes, path, ...} (parquet)."""
    import datasets

    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def find_image_column(name: str, features) -> str:
    """The only column that has images, or texts under one of `IMAGE_COLUMNS`.

    Raises:
        DataError: there are none or several.
    """
    found = [column for column, feature in features.items() if holds_images(feature)]
    if not found:  # paths of image files; lists are refused by name
        kinds = ("string", "large_string")
        others = [
            column for column, feature in features.items() if is_of(feature, *kinds) or is_list(feature)
        ]
        found = [column for column in IMAGE_COLUMNS.split() if column in others][:1]
    if len(found) > 1:
        found = [column for column in found if column == "image"] or found
    if len(found) != 1:
        problem = f"has {len(found)} image columns among {', '.join(features)}: name one with --image_column"
        raise DataError(problem, name)
    return found[0]


def is_of(feature, *kinds: str) -> bool:
    """Whether a column has plain values of a type whose name starts with one of ``kinds``."""
    return not is_list(feature) and str(getattr(feature, "dtype", "")).startswith(kinds)


def is_list(feature) -> bool:
    """Whether a column has several values a row."""
    return isinstance(feature, list) or getattr(feature, "feature", None) is not None


def find_label_column(name: str, features, image_column: str) -> str:
    """The only ClassLabel column; without one the first of `LABEL_COLUMNS`, or the only column of integers
    or texts.

    Raises:
        DataError: none or several fit.
    """
    import datasets

    others = {column: feature for column, feature in features.items() if column != image_column}
    found = [column for column, feature in others.items() if isinstance(feature, datasets.ClassLabel)]
    if not found:
        found = [column for column in LABEL_COLUMNS.split() if column in others][:1]
    if not found:
        found = [
            column for column, feature in others.items() if is_of(feature, "int", "uint", "string", "bool")
        ]
    if len(found) != 1:
        problem = f"has {len(found)} label columns among {', '.join(features)}: name one with --label_column"
        raise DataError(problem, name)
    return found[0]
