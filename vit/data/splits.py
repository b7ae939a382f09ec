"""Selects the images that a run trains on and those that it evaluates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from vit.data.dataset import DataError, ImageDataset, Split, check_all_classes, check_class_count


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a ``fraction`` of the images with the class proportions of ``labels`` int64 (N,).

    At least one image of each class is held out, unless the class has only one.

    Returns:
        (indices kept, indices held out), both sorted.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = max(1, round(len(members) * fraction)) if len(members) > 1 else 0
        chosen.append(members[:count])
    held_out = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def stratified_fold(labels: np.ndarray, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out fold ``number`` (from 1) of ``count``; each fold has the class proportions of ``labels``.

    The folds do not depend on a run's seed: runs that are compared must have the same ones.

    Returns:
        (indices kept, indices held out), both sorted.
    """
    rng = np.random.default_rng(0)
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    held_out = np.sort(np.concatenate([members[number - 1 :: count] for members in classes]))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def labelled_splits(
    splits: dict[str, Split], labels: list[str], source: str
) -> tuple[dict[str, Split], list[str]]:
    """Keep train, validation and test, if they exist and have labels. -> (splits, notes on the others)

    Raises:
        DataError: there is no training split, it has images without a label, or there is only one class.
    """
    if "train" not in splits:
        raise DataError(f"has no train split; it has: {', '.join(splits) or 'nothing'}", source)
    if len(labels) < 2:
        problem = f"has one class, {labels[0]}: classification needs at least two. "
        raise DataError(problem + "An image folder holds train/CLASS/IMAGE", source)
    kept, notes = {}, []
    for name, split in splits.items():
        hidden = int((split.labels < 0).sum())
        if name not in ("train", "validation", "test"):
            notes.append(f"split {name!r} is not used")
        elif hidden and name == "train":
            first = split.describe(int(np.flatnonzero(split.labels < 0)[0]))
            raise DataError(
                f"{hidden} training image(s) have no label, such as {first}: label or remove them", source
            )
        elif hidden:
            notes.append(f"split {name!r} is not used: its labels are hidden")
        else:
            kept[name] = split
    return kept, notes


def finetune_splits(splits: dict[str, Split], labels: list[str], settings) -> ImageDataset:
    """Splits for fine-tuning: validation selects the epoch, test is evaluated once.

    With --fold, or without a validation split, validation images are held out of the training split.

    Raises:
        DataError: a split or class has no images.
    """
    source = settings.dataset
    splits, notes = labelled_splits(splits, labels, source)
    train, held_out = splits["train"], False
    if settings.fold:
        number, count = map(int, settings.fold.split("/"))
        keep, rest = stratified_fold(train.labels, number, count)
        splits = {"train": train.take(keep), "validation": replace(train.take(rest), name="validation")}
        notes.append(
            f"fold {settings.fold} of the training split is the validation split; the others are not used"
        )
    elif "validation" not in splits:
        held_out = True
        keep, rest = stratified_split(train.labels, settings.validation_fraction, settings.seed)
        splits |= {"train": train.take(keep), "validation": replace(train.take(rest), name="validation")}
        notes.append(
            f"no validation split: {len(rest)} of {len(train)} training images held out "
            f"(--validation_fraction {settings.validation_fraction}, stratified, seed {settings.seed})"
        )
    if not len(splits["validation"]):
        fix = "use fewer folds" if settings.fold else "give a class two images or more"
        raise DataError(f"no image falls to the validation split: {fix}", source)
    check_training_classes(splits["train"], labels, source)
    for name in ("validation", "test"):
        if name in splits:
            present = set(splits[name].labels.tolist())
            if absent := [label for i, label in enumerate(labels) if i not in present]:
                notes.append(f"the {name} split has no images of class {', '.join(absent)}")
    limits = {"train": settings.max_train_samples}
    limits |= dict.fromkeys(("validation", "test"), settings.max_eval_samples)
    for name, limit in limits.items():
        if limit and name in splits and len(splits[name]) > limit:
            order = np.random.default_rng(settings.seed).permutation(len(splits[name]))
            splits[name] = splits[name].take(np.sort(order[:limit]))
            notes.append(f"{name}: {limit} images drawn at random (seed {settings.seed})")
    return ImageDataset(splits["train"], splits["validation"], splits.get("test"), labels, notes, held_out)


def scratch_splits(splits: dict[str, Split], labels: list[str], settings) -> ImageDataset:
    """Splits for training from scratch: train, and the one split that is evaluated after each epoch.

    That is the test split; without one the validation split; without that 10 % of train, held out. If the set
    has an evaluation split, VALIDATION_FRACTION of train is held out as ``minival``, to choose settings by.

    Raises:
        DataError: a split or class has no images, or there are not NUM_CLASSES classes.
    """
    source = settings.dataset
    splits, notes = labelled_splits(splits, labels, source)
    check_training_classes(splits["train"], labels, source)
    check_class_count(source, labels, settings.config["NUM_CLASSES"])
    evaluated = splits.get("test") or splits.get("validation")
    if evaluated and "test" not in splits:
        notes.append(f"no test split: evaluating the validation split ({len(evaluated)} images)")
    if evaluated:
        check_all_classes(source, evaluated.name, [labels[i] for i in np.unique(evaluated.labels)], labels)
    train, validation = splits["train"], None if "test" in splits else evaluated
    dataset = ImageDataset(train, validation, splits.get("test"), labels, notes, held_out=not evaluated)
    fraction = settings.config["VALIDATION_FRACTION"] or (0.0 if evaluated else 0.1)
    if not fraction:
        return dataset
    kept, rest = stratified_split(train.labels, fraction, settings.seed)
    kind = "minival" if evaluated else "validation"
    why = "" if evaluated else "no test and no validation split: "
    notes.append(f"{why}{kind}: {len(rest)} training images held out (stratified, seed {settings.seed})")
    parts: dict[str, Any] = {"train": train.take(kept), kind: replace(train.take(rest), name=kind)}
    return replace(dataset, **parts)


def check_training_classes(train: Split, labels: list[str], source: str) -> None:
    """Raise `DataError` if a class has no training images."""
    counts = np.bincount(train.labels, minlength=len(labels))
    if empty := [labels[i] for i in np.flatnonzero(counts == 0)]:
        raise DataError(
            f"no training images of class {', '.join(empty)}: add some, or remove the class", source
        )
