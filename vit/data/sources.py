"""Where images come from: folders, parquet or arrow files, saved data sets, the hub."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vit.data.dataset import IMAGE_SUFFIXES, DataError, PathArray, Split
from vit.data.prepared import PREPARED_INDEX

SPLIT_ALIASES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


DEMO_DATASET = "drawn"  # the name of the embedded data set (leaves.py)


def find_source(name: str) -> str:
    """What kind of data set ``name`` is: drawn, imagefolder, prepared, saved, parquet, arrow, or hub.

    A local path wins over a hub name. Reads directory entries only.

    Raises:
        DataError: the path exists and holds none of these, or looks like a path and does not exist.
    """
    path = Path(name)
    if name == DEMO_DATASET:
        return "drawn"
    if path.is_file() and path.suffix in (".parquet", ".arrow"):
        return path.suffix[1:]
    if path.is_dir():
        if (path / PREPARED_INDEX).exists():
            from vit.data.prepared import read_complete_index

            read_complete_index(path)
            return "prepared"
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return "saved"
        folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        if any(_first_image(folder) for folder in folders):
            return "imagefolder"  # found before a million image files are searched for tables
        for suffix in ("parquet", "arrow"):
            if next(path.rglob(f"*.{suffix}"), None) is not None:
                return suffix
        if folders:
            return "imagefolder"
        raise DataError(
            f"--dataset {name}: the folder holds no data set. Expected {name}/train/<class>/*.jpg "
            "(and validation/, "
            f"test/), or {name}/<class>/*.jpg, or parquet or arrow files, or a saved `datasets` directory"
        )
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"--dataset {name}: no such folder or file (a hub name has the form owner/name)")
    return "hub"


def class_folders(root: Path) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """Of ``root/<split>/<class>/**/image``, or ``root/<class>/**/image``: -> (split -> its folder, split ->
    its classes).

    Raises:
        DataError: there is no train split, it has no classes, or another split has classes that it lacks.
    """
    folders = {
        SPLIT_ALIASES[d.name.lower()]: d
        for d in sorted(root.iterdir())
        if d.is_dir() and d.name.lower() in SPLIT_ALIASES
    }
    if not folders:
        folders = {"train": root}
    classes = {split: _subfolders(folder) for split, folder in folders.items()}
    if "train" not in classes:
        raise DataError(f"--dataset {root} has no train folder; it has: {', '.join(folders)}")
    if not classes["train"]:
        raise DataError(
            f"--dataset {root}: {folders['train']} holds no class folders (expected <class>/*.jpg)"
        )
    for split, folder in folders.items():
        if strangers := sorted(set(classes[split]) - set(classes["train"])):
            raise DataError(
                f"--dataset {root}: class {', '.join(strangers)} is in {folder.name}/ but not in "
                f"{folders['train'].name}/: "
                "rename or remove the folder, or add training images of it"
            )
    return folders, classes


def read_imagefolder(root: Path) -> tuple[dict[str, Split], list[str]]:
    folders, classes = class_folders(root)
    splits, labels = {}, classes["train"]
    for split, folder in folders.items():
        found = [sorted(_image_paths(folder / name)) for name in labels]
        if not any(found):
            flat = sorted(entry.path for entry in os.scandir(folder) if _is_image(entry.name))
            if flat and split == "test":  # ImageNet's, for one: its labels are not given away
                paths = PathArray(folder, flat)
                splits[split] = Split(split, paths, np.full(len(flat), -1), where=paths)
                continue
            mend = (
                "the images lie beside each other: move each into the folder of its class"
                if flat
                else ", ".join(sorted(IMAGE_SUFFIXES))
            )
            raise DataError(f"--dataset {root}: no images under {folder}/<class>/ ({mend})")
        paths = PathArray(folder, list(itertools.chain.from_iterable(found)))
        splits[split] = Split(
            split, paths, np.repeat(np.arange(len(labels)), [len(names) for names in found]), where=paths
        )
    return splits, labels


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _image_paths(folder: Path) -> Iterator[str]:
    """Of all image files under ``folder``, which may be missing. Reads directory entries alone.

    A look at each file takes minutes.
    """
    return (
        os.path.join(where, name) for where, _, names in os.walk(folder) for name in names if _is_image(name)
    )


def _first_image(folder: Path) -> str | None:
    return next(_image_paths(folder), None)


def _subfolders(folder: Path) -> list[str]:
    """Class folders: not the hidden ones, and not what a run or prepare_images.py left in there."""
    ours = ("metrics.jsonl", PREPARED_INDEX)
    return sorted(
        d.name
        for d in folder.iterdir()
        if d.is_dir() and not d.name.startswith(".") and not any((d / name).exists() for name in ours)
    )


def read_hf_dataset(name: str, kind: str, image_column: str | None, label_column: str | None):
    """The `datasets` library: hub, saved directory, parquet or arrow files."""
    import datasets

    datasets.disable_progress_bars()
    if kind == "saved":
        loaded = datasets.load_from_disk(name)
    elif kind == "hub":
        loaded = datasets.load_dataset(name)
    elif Path(name).is_file():
        loaded = datasets.load_dataset(kind, data_files={"train": name})
    else:
        # files are named or foldered by split (train-00000-of-00002.parquet, test/0.parquet), as on the hub
        files: dict[str, list[str]] = {}
        for path in sorted(Path(name).rglob(f"*.{kind}")):
            words = (
                str(path.relative_to(name))
                .replace("-", "/")
                .replace(".", "/")
                .replace("_", "/")
                .lower()
                .split("/")
            )
            split = next((SPLIT_ALIASES[word] for word in words if word in SPLIT_ALIASES), "train")
            files.setdefault(split, []).append(str(path))
        try:
            loaded = datasets.load_dataset(kind, data_files=files)
        except datasets.exceptions.DatasetsError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise DataError(
                f"--dataset {name}: its {kind} files do not make one table ({reason}); give every "
                "split the same columns"
            ) from None
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict(train=loaded)
    features = next(iter(loaded.values())).features
    image_column = image_column or find_image_column(name, features)
    label_column = label_column or find_label_column(name, features, image_column)
    for column in (image_column, label_column):
        if column not in features:
            raise DataError(f"--dataset {name} has no column {column!r}; it has: {', '.join(features)}")
        if lacking := [split for split in loaded if column not in loaded[split].features]:
            raise DataError(
                f"--dataset {name}: split {', '.join(lacking)} has no column {column!r}; add it, or "
                "leave the split out"
            )
    if isinstance(features[label_column], datasets.ClassLabel):
        labels = features[label_column].names
        used = [split for split in loaded if split in SPLIT_ALIASES]
        if odd := [
            split
            for split in used
            if getattr(loaded[split].features[label_column], "names", labels) != labels
        ]:
            raise DataError(
                f"--dataset {name}: split {', '.join(odd)} has other class names, or another order of "
                f"them, than {next(iter(loaded))}: give all splits one ClassLabel"
            )
    else:
        values = sorted(set().union(*(split.unique(label_column) for split in loaded.values())) - {None})
        labels = [str(value) for value in values]
        index = {value: i for i, value in enumerate(values)}
    splits = {}
    for split_name, split in loaded.items():
        column = split[label_column]
        if not isinstance(features[label_column], datasets.ClassLabel):
            column = [index.get(value) for value in column]
        label_ids = np.array([-1 if label is None else label for label in column], dtype=np.int64)
        # undecoded: the bytes of the file, read from the memory-mapped table when asked for
        images = split.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        key = SPLIT_ALIASES.get(split_name, split_name)
        splits[key] = Split(key, _ImageColumn(images, image_column), label_ids)
    return splits, labels


class _ImageColumn:
    """One image column of a `datasets` table as a sequence of paths or bytes."""

    def __init__(self, table, column: str):
        self.table, self.column = table, column

    def __getitem__(self, i: int):
        value = self.table[i][self.column]
        return value["bytes"] if value["bytes"] is not None else value["path"]


def find_image_column(name: str, features) -> str:
    import datasets

    def holds_images(feature) -> bool:
        plain = isinstance(feature, dict) and set(feature) == {
            "bytes",
            "path",
        }  # parquet without the hub's metadata
        return isinstance(feature, datasets.Image) or plain

    found = [column for column, feature in features.items() if holds_images(feature)]
    if len(found) != 1:
        raise DataError(
            f"--dataset {name} has {len(found)} image columns among {', '.join(features)}: name "
            "one with --image_column"
        )
    return found[0]


def find_label_column(name: str, features, image_column: str) -> str:
    import datasets

    found = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not found:
        plain = [
            c
            for c, f in features.items()
            if c != image_column and getattr(f, "dtype", "").startswith(("int", "string"))
        ]
        found = [c for c in plain if c in ("label", "labels")] or plain
    if len(found) != 1:
        raise DataError(
            f"--dataset {name} has {len(found)} label columns among {', '.join(features)}: name "
            "one with --label_column"
        )
    return found[0]
