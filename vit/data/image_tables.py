"""Reads text tables of images and labels: Kaggle's train.csv, the hub's metadata.csv or .jsonl."""

from __future__ import annotations

import csv
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit.data.dataset import DataError, PathArray, ReadOptions, Split
from vit.data.folders import split_named
from vit.data.image_files import LeftOut, find_images, is_litter

SUFFIXES = (".csv", ".tsv", ".jsonl")
METADATA = tuple(f"metadata{suffix}" for suffix in SUFFIXES)  # the hub's name
FILE_COLUMNS = "file_name filename file image_path image_file path filepath file_path image img image_id id"
LABEL_COLUMNS = "label labels class class_name category target cls breed species"
SPLIT_COLUMNS = "split set subset partition"


@dataclass
class Table:
    """The rows of a file, as texts, and where it lies."""

    path: Path
    rows: list[dict[str, str]]

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []

    def column(self, given: str | None, usual: str, option: str) -> str | None:
        """The column ``given``, or the first of the ``usual`` names; None if there is none.

        Raises:
            DataError: there is no column of the given name.
        """
        if given is not None and given not in self.columns:
            raise DataError(f"{option} {given}: its columns are {', '.join(self.columns)}", self.path)
        lower = {column.lower(): column for column in reversed(self.columns)}
        return given or next((lower[name] for name in usual.split() if name in lower), None)


def tables_of(root: Path) -> list[Path]:
    """The tables that label the images under the folder ``root``: metadata files, else those in it."""
    folders = [root, *(entry for entry in sorted(root.iterdir()) if entry.is_dir())]
    if named := [folder / name for folder in folders for name in METADATA if (folder / name).is_file()]:
        return named
    files = (entry for entry in sorted(root.iterdir()) if entry.suffix.lower() in SUFFIXES)
    return [entry for entry in files if entry.is_file() and not is_litter(entry.name)]


def read_table(path: Path) -> Table:
    """The rows of a CSV, TSV or JSON-lines file.

    Raises:
        DataError: it is none, or is not UTF-8.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
                rows = list(csv.DictReader(file, delimiter=delimiter, strict=True))
        return Table(path, [{str(k): _text(v) for k, v in row.items()} for row in rows])
    except (ValueError, AttributeError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"cannot be read ({error}): save it again as UTF-8", path) from None


def _text(value) -> str:
    return "" if value is None else str(value).strip()


def read_image_tables(name: str, options: ReadOptions) -> tuple[dict[str, Split], list[str], LeftOut]:
    """Read all splits of a table, or of a folder with tables. Reads file names, not the images.

    In a folder, the name of a table or of the folder that it lies in names the split, or a column does.

    Returns:
        {name: Split}, the class names, and what is not used.

    Raises:
        DataError: no column of images or labels is found, or images are missing or outside of the folder.
    """
    left_out, rows = LeftOut(), defaultdict(list)
    root = Path(name)
    for path in tables_of(root) if root.is_dir() else [root]:
        table = read_table(path)
        place = path.relative_to(root).parts if root.is_dir() else ()
        default = next((split for part in reversed(place) if (split := split_named(part))), "train")
        files = table.column(options.image_column, FILE_COLUMNS, "--image_column")
        labels = table.column(options.label_column, LABEL_COLUMNS, "--label_column")
        if files is None or labels is None:
            left_out.add("tables without a column of files or of labels", str(path))
            columns = ", ".join(table.columns)
            continue
        for split, found in split_rows(table, default).items():
            images = find_files(table, split, [row[files] for row in found], options)
            rows[split] += zip(images, (row[labels] for row in found), strict=True)
    if not rows:
        problem = f"its table has the columns {columns}: name those of the files and of the labels with "
        raise DataError(problem + "--image_column and --label_column", name)
    names = sorted({label for pairs in rows.values() for _, label in pairs} - {""}, key=_in_order)
    index = {label: i for i, label in enumerate(names)} | {"": -1}
    splits = {}
    for split, pairs in rows.items():
        check_one_label(name, pairs)
        paths = PathArray(Path("."), [path for path, _ in pairs])
        splits[split] = Split(split, paths, np.array([index[label] for _, label in pairs]), names=paths)
    return splits, names, left_out


def _in_order(label: str) -> tuple:
    """Numbers by their value, before texts."""
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)


def check_one_label(name: str, pairs: list[tuple[str, str]]) -> None:
    """Raise `DataError` if an image has two labels."""
    labels: dict[str, str] = {}
    for path, label in pairs:
        if labels.setdefault(path, label) != label:
            raise DataError(f"{path} has two labels, {labels[path]} and {label}: keep one", name)


def split_rows(table: Table, default: str) -> dict[str, list[dict]]:
    """The rows of each split of a table; without a column of splits they are all of the split ``default``."""
    column = table.column(None, SPLIT_COLUMNS, "")
    if column and all(split_named(row[column]) for row in table.rows):
        found = defaultdict(list)
        for row in table.rows:
            found[split_named(row[column])].append(row)
        return found
    return {default: table.rows}


def find_files(table: Table, split: str, values: list[str], options: ReadOptions) -> list[str]:
    """The image that each value of a table names: a path, a file name, or a file name without its suffix.

    Raises:
        DataError: an image is not under the table's folder, or several have the name.
    """
    root = table.path.parent
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in find_images(root):
        relative = os.path.relpath(path, root)
        for name in {relative, os.path.basename(path), os.path.splitext(os.path.basename(path))[0]}:
            by_name[name].append(path)
    found, missing = [], []
    for value in values:
        places = by_name.get(os.path.normpath(value), [])
        if len(places) > 1:  # train/1.png and test/1.png
            places = [
                path for path in places if split_named(os.path.relpath(path, root).split("/")[0]) == split
            ]
        if len(places) > 1:
            raise DataError(f"{value} may be {places[0]} or {places[1]}: write its path", table.path)
        if places:
            found.append(places[0])
        elif options.allow_external_images and os.path.isfile(root / value):
            found.append(str(root / value))
        else:
            missing.append(value)
    if missing:
        problem = f"{len(missing)} of its {len(values)} images are not under {root}, such as {missing[0]}: "
        fix = (
            "complete them, or name another column with --image_column; --allow_external_images reads others"
        )
        raise DataError(problem + fix, table.path)
    return found
