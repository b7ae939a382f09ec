"""The frozen record of a run, and what is derived from it."""

import json
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
from helpers import ROOT, settings

import args
from args import finetune_parser
from vit.checkpoint import differences
from vit.config import load_config
from vit.config_settings import config_problems, to_settings
from vit.layout import ParallelLayout
from vit.settings import AUGMENTATION_DEFAULTS, DEFAULTS, Settings, augmentation_flags
from vit.system import Machine

ROWS = json.loads((ROOT / "tests" / "golden" / "row_keys.json").read_text())["keys"]


def from_config(**changes) -> Settings:
    config, problems = load_config(ROOT / "configs" / "cifar10" / "vit_lite_7_4_vanilla.py")
    assert problems + config_problems(config, 1, Machine()) == []
    return to_settings(config, "a.py", ParallelLayout(1), dataset="synthetic", output_path="out", **changes)


def recorded_names(kind: str) -> list[str]:
    """The settings in rows of ``kind``, in order."""
    return [key.removeprefix("settings.") for key in ROWS[kind] if key.startswith("settings.")]


@pytest.mark.parametrize("name", ["seed", "layout", "notes", "not_a_setting"])
def test_settings_are_frozen(name):
    with pytest.raises(FrozenInstanceError):
        setattr(settings(), name, 1)
    assert replace(settings(), seed=1).seed == 1 and settings().seed == 42


def test_every_flag_is_a_field_with_its_default():
    names = {field.name for field in fields(Settings)}
    for action in finetune_parser()._actions:
        if action.dest not in ("help", "world_size", "check"):  # of the launch, not of the run
            assert action.dest in names
            assert action.default == DEFAULTS[action.dest], action.dest


def test_record_has_the_names_of_the_rows():
    assert list(settings().record) == recorded_names("run of vit_train_demo.py")
    assert list(from_config().record) == recorded_names("run of train.py")


def test_record_is_what_a_resumed_run_must_have_again():
    one = settings("--batch_size", 4)
    for changed in (dict(output_path="other"), dict(notes=("a",)), dict(resume="auto"), dict(num_workers=3)):
        assert replace(one, **changed).record == one.record, changed
    for changed in (dict(batch_size=8), dict(seed=1), dict(dataset="other"), dict(mixup=0.5)):
        assert replace(one, **changed).record != one.record, changed


def test_a_name_of_a_config_that_came_later_had_its_default_before():
    now = from_config().record
    before = {name: value for name, value in now.items() if name != "OPTIMIZER"}
    assert differences(now, before) == ""
    assert differences(now | {"OPTIMIZER": "muon"}, before) == "OPTIMIZER is muon, was adamw"


@pytest.mark.parametrize("scale_lr, expected", [(True, 0.2), (False, 0.1)])
def test_peak_learning_rate_is_scaled_by_the_data_parallel_size(scale_lr, expected):
    chosen = Settings(learning_rate=0.1, scale_lr=scale_lr, layout=ParallelLayout(4, tensor_size=2))
    assert chosen.peak_learning_rate == expected


@pytest.mark.parametrize(
    "max_norm, precision, advice",
    [
        (0.0, "fp32", "lower --learning_rate, or set --max_norm 1"),
        (0.0, "bf16", "lower --learning_rate, or set --max_norm 1"),
        (0.0, "fp16", "lower --learning_rate, or set --max_norm 1, or use bf16 or fp32"),
        (1.0, "fp16", "lower --learning_rate, or use bf16 or fp32"),
        (1.0, "fp32", "lower --learning_rate"),
    ],
)
def test_advice_leaves_out_what_is_done_already(max_norm, precision, advice):
    assert Settings(max_norm=max_norm, precision=precision).advice_on_divergence == advice


def test_advice_has_the_names_of_config_files():
    chosen = replace(from_config(), max_norm=0.0, precision="fp16")
    expected = "lower LEARNING_RATE, or set clip_grad_norm = 1, or use bf16 or fp32"
    assert chosen.advice_on_divergence == expected


def test_augmentation_is_told_as_the_flags_that_were_typed():
    assert augmentation_flags(settings().record) == "none" == augmentation_flags({})
    typed = "--augment --auto_augment trivial --label_smoothing 0.1 --mixup 0.2 --keep last"
    assert augmentation_flags(settings(*typed.split()).record) == typed
    assert settings().record.items() >= AUGMENTATION_DEFAULTS.items()


def test_train_takes_the_same_data_flags(monkeypatch, tmp_path):
    flags: list[str] = []
    args.add_data_flags(lambda flag, *_, **__: flags.append(flag.lstrip("-")))
    assert flags == args.DATA_FLAGS
    given = dict(
        image_column="a", label_column="b", dataset_config="c", pixel_range=[0.0, 9.0], data_cache=2.0
    )
    words = [word for name, value in given.items() for word in (f"--{name}", *np.ravel(value).astype(str))]
    switches = ("allow_external_images", "skip_bad_images", "check_duplicates")
    found = scratch(monkeypatch, tmp_path, *words, *(f"--{name}" for name in switches))
    assert {name: getattr(found, name) for name in flags} == given | dict.fromkeys(switches, True)


def scratch(monkeypatch, tmp_path, *flags) -> Settings:
    """Of train.py with its first config and synthetic images."""
    config = ROOT / "configs" / "cifar10" / "vit_lite_7_4_vanilla.py"
    monkeypatch.setenv("DATA", "synthetic")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which it sets itself, for the rest of the process
    return args.parse_scratch(["--config", str(config), "--output_path", str(tmp_path / "out"), *flags])


@pytest.mark.parametrize("flags", [["--pixel_range", "0", "9"], ["--skip_bad_images"]])
def test_resumed_train_notices_that_images_are_read_otherwise(monkeypatch, tmp_path, flags):
    """With the flag, and without it where the checkpoint had it."""
    name, value = flags[0].lstrip("-"), [0.0, 9.0] if flags[1:] else True
    usual, changed = scratch(monkeypatch, tmp_path).record, scratch(monkeypatch, tmp_path, *flags).record
    saved = json.loads(json.dumps(changed))
    assert differences(changed, saved) == differences(usual, usual) == ""
    assert differences(changed, usual) == f"{name} is {value}, was {DEFAULTS[name]}"
    assert differences(usual, saved) == f"{name} is {DEFAULTS[name]}, was {value}"
