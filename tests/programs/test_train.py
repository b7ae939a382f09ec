"""train.py, config.py, feed.py and cifar.py: configs, CIFAR-10 in its forms, augmentation, and whole runs
that are the same in every mode.

python tests/test_train.py FOLDER      runs the cases, as the fixture `runs` does
"""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path


import numpy as np
import pytest
import torch
from golden import checkpoints
from PIL import Image
from train_cases import ROOT, Cases, free_port, log_of, rows, statuses

from data import find_scratch_source, load_scratch_dataset
from vit.config import (
    AMP_TYPE,
    FIELDS,
    ConfigError,
    config_problems,
    docstring,
    load_config,
    parse_overrides,
    vit_config,
)
from vit.data.cifar10 import CIFAR10_FOLDER
from vit.data.dataset import IGNORE_INDEX, DataError
from vit.data.gpu_augment import OPERATIONS, BatchAugment, apply_operations, counter_uniform, magnitude_of
from vit.data.loaders import DeviceLoader

CONFIGS = sorted((ROOT / "configs" / "cifar10").glob("*.py"))
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def write_cifar(root: Path, per_file: int = 12, test: int = 23) -> Path:
    """torchvision's folder with a few noisy one-coloured images; 60 for training."""
    folder = root / CIFAR10_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    files = {f"data_batch_{i}": per_file for i in range(1, 6)} | {"test_batch": test}
    for name, count in files.items():
        if count:
            labels = [i % 10 for i in range(count)]
            pixels = rng.integers(0, 156, (count, 3, 1024)) + 10 * np.array(labels)[:, None, None]
            batch = {
                "data": pixels.astype(np.uint8).reshape(count, -1),
                "labels": labels,
                "batch_label": name,
            }
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": list(CLASSES), "num_vis": 3072}, protocol=2)
    )
    return folder


def read(folder, size: int = 32, classes: int = 10, skip_bad: bool = False, **values):
    """feed.read with a config of defaults."""
    defaults = {name: default for name, (default, _) in FIELDS.items()}
    return load_scratch_dataset(
        str(folder), defaults | {"IMG_SIZE": size, "NUM_CLASSES": classes} | values, skip_bad=skip_bad
    )


# ---------------------------------------------------------------------------------------------- configs


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def problems_of(path, *overrides: str, world: int = 4) -> list[str]:
    config, problems = load_config(str(path), list(overrides))
    return problems + config_problems(config, world)


PUBLISHED = """
from colossalai.amp import AMP_TYPE

TOTAL_BATCH_SIZE = 4096
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.3

TENSOR_PARALLEL_SIZE = 4
TENSOR_PARALLEL_MODE = '1d'

NUM_EPOCHS = 300
WARMUP_EPOCHS = 32

parallel = dict(
    pipeline=1,
    tensor=dict(mode=TENSOR_PARALLEL_MODE, size=TENSOR_PARALLEL_SIZE),
)

fp16 = dict(mode=AMP_TYPE.TORCH, )

gradient_accumulation = 2

BATCH_SIZE = TOTAL_BATCH_SIZE // gradient_accumulation

clip_grad_norm = 1.0

LOG_PATH = f"./vit_{TENSOR_PARALLEL_MODE}_bs{BATCH_SIZE}_{fp16['mode']}/"
"""


def test_published_imagenet_config_loads_as_it_stands(tmp_path):
    path = write(tmp_path / "vit_1d.py", PUBLISHED.replace("'1d'", "'2d'"))
    config, problems = load_config(path, ["TOTAL_BATCH_SIZE=1024"])
    assert problems + config_problems(config, world=8) == []
    assert (config["BATCH_SIZE"], config["precision"], config["mode"], config["tp"]) == (512, "fp16", "2d", 4)
    assert config["LOG_PATH"] == "./vit_2d_bs512_AMP_TYPE.TORCH/"
    vit = vit_config(config)  # ViT-S/16
    assert (
        vit.image_size,
        vit.hidden_size,
        vit.num_hidden_layers,
        vit.intermediate_size,
        vit.num_labels,
    ) == (224, 384, 12, 1536, 1000)


def test_published_one_with_heads_that_tensor_parallelism_cannot_cut_is_refused(tmp_path):
    (message,) = problems_of(write(tmp_path / "vit_1d.py", PUBLISHED))
    assert message.startswith("NUM_HEADS 6: is no multiple of the tensor parallel size 4")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_this_repository_fit_and_have_a_card(path):
    assert problems_of(path, world=8) == []
    config, _ = load_config(str(path))
    recipe = (620, 256, 8e-4) if path.stem.endswith("_long") else (200, 512, 2e-3)
    assert (config["NUM_EPOCHS"], config["TOTAL_BATCH_SIZE"], config["LEARNING_RATE"]) == recipe
    assert all(word in docstring(str(path)) for word in ("Command", "Measured", path.stem))


def test_every_problem_is_named_at_once(tmp_path):
    text = (
        "NUM_EPOCH = 3\nLEARNING_RATE = 'fast'\nWARMUP_EPOCHS = 9\nTOTAL_BATCH_SIZE = "
        "30\nHIDDEN_SIZE = 30\nNUM_HEADS = 4\nNUM_EPOCHS = 5\n"
    )
    found = problems_of(write(tmp_path / "a.py", text), "SEED=-1", "SEEDS=1")
    for part in (
        "NUM_EPOCH = 3",
        "did you mean NUM_EPOCHS",
        "LEARNING_RATE = 'fast'",
        "WEIGHT_DECAY is missing",
        "SEED = -1",
        "--set SEEDS=1",
        "no multiple of NUM_HEADS",
        "BATCH_SIZE 30: is no multiple of the 4",
    ):
        assert any(part in message for message in found), (part, found)


@pytest.mark.parametrize(
    ("overrides", "world", "said"),
    [
        (["TENSOR_PARALLEL_SIZE=6"], 1, ["1 process(es)", "must be a square"]),
        (
            ["fp16={'mode': 'torch'}", "bf16=True", "IMG_SIZE=30", "parallel={'pipeline': 0}"],
            4,
            ["give one of them", "PATCH_SIZE 4", "pipeline 0: must be"],
        ),
        (
            ["gradient_accumulation=3", "BATCH_SIZE=100", "HIDDEN_SIZE=30"],
            6,
            ["TOTAL_BATCH_SIZE 512", "NUM_HEADS 4", "6 process(es)", "hidden size 30"],
        ),
    ],
)
def test_one_problem_hides_no_other(overrides, world, said):
    (path,) = (path for path in CONFIGS if path.stem.endswith("_2d"))
    found = problems_of(path, *overrides, world=world)
    assert len(found) == len(said) and all(any(part in message for message in found) for part in said), found


def test_lists_and_imported_functions_are_taken(tmp_path):
    path = write(
        tmp_path / "own.py",
        CONFIGS[-1].read_text()
        + "\nfrom math import sqrt\nLEARNING_RATE = sqrt(4e-6)\nMEAN = STD = [0.5, 0.5, 0.5]\n",
    )
    config, problems = load_config(path)
    assert problems + config_problems(config, 1) == [] and config["LEARNING_RATE"] == pytest.approx(2e-3)
    assert hash((config["MEAN"], config["STD"]))  # Normalize keeps them by it


def test_values_on_the_command_line_are_expressions_as_in_a_config():
    values, problems = parse_overrides(
        [
            "parallel=dict(pipeline=2, tensor=dict(mode='1d', size=2))",
            "LEARNING_RATE=1e-3*2",
            "AUTO_AUGMENT=cifar10",
            "LOG_PATH=./runs/a-1",
            "fp16=dict(mode=AMP_TYPE.TORCH)",
            "seed=7",
        ]
    )
    assert (
        problems == []
        and values["parallel"] == {"pipeline": 2, "tensor": {"mode": "1d", "size": 2}}
        and values["SEED"] == 7
    )
    assert (values["LEARNING_RATE"], values["AUTO_AUGMENT"], values["LOG_PATH"]) == (
        2e-3,
        "cifar10",
        "./runs/a-1",
    )
    assert values["fp16"] == {"mode": AMP_TYPE.TORCH}


@pytest.mark.parametrize(
    ("overrides", "world", "said"),
    [
        (["TENSOR_PARALLEL_MODE=2d", "TENSOR_PARALLEL_SIZE=8"], 8, "must be a square"),
        (["TENSOR_PARALLEL_MODE=3d", "TENSOR_PARALLEL_SIZE=4"], 4, "must be a cube"),
        (
            ["TENSOR_PARALLEL_MODE=2.5d", "TENSOR_PARALLEL_SIZE=8", "TENSOR_PARALLEL_DEPTH=4"],
            8,
            "depth x a square",
        ),
        (["TENSOR_PARALLEL_MODE=2d", "TENSOR_PARALLEL_SIZE=4"], 6, "6 process(es)"),
        (["TENSOR_PARALLEL_MODE=2d", "TENSOR_PARALLEL_SIZE=4", "NUM_HEADS=1"], 4, "number of heads 1"),
        (
            ["TENSOR_PARALLEL_MODE=2d", "TENSOR_PARALLEL_SIZE=4", "parallel={'pipeline': 2}"],
            8,
            "goes with 1d and vanilla",
        ),
        (
            ["TENSOR_PARALLEL_SIZE=4", "TENSOR_PARALLEL_MODE=2d", "DROP_PATH=0.1"],
            4,
            "DROP_PATH 0.1: goes with 1d and vanilla",
        ),
        (["TENSOR_PARALLEL_MODE=4d"], 4, "must be one of"),
        (["LEARNING_RATE=1e999"], 4, "must be a number > 0"),
        (["TENSOR_PARALLEL_SIZE=2"], 4, "needs a mode"),
        (["parallel={'data': 2}"], 4, "data parallelism follows"),
        (["gradient_accumulation=3", "BATCH_SIZE=100"], 4, "TOTAL_BATCH_SIZE 512"),
        (["fp16={'mode': 'torch'}", "bf16=True"], 4, "give one of them"),
        (["fp16={'mode': 'int8'}"], 4, "AMP_TYPE.TORCH"),
        (["parallel={'pipeline': 8}"], 8, "more stages than the 7 layers"),
        (["RAND_AUGMENT=(2, 31)"], 4, "RAND_AUGMENT = (2, 31): must be None"),
        (["RAND_AUGMENT=(2, 0, 1)"], 4, "RAND_AUGMENT = (2, 0, 1): must be None"),
        (["RAND_AUGMENT=(2, 9)"], 4, "AUTO_AUGMENT and RAND_AUGMENT: give one"),
        (["RANDOM_RESIZED_CROP=0.3"], 4, "RANDOM_RESIZED_CROP and RANDOM_CROP_PADDING 4"),
        (["RANDOM_RESIZED_CROP=0"], 4, "RANDOM_RESIZED_CROP = 0: must be a number > 0"),
        (["WARMUP_STEPS=100"], 4, "WARMUP_EPOCHS 40 and WARMUP_STEPS 100"),
        (["WARMUP_EPOCHS=None"], 4, "WARMUP_EPOCHS is missing"),
        (
            ["POSITIONS=sincos", "HIDDEN_SIZE=30", "NUM_HEADS=2"],
            4,
            "POSITIONS 'sincos': needs a HIDDEN_SIZE that is a multiple of 4",
        ),
        (
            ["INITIAL_WEIGHTS=mimetic", "HIDDEN_SIZE=30", "NUM_HEADS=2"],
            4,
            "INITIAL_WEIGHTS 'mimetic': needs a HIDDEN_SIZE",
        ),
        (["CUDA_GRAPHS=True"], 4, "CUDA_GRAPHS: needs a GPU"),
        (
            ["POOLING=mean", "TENSOR_PARALLEL_MODE=1d", "TENSOR_PARALLEL_SIZE=2"],
            4,
            "POOLING 'mean': only goes with data parallelism",
        ),
        (
            ["POSITIONS=sincos", "TENSOR_PARALLEL_MODE=2d", "TENSOR_PARALLEL_SIZE=4"],
            4,
            "POSITIONS 'sincos': only goes with data parallelism",
        ),
        (["COMPILE=True", "parallel={'pipeline': 2}"], 4, "COMPILE True: only goes with data parallelism"),
        (["MIXUP=-1"], 4, "MIXUP = -1"),
        (["MIX_EPOCHS=3"], 4, "MIX_EPOCHS 3: nothing is mixed"),
    ],
)
def test_sizes_that_do_not_fit(overrides, world, said):
    assert any(said in message for message in problems_of(CONFIGS[-1], *overrides, world=world))


@pytest.mark.parametrize(
    "text, said",
    [
        ("a: 1\nb: [", "line 2"),
        ("\0", "is not a Python file"),
        ("A = 1\nB = 1 / 0", "line 2: ZeroDivisionError"),
        ("A = 1\nraise SystemExit(0)", "line 2: SystemExit"),
    ],
)
def test_what_is_not_a_python_file_is_one_clear_error(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said):
        load_config(write(tmp_path / "a.py", text))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path / "none.py"))


# ---------------------------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def folder(cifar_folder) -> Path:
    return cifar_folder


def test_three_formats_hold_the_same_images(folder, tmp_path):
    import datasets

    ours = read(folder)
    assert len(ours.train) == 60 and len(ours.test) == 23 and ours.validation is None
    assert ours.label_names == list(CLASSES) and ours.train.resized[0].shape == (3, 32, 32)
    columns = {}
    for split in (ours.train, ours.test):
        files = []
        for i, (pixels, label) in enumerate(zip(split.resized, split.labels)):
            file = tmp_path / "images" / split.name / CLASSES[label] / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(file)
            files.append(str(file))
        columns[split.name] = {"img": files, "label": split.labels.tolist()}
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    (tmp_path / "parquet").mkdir()
    for name, column in columns.items():
        # with the bytes in it, as on the hub
        embedded = {
            "img": [{"bytes": Path(p).read_bytes(), "path": None} for p in column["img"]],
            "label": column["label"],
        }
        datasets.Dataset.from_dict(embedded, features).to_parquet(
            str(tmp_path / "parquet" / f"{name}-00000-of-00001.parquet")
        )
    for form in ("images", "parquet"):
        found = read(tmp_path / form)
        assert found.validation is None and found.label_names == list(CLASSES)
        for split, expected in ((found.train, ours.train), (found.test, ours.test)):
            # the order is the format's own
            key = lambda s: sorted(
                (int(label), np.asarray(pixels).tobytes()) for pixels, label in zip(s.resized, s.labels)
            )  # noqa: E731
            assert key(split) == key(expected), form


def test_without_a_test_split_validation_is_held_out(tmp_path):
    images = read(write_cifar(tmp_path, test=0).parent)
    assert images.test is None and len(images.validation) == 10 and len(images.train) == 50
    assert "no test and no validation split: validation: 10 training images held out" in images.notes[0]


def test_fraction_is_held_out_beside_the_test_split(folder):
    images = read(folder, VALIDATION_FRACTION=0.2)
    assert (len(images.train), len(images.minival), len(images.test), images.validation) == (48, 12, 23, None)
    whole = {np.asarray(pixels).tobytes() for pixels in read(folder).train.resized}
    parts = [
        {np.asarray(pixels).tobytes() for pixels in split.resized} for split in (images.train, images.minival)
    ]
    assert parts[0] | parts[1] == whole and not parts[0] & parts[1]


def test_damaged_folders_are_named(tmp_path):
    folder = write_cifar(tmp_path)
    whole = (folder / "data_batch_2").read_bytes()
    (folder / "data_batch_2").write_bytes(whole[:1000])
    with pytest.raises(DataError, match="data_batch_2 is damaged"):
        read(folder)
    for function in (os.getcwd, np.load):  # a pickle that would call something
        (folder / "data_batch_2").write_bytes(pickle.dumps(function))
        with pytest.raises(DataError, match="it names"):
            read(folder)
    (folder / "data_batch_2").unlink()
    with pytest.raises(DataError, match="lacks data_batch_2"):
        find_scratch_source(str(folder), 10, 32)
    with pytest.raises(DataError, match="^DATA="):
        find_scratch_source(str(tmp_path / "none"), 10, 32)


def test_classes_and_size_are_compared_before_anything_is_read(folder):
    assert find_scratch_source(str(folder), 10, 32) == CIFAR10_FOLDER
    with pytest.raises(DataError, match="10 classes, NUM_CLASSES is 11"):
        find_scratch_source(str(folder), 11, 32)
    with pytest.raises(DataError, match="32 px, the config's IMG_SIZE is 64"):
        find_scratch_source(str(folder), 10, 64)


def test_truncated_image_is_an_error_or_a_counted_skip(tmp_path):
    from helpers import write_folder

    folder = write_folder(tmp_path, {"train": 9, "validation": 3})
    broken = folder / "train" / "red" / "002.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match="1 unreadable image.*002.png"):
        read(folder, 16, 3)
    images = read(folder, 16, 3, skip_bad=True)
    assert len(images.train) == 8 and any("1 unreadable image(s) skipped" in note for note in images.notes)
    (missing,) = DeviceLoader(images.train, torch.device("cpu")).missing  # which each epoch's row counts
    assert "002.png" in missing


def test_resident_batches_pad_and_measure_mean_and_std(folder):
    resident = DeviceLoader(read(folder).train, torch.device("cpu"))
    batch = resident.batch([(0, 3), (0, -1), (0, 59)])
    assert batch["labels"].tolist() == [3, IGNORE_INDEX, 1]
    assert torch.equal(batch["pixel_values"][0], resident.pixels[3])
    mean, std = resident.mean_and_std()
    scaled = resident.pixels.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(scaled.transpose(0, 1).flatten(1).std(1, unbiased=False).tolist())


@pytest.mark.parametrize("together", [0, 3 * 7 * 32 * 32 * 3, 2**25])
def test_batches_augmented_together_are_those_augmented_alone(folder, monkeypatch, together):
    resident, augment = (
        DeviceLoader(read(folder).train, torch.device("cpu")),
        BatchAugment(5, 32, padding=4, policy="cifar10"),
    )
    order = [
        [(epoch, i) for i in range(first, first + 6)] + [(epoch, -1)]
        for epoch in (0, 1)
        for first in range(0, 48, 6)
    ]
    monkeypatch.setattr("vit.data.loaders.AUGMENT_BYTES", together)
    batches = list(resident.batches(order[3:], augment))  # from the middle of an epoch, as after a resume
    assert len(batches) == len(order) - 3
    for pairs, batch in zip(order[3:], batches):
        alone = resident.batch(pairs, augment)
        assert torch.equal(batch["pixel_values"], alone["pixel_values"]) and torch.equal(
            batch["labels"], alone["labels"]
        )


# ---------------------------------------------------------------------------------------------- augmentation


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Smooth images, one of noise, one of few levels, one of a single colour."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (5, 3, 8, 8), generator=generator).float()
    pixels = torch.nn.functional.interpolate(small, (32, 32), mode="bicubic").clamp(0, 255).to(torch.uint8)
    pixels[2] = torch.randint(0, 256, (3, 32, 32), generator=generator)
    pixels[3] = pixels[3] // 64 * 64
    pixels[4] = 77
    return pixels


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_torchvisions_on_single_images(pictures, name):
    from torchvision.transforms import AutoAugment, InterpolationMode
    from torchvision.transforms.autoaugment import _apply_op

    for bin in (0, 3, 9):
        magnitude = magnitude_of(name, bin, 32)
        theirs = AutoAugment()._augmentation_space(10, (32, 32))[name][0]
        assert theirs.ndim == 0 or magnitude == pytest.approx(theirs[bin].item(), abs=1e-4)
        for sign in (1, -1) if OPERATIONS.index(name) < 9 else (1,):
            ours = apply_operations(
                pictures, torch.full((5,), OPERATIONS.index(name)), torch.full((5,), sign * magnitude)
            )
            expected = torch.stack(
                [_apply_op(p, name, sign * magnitude, InterpolationMode.NEAREST, None) for p in pictures]
            )
            difference = (ours.int() - expected.int()).abs()
            # blends are cut off to whole numbers, where fp32 is just below one or not
            assert difference.max() <= (1 if name in ("Brightness", "Color", "Contrast", "Sharpness") else 0)


@pytest.mark.parametrize("bins, bin", [(31, 9), (31, 30), (11, 10)])
def test_rand_augments_magnitudes_are_torchvisions(bins, bin):
    from torchvision.transforms import RandAugment

    theirs = RandAugment(2, bin, bins)._augmentation_space(bins, (32, 32))
    assert set(theirs) == set(OPERATIONS) - {"Invert"} | {"Identity"}
    augment = BatchAugment(0, 32, rand_augment=(2, bin, bins))
    for name, ours in zip(OPERATIONS, augment.rand_magnitudes.tolist()):
        if name != "Invert":
            magnitudes, signed = theirs[name]
            assert ours == pytest.approx(magnitudes[bin].item() if magnitudes.ndim else 0.0, abs=1e-4), name
            assert signed == (OPERATIONS.index(name) <= OPERATIONS.index("Sharpness"))


def test_rand_augment_draws_layers_of_torchvisions_operations(pictures):
    """Every image is one of those that torchvision's operations make, each operation as often."""
    from torchvision.transforms import InterpolationMode, RandAugment
    from torchvision.transforms.autoaugment import _apply_op

    source, count = pictures[0], 2800
    ours = BatchAugment(5, 32, rand_augment=(1, 9, 31))(
        source.expand(count, -1, -1, -1), 2, torch.arange(count)
    )
    made = {}
    for name, (magnitudes, signed) in RandAugment()._augmentation_space(31, (32, 32)).items():
        magnitude = magnitudes[9].item() if magnitudes.ndim else 0.0
        made |= {
            (name, sign): _apply_op(source, name, sign * magnitude, InterpolationMode.NEAREST, None)
            for sign in ((1, -1) if signed else (1,))
        }
    difference = torch.stack(
        [(ours.int() - expected.int()).abs().amax((1, 2, 3)) for expected in made.values()]
    )
    nearest, which = difference.min(0)
    assert nearest.max() <= 1
    found = torch.bincount(which, minlength=len(made)).tolist()
    times = {name: 0 for name, _ in made}
    for (name, _), number in zip(made, found):
        times[name] += number
    assert all(140 < number < 260 for number in times.values()), times  # of 200
    both = BatchAugment(5, 32, rand_augment=(2, 9, 31))(source.expand(100, -1, -1, -1), 2, torch.arange(100))
    assert (both != ours[:100]).flatten(1).any(
        1
    ).float().mean() > 0.7  # the first layer's draws are the same, the second changes more


def test_each_image_has_its_own_operation(pictures):
    operation = torch.tensor([0, 6, -1, 11, 4])
    magnitude = torch.tensor([0.2, 0.5, 0.0, 0.0, -20.0])
    mixed = apply_operations(pictures, operation, magnitude)
    alone = [
        apply_operations(pictures[i : i + 1], operation[i : i + 1], magnitude[i : i + 1]) for i in range(5)
    ]
    assert torch.equal(mixed, torch.cat(alone)) and torch.equal(mixed[2], pictures[2])


def test_augmentation_follows_seed_epoch_and_image_alone(pictures):
    pixels, index = pictures[[0, 1, 2, 3] * 16], torch.arange(64)
    augment = BatchAugment(7, 32, padding=4, flip=True, policy="cifar10")
    whole = augment(pixels, 3, index)
    assert whole.dtype == torch.uint8 and whole.shape == pixels.shape
    assert torch.equal(whole[40:], augment(pixels[40:], 3, index[40:]))  # in another batch
    assert torch.equal(whole, BatchAugment(7, 32, 4, True, "cifar10")(pixels, 3, index))
    for other in (augment(pixels, 4, index), BatchAugment(8, 32, 4, True, "cifar10")(pixels, 3, index)):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9
    assert len({image.numpy().tobytes() for image in whole}) > 50  # of 64, of 4 pictures


def test_crop_takes_every_offset_and_pads_with_black():
    pixels = torch.full((4000, 3, 8, 8), 9, dtype=torch.uint8)
    cropped = BatchAugment(0, 8, padding=2)(pixels, 0, torch.arange(4000))
    black = (cropped[:, 0] == 0).all(1).sum(1), (cropped[:, 0] == 0).all(2).sum(1)
    for counts in black:  # offsets -2 ... 2, equally likely
        assert torch.bincount(counts).tolist() == pytest.approx([800, 1600, 1600], rel=0.15)
    ramp = torch.arange(8, dtype=torch.uint8).expand(100, 3, 8, 8)
    flipped = BatchAugment(0, 8, flip=True)(ramp, 0, torch.arange(100))
    assert 30 < (flipped[:, 0, 0, 0] == 7).sum() < 70


def test_draws_are_uniform_and_unrelated():
    draws = counter_uniform(1, 2, torch.arange(20000), 8)
    assert 0 <= draws.min() and draws.max() < 1
    assert (draws.mean(0) - 0.5).abs().max() < 0.01 and (draws.std(0) - 12**-0.5).abs().max() < 0.01
    assert (torch.corrcoef(draws.T) - torch.eye(8)).abs().max() < 0.03
    neighbours = torch.corrcoef(
        torch.stack([draws[:-1, 0], draws[1:, 0], counter_uniform(1, 3, torch.arange(20000), 1)[1:, 0]])
    )
    assert (neighbours - torch.eye(3)).abs().max() < 0.03


# ---------------------------------------------------------------------------------------------- runs

# 60 images, 16 a step: three whole steps and one of 12, two epochs; some steps are clipped
TINY = [
    "PATCH_SIZE=8",
    "HIDDEN_SIZE=16",
    "DEPTH=2",
    "NUM_HEADS=2",
    "TOTAL_BATCH_SIZE=16",
    "NUM_EPOCHS=2",
    "WARMUP_EPOCHS=1",
    "LEARNING_RATE=0.01",
    "clip_grad_norm=0.8",
    "DROPOUT=0",
]
PLAIN = ["RANDOM_CROP_PADDING=0", "AUTO_AUGMENT=None"]
TWO, MIMETIC = "TENSOR_PARALLEL_SIZE=2", "INITIAL_WEIGHTS=mimetic"
DRAWN = [
    "DROPOUT=0.1",
    "DROP_PATH=0.3",
    "EMA=0.8",
    "MIXUP=0.2",
]  # each process draws, and must go on drawing alike after a resume
RUNS = {  # name -> config, processes, overrides
    "vanilla": ("vanilla", 1, PLAIN),
    "vanilla, accumulated": ("vanilla", 2, [*PLAIN, "gradient_accumulation=2"]),
    "1d": ("1d", 2, [*PLAIN, TWO]),
    "pipeline": ("vanilla", 2, [*PLAIN, "parallel={'pipeline': 2}"]),
    "2d": ("2d", 4, PLAIN),
    "2.5d": ("2p5d", 4, PLAIN),
    "2d fp16": ("2d", 4, [*PLAIN, "fp16={'mode': 'torch'}"]),
    "vanilla straight": ("vanilla", 1, [MIMETIC]),
    "2d straight": ("2d", 4, [MIMETIC, "EMA=0.8"]),
    "1d straight": ("1d", 2, [TWO, MIMETIC, *DRAWN]),
    "dropped paths": ("vanilla", 1, [MIMETIC, "DROP_PATH=0.5"]),
    "mixed": ("vanilla", 1, ["CUTMIX=1.0"]),
    "mixed at first": ("vanilla", 1, ["CUTMIX=1.0", "MIX_EPOCHS=1"]),
}
STRAIGHT = {name.split()[0]: run for name, run in RUNS.items() if name.endswith(" straight")}
SAME = ["vanilla, accumulated", "1d", "pipeline", "2d", "2.5d"]


def run_cases(root: Path) -> None:
    """Every run of `RUNS`, and interrupted ones."""
    cases = Cases(root)

    def start(name: str, config: str, processes: int, overrides: list[str], *options: str, **stop) -> None:
        cases.start(
            name,
            f"cifar10/vit_lite_7_4_{config}.py",
            root / CIFAR10_FOLDER,
            processes,
            [*TINY, *overrides],
            *options,
            **stop,
        )

    for name, case in RUNS.items():
        start(name, *case)
    for config, (_, processes, overrides) in STRAIGHT.items():
        start(f"{config} resumed", config, processes, overrides, stop_at_step=4)
        start(f"{config} resumed", config, processes, [*overrides, "SEED=1"], "--resume", "auto")  # refused
        start(f"{config} resumed", config, processes, overrides, "--resume", "auto")
    golden(root)


def golden(root: Path) -> None:
    """A run that goes on from the golden checkpoint of train.py; while recording, the runs that make it before."""
    config, overrides = "cifar10/vit_lite_7_4_vanilla.py", [*TINY, MIMETIC, *DRAWN]
    (root / "golden").mkdir()
    os.chdir(root)  # its settings name the images from here
    cases, data = Cases(root / "golden"), Path(cifar.FOLDER)
    if checkpoints.RECORD:
        cases.start("straight", config, data, 1, overrides)
        cases.start("stopped", config, data, 1, overrides, stop_at_step=4)
        (stopped,) = (root / "golden" / "stopped" / "checkpoints").glob("*/meta.json")
        checkpoints.keep("train.py", stopped.parent)
    cases.start("resumed", config, data, 1, overrides, "--resume", str(checkpoints.FOLDER / "train.py"))


@pytest.fixture(scope="module")
def runs(train_runs) -> Path:
    """The folder of all runs."""
    return train_runs


@pytest.mark.parametrize("name", list(RUNS))
def test_run_ends_well_and_learns(runs, name):
    (codes,) = statuses(runs / name)
    assert codes == [0] * RUNS[name][1], log_of(runs / name)
    first, last = rows(runs / name)
    assert last["train_loss"] < first["train_loss"] and last["images"] == 23
    assert sorted(p.name for p in (runs / name).iterdir()) == [
        "README.md",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "metrics.png",
        "model.safetensors",
        "preprocessor_config.json",
    ]


@pytest.mark.parametrize("name", SAME)
def test_every_mode_follows_vanilla(runs, name):
    from safetensors.torch import load_file

    for expected, row in zip(rows(runs / "vanilla"), rows(runs / name), strict=True):
        for number in ("train_loss", "average_loss", "accuracy"):
            assert row[number] == pytest.approx(expected[number], abs=1e-4), (row["epoch"], number)
    expected, weights = (load_file(runs / run / "model.safetensors") for run in ("vanilla", name))
    assert expected.keys() == weights.keys()
    for key in expected:
        assert (weights[key] - expected[key]).abs().max() < 5e-3, (
            key
        )  # a key's bias has no gradient but noise, and Adam's steps


def test_fp16_in_slices_stays_near(runs):
    for expected, row in zip(rows(runs / "vanilla"), rows(runs / "2d fp16"), strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=0.02)


def test_modes_start_and_augment_alike(runs):
    for expected, row in zip(rows(runs / "vanilla straight"), rows(runs / "2d straight"), strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
    assert rows(runs / "vanilla straight")[0]["train_loss"] != pytest.approx(
        rows(runs / "vanilla")[0]["train_loss"], abs=1e-4
    )


def test_draws_and_averages_change_the_result(runs):
    for name in ("1d straight", "dropped paths"):
        assert rows(runs / name)[0]["train_loss"] != pytest.approx(
            rows(runs / "vanilla straight")[0]["train_loss"], abs=1e-3
        )
    assert rows(runs / "2d straight")[1]["average_loss"] != pytest.approx(
        rows(runs / "vanilla straight")[1]["average_loss"], abs=1e-3
    )


def test_runs_are_compared_in_a_table_and_a_chart(runs, capsys):
    from report import main

    main(["accuracy", str(runs)])
    lines = [
        line.strip("|").split("|")
        for line in (runs / "table.md").read_text().splitlines()
        if line.startswith("|")
    ]
    header, *body = [[cell.strip() for cell in line] for line in (lines[0], *lines[2:])]
    found = {line[0]: dict(zip(header, line)) for line in body}
    assert header[-1] == "differs from 1d resumed"  # of the settings that several runs have, the first
    assert (
        found["1d resumed"]["seed"] == "42 42"
        and found["1d resumed"]["accuracy"].endswith("± 0.0000")
        and found["1d resumed"][header[-1]] == ""
    )
    assert found["mixed"]["accuracy"] == f"{rows(runs / 'mixed')[-1]['accuracy']:.4f}"
    assert "CUTMIX 1.0, MIX_EPOCHS 1, mode vanilla" in found["mixed at first"][header[-1]]
    accuracies = [float(line["accuracy"].split(" ")[0]) for line in found.values()]
    assert accuracies == sorted(accuracies, reverse=True)
    assert (runs / "epochs.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        main(["accuracy", str(runs / "mixed")])
    assert "holds no finished runs of run_accuracy.sh" in capsys.readouterr().err


def test_process_that_waits_for_the_others_ends_at_once():
    """A store that nobody opens.

    The library waits for it for minutes, and no handler in Python would be called.
    """
    code = (
        "import signal; from vit import distributed; distributed.import_libraries(); "
        "signal.signal(signal.SIGTERM, lambda *_: None); print('waits', flush=True); "
        "distributed.init_distributed(0)"
    )
    environment = os.environ | {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "waits\n"
    time.sleep(2)  # into the library
    process.terminate()
    assert process.wait(timeout=60) == -signal.SIGTERM


def test_mixing_ends_after_its_epochs(runs):
    whole, part, never = (rows(runs / name) for name in ("mixed", "mixed at first", "vanilla straight"))
    assert part[0]["train_loss"] == whole[0]["train_loss"] != never[0]["train_loss"]
    assert part[1]["train_loss"] < whole[1]["train_loss"] - 1e-3


@pytest.mark.parametrize("config", list(STRAIGHT))
def test_run_stopped_within_an_epoch_goes_on_as_if_it_had_not(runs, config):
    from safetensors.torch import load_file

    name = f"{config} resumed"
    stopped, refused, resumed = statuses(runs / name)
    assert set(stopped) == {128 + signal.SIGTERM} and set(refused) == {2} and set(resumed) == {0}, log_of(
        runs / name
    )
    assert "SEED is 1, was 42" in log_of(runs / name) and "epoch 2, step 1 of 4" in log_of(runs / name)
    for expected, row in zip(rows(runs / f"{config} straight"), rows(runs / name), strict=True):
        assert (row["train_loss"], row["average_loss"]) == pytest.approx(
            (expected["train_loss"], expected["average_loss"]), abs=1e-6
        )
    expected, weights = (load_file(runs / run / "model.safetensors") for run in (f"{config} straight", name))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["vanilla", "1d", "2d"])
def test_result_opens_in_vit_predict_and_judges_alike(runs, name, tmp_path):
    import vit_predict

    test = read(runs / CIFAR10_FOLDER).test
    for i, pixels in enumerate(test.resized):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / f"{i:02d}.png")
    said = io.StringIO()
    with redirect_stdout(said):
        assert vit_predict.main(["--model", str(runs / name), "--format", "json", str(tmp_path)]) == 0
    guesses = [image["predictions"][0]["label"] for image in json.loads(said.getvalue())]
    right = sum(guess == CLASSES[label] for guess, label in zip(guesses, test.labels))
    assert right / 23 == pytest.approx(rows(runs / name)[-1]["accuracy"])
    card = (runs / name / "README.md").read_text()
    assert "trained from scratch" in card and "base_model" not in card and "Test split (23 images)" in card


def refused(monkeypatch, capsys, *argv: str, data: str | None = None) -> str:
    from args import parse_scratch

    monkeypatch.delenv("DATA", raising=False)
    if data:
        monkeypatch.setenv("DATA", data)
    with pytest.raises(SystemExit) as end:
        parse_scratch(list(argv))
    assert end.value.code == 2
    return capsys.readouterr().err


def test_command_line_says_all_that_is_wrong(monkeypatch, capsys, tmp_path):
    said = refused(
        monkeypatch,
        capsys,
        "--config",
        str(CONFIGS[1]),
        "--set",
        "NUM_EPOCHS=0",
        "--rank",
        "1",
        "--output_path",
        str(tmp_path / "out"),
    )
    for part in (
        "DATA: set this",
        "NUM_EPOCHS = 0",
        "1 process(es): tensor parallel size 4",
        "--world_size, --local_rank, --host, --port: missing",
    ):
        assert part in said, said
    assert "--config: name a config" in refused(monkeypatch, capsys)
    assert "no such folder" in refused(monkeypatch, capsys, "--config", str(CONFIGS[-1]), data="/none/there")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").touch()
    assert "DATA: set this" in refused(
        monkeypatch,
        capsys,
        "--config",
        str(CONFIGS[-1]),
        "--overwrite_output",
        "--output_path",
        str(tmp_path / "out"),
    )
    cropped = ("--config", str(CONFIGS[-1]), "--set", "RANDOM_RESIZED_CROP=0.3", "RANDOM_CROP_PADDING=0")
    assert "RANDOM_RESIZED_CROP 0.3: is for image files" in refused(
        monkeypatch, capsys, *cropped, data=str(write_cifar(tmp_path))
    )
    by_hand = ("--world_size", "2", "--rank", "1", "--local_rank", "0", "--port", "29500", "--host")
    for host in ("no.such.machine.invalid", "two..dots"):
        assert "there is no machine of that name" in refused(
            monkeypatch, capsys, "--config", str(CONFIGS[-1]), *by_hand, host
        )


def test_every_process_started_by_hand_says_what_is_wrong(tmp_path):
    by_hand = ("--world_size=2", "--rank=1", "--local_rank=0", "--host=127.0.0.1", "--port=29500")
    environment = {name: value for name, value in os.environ.items() if name != "DATA"}
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", *by_hand, f"--config={CONFIGS[-1]}"],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert run.returncode == 2 and "DATA: set this environment variable" in run.stderr and run.stdout == ""


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]))
