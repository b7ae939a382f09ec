"""Every bad setting is refused before anything starts, with its flag, its value and a mend.

All of them at once.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys

import pytest
from helpers import ROOT, save_tiny_vit, write_folder

from args import parse_finetune
from vit.run_folder import recorded_command


@pytest.fixture
def parse(monkeypatch, tmp_path, image_folder, model_folder):
    """-> settings of a command line on a machine with ``gpus`` GPUs, in ``world`` processes.

    Local model and images.
    """
    monkeypatch.chdir(tmp_path)

    def parse(line="", gpus=0, world=1, bf16=True, local=True, without=""):
        monkeypatch.setattr(
            "args.find_spec", lambda name: None if name == without else importlib.util.find_spec(name)
        )
        monkeypatch.setattr("args.gpu_count", lambda: gpus)
        monkeypatch.setattr("args.gpu_has_bf16", lambda: bf16)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        words = ["--model_name_or_path", str(model_folder), "--dataset", str(image_folder)] if local else []
        return parse_finetune([*words, "--world_size", str(world), *line.split()])

    return parse


@pytest.fixture
def problems(parse, capsys):
    def problems(line, **machine):
        with pytest.raises(SystemExit) as end:
            parse(line, **machine)
        assert end.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines and all(line.startswith("error: ") for line in lines)
        return [line.removeprefix("error: ") for line in lines]

    return problems


def test_settings_of_the_fixture_are_good(parse):
    assert parse().notes == []


BAD = [
    # numbers, words and switches
    ("--batch_size 0", {}, "--batch_size 0: must be a whole number >= 1"),
    ("--batch_size 1.5", {}, "--batch_size 1.5: must be a whole number >= 1"),
    ("--learning_rate 0", {}, "--learning_rate 0: must be a number > 0"),
    ("--learning_rate nan", {}, "--learning_rate nan: must be a number > 0"),
    ("--warmup_ratio 1.1", {}, "--warmup_ratio 1.1: must be a number >= 0 and <= 1"),
    ("--weight_decay -1", {}, "--weight_decay -1: must be a number >= 0"),
    ("--num_epoch many", {}, "--num_epoch many: must be a whole number >= 1"),
    ("--tp_size 0", {}, "--tp_size 0: must be a whole number >= 1"),
    ("--validation_fraction 0", {}, "--validation_fraction 0: must be a number > 0 and <= 0.9"),
    ("--offload_optim_frac 2", {}, "--offload_optim_frac 2: must be a number >= 0 and <= 1"),
    (
        "--plugin ddp",
        {},
        "--plugin ddp: must be one of torch_ddp, torch_ddp_fp16, low_level_zero, gemini, hybrid_parallel",
    ),
    ("--precision int8", {}, "--precision int8: must be one of fp32, fp16, bf16"),
    ("--augmentation", {}, "--augmentation: no such option"),
    ("--batch 8", {}, "--batch 8: no such option"),  # no abbreviations: a typing error is not another flag
    ("--mixup -1", {}, "--mixup -1: must be a number >= 0"),
    ("--layer_decay 0", {}, "--layer_decay 0: must be a number > 0 and <= 1"),
    ("--drop_path 1", {}, "--drop_path 1: must be a number >= 0 and <= 0.99"),
    ("--auto_augment trivial", {}, "--auto_augment trivial: follows the random crop; add --augment"),
    ("--augment --auto_augment all", {}, "--auto_augment all: must be one of trivial, rand"),
    ("--fold 6/5", {}, "--fold 6/5: must be K/N"),
    ("--fold 0/5", {}, "--fold 0/5: must be K/N"),
    ("--fold 1", {}, "--fold 1: must be K/N"),
    ("--push_to_hub beans", {}, "--push_to_hub beans: must be OWNER/NAME"),
    # layouts
    (
        "--plugin hybrid_parallel --pp_size 2 --zero_stage 1 --precision bf16 --layer_decay 0.7",
        dict(world=4),
        "--layer_decay 0.7: the library's ZeRO wants a part",
    ),
    (
        "--plugin hybrid_parallel --tp_size 2 --pp_size 2",
        dict(world=2),
        "--tp_size 2 x --pp_size 2 = 4 does not divide the 2 process(es): set GPUNUM to a multiple of 4",
    ),
    (
        "--plugin hybrid_parallel --tp_size 3",
        dict(world=3),
        "--tp_size 3: does not divide the 4 attention heads",
    ),
    ("--plugin hybrid_parallel --pp_size 5", dict(world=5), "--pp_size 5: more stages than the 4 layers"),
    (
        "--plugin hybrid_parallel --pp_size 4 --num_microbatches 2",
        dict(world=4),
        "--num_microbatches 2: fewer than the 4 stages",
    ),
    (
        "--plugin hybrid_parallel --pp_size 2 --num_microbatches 3",
        dict(world=2),
        "--num_microbatches 3: does not divide --batch_size 32",
    ),
    (
        "--plugin hybrid_parallel --pp_size 2 --batch_size 31",
        dict(world=2),
        "--batch_size 31: does not divide into 2 or more micro-batches",
    ),
    # precision
    (
        "--plugin torch_ddp_fp16 --precision bf16",
        {},
        "--precision bf16: torch_ddp_fp16 trains in fp16; use torch_ddp for it",
    ),
    (
        "--plugin torch_ddp --precision fp16",
        {},
        "--precision fp16: torch_ddp trains in fp32, bf16; use torch_ddp_fp16 for it",
    ),
    (
        "--plugin gemini --precision fp32",
        {},
        "--precision fp32: gemini trains in fp16, bf16; choose fp16 or bf16",
    ),
    (
        "--plugin low_level_zero --precision bf16",
        dict(gpus=1, bf16=False),
        "--precision bf16: this GPU has no bf16 units",
    ),
    # ZeRO, offload, optimizer, compiler
    (
        "--plugin low_level_zero --zero_stage 0",
        {},
        "--zero_stage 0: low_level_zero shards something by definition; use 1 or 2, or torch_ddp",
    ),
    (
        "--plugin hybrid_parallel --zero_stage 1 --precision fp32",
        dict(world=2),
        "--zero_stage with --precision fp32: hybrid_parallel shards 16-bit training only",
    ),
    (
        "--plugin gemini --offload_optim_frac 1",
        {},
        "--offload_optim_frac 1.0: there is no GPU to offload from; set it to 0",
    ),
    (
        "--plugin torch_ddp --offload_optim_frac 1",
        dict(gpus=1),
        "--offload_optim_frac 1.0: torch_ddp keeps all its states",
    ),
    (
        "--plugin low_level_zero --offload_param_frac 0.5",
        dict(gpus=1),
        "--offload_param_frac 0.5: only gemini offloads parameters",
    ),
    (
        "--plugin hybrid_parallel --offload_optim_frac 1",
        dict(gpus=1),
        "hybrid_parallel offloads with --zero_stage 1 or 2 only",
    ),
    ("--placement_policy auto", {}, "--placement_policy auto: is gemini's, on a GPU"),
    ("--optimizer hybrid_adam", {}, "--optimizer hybrid_adam: its kernels need a GPU; use adamw"),
    (
        "--plugin gemini --precision bf16 --optimizer hybrid_adam --max_norm 1 --offload_optim_frac 1",
        dict(gpus=1),
        "the library skips the clipping; use --optimizer adamw",
    ),
    ("--plugin gemini --compile", {}, "--compile: gemini"),
    ("--plugin hybrid_parallel --tp_size 2 --compile", dict(world=2), "--compile: tensor parallelism"),
    # files
    ("--image_size 18", {}, "--image_size 18: no multiple of the 4 px patches"),
    (
        "--output_path full",
        {},
        "--output_path full: is not empty; continue that run with --resume auto, replace it "
        "with --overwrite_output",
    ),
    (
        "--output_path full --resume auto",
        {},
        "--output_path full: is not empty and holds no run to resume; set OUTPUT_PATH to another folder",
    ),
    (
        "--output_path finished --resume auto",
        {},
        "--output_path finished: holds a finished run and no checkpoint to go on from",
    ),
    ("--output_path a_file/below", {}, "/a_file is a file"),
    ("--learning_rate inf", {}, "--learning_rate inf: must be a number > 0"),
    (
        "--plugin hybrid_parallel --pp_size 2 --compile",
        {"world": 2},
        "--compile: pipeline parallelism is not proved with it; use PP_SIZE=1",
    ),
    ("--output_path a_file", {}, "--output_path a_file: is a file"),
    (
        "--output_path finished --resume full",
        {},
        "--output_path finished: is not empty; continue that run with --resume auto",
    ),
    (
        "--output_path bare --overwrite_output",
        {},
        "--overwrite_output: bare would lose config.json, and holds no run that they are of; set OUTPUT_PATH",
    ),
    (
        "--tensorboard",
        dict(without="tensorboard"),
        "--tensorboard: it is not installed; `pip install tensorboard`, or leave it out",
    ),
    (
        "--preset fast --plugin torch_ddp --cuda_graphs --optimizer hybrid_adam",
        dict(gpus=1),
        "--cuda_graphs with --optimizer hybrid_adam: its step cannot be recorded",
    ),
    ("--resume nowhere", {}, "--resume nowhere: no such checkpoint folder"),
    ("--resume auto --overwrite_output", {}, "--resume with --overwrite_output"),
    (
        "--model_name_or_path nowhere",
        {},
        "--model_name_or_path nowhere: no such folder, and no preset (vit-demo,",
    ),
    (
        "--model_name_or_path bare",
        {},
        "--model_name_or_path bare: has a config.json, but no weights beside it",
    ),
    (
        "--model_name_or_path bert",
        {},
        "--model_name_or_path bert: is a 'bert' model; this example trains ViTs",
    ),
    ("--model_name_or_path full", {}, "--model_name_or_path full: the folder has no readable config.json"),
    ("--dataset ./nowhere", {}, "--dataset ./nowhere: no such folder or file"),
]


def test_model_that_averages_its_patches_is_not_cut(problems, tmp_path):
    (tmp_path / "mean").mkdir()
    (tmp_path / "mean" / "config.json").write_text('{"model_type": "ijepa"}')
    assert problems(f"--model_name_or_path {tmp_path}/mean --plugin hybrid_parallel")[0].startswith(
        "--plugin hybrid_parallel: the library cannot cut"
    )


@pytest.mark.parametrize("line, machine, message", BAD, ids=[line for line, _, _ in BAD])
def test_bad_setting_is_named_with_a_mend(problems, tmp_path, line, machine, message):
    for folder in ("full", "bert", "bare"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "metrics.jsonl").write_text('{"kind": "run"}\n{"kind": "end", "seconds": 1.0}\n')
    (tmp_path / "a_file").touch()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    found = problems(line, **machine)
    assert len(found) == 1 and message in found[0]


def test_overwriting_spares_what_the_run_is_made_from(parse, problems, tmp_path):
    out = save_tiny_vit(tmp_path / "out")
    write_folder(out, {"train": 6, "validation": 3})
    (out / "metrics.jsonl").write_text('{"kind": "run"}\n')
    assert problems("--output_path out --overwrite_output --model_name_or_path out")[0].startswith(
        "--overwrite_output: out holds out, which this run is made from"
    )
    assert parse("--output_path out --overwrite_output --dataset out").overwrite_output  # the images stay
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "train.log").touch()
    assert parse("--output_path new --overwrite_output").overwrite_output  # nothing is lost


def test_a_run_that_was_begun_from_another_ones_checkpoint_can_be_begun_again(parse, problems, tmp_path):
    for name, last in (("begun", "epoch"), ("done", "end")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"kind": "run"}\n{"kind": "%s"}\n' % last)
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    assert parse("--output_path begun --resume other").resume == "other"
    assert "done: is not empty" in problems("--output_path done --resume other")[0]
    (tmp_path / "begun" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "begun" / "checkpoints" / "1" / "meta.json").touch()
    assert "begun: is not empty" in problems("--output_path begun --resume other")[0]


def test_more_processes_than_gpus_are_refused(problems, monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert problems("", gpus=2) == ["4 processes on a machine with 2 GPU(s): set GPUNUM to at most 2"]


def test_all_problems_are_reported_together(problems):
    line = (
        "--batch_size 0 --plugin hybrid_parallel --tp_size 3 --precision fp64 --dataset "
        "./nowhere --image_size 18 --what"
    )
    found = problems(line, world=4)
    for part in (
        "--batch_size 0",
        "does not divide the 4 process(es)",
        "attention heads",
        "--precision fp64",
        "./nowhere",
        "--image_size 18",
        "--what",
    ):
        assert sum(part in problem for problem in found) == 1, part
    assert len(found) == 7


def test_published_settings_are_taken_with_one_line(parse):
    settings = parse("--tp_size 2 --pp_size 2 --plugin gemini", gpus=1)
    assert settings.notes == [
        "TP_SIZE and PP_SIZE are for hybrid_parallel; gemini runs data parallel on all 1"
    ]
    assert (settings.layout.dp, settings.layout.tp, settings.layout.pp) == (1, 1, 1)


def test_published_settings_run(one):
    result = one["published settings"]
    assert result["code"] == 0, result["err"]
    assert result["out"].count("TP_SIZE and PP_SIZE are for hybrid_parallel") == 1
    assert "Evaluation result for epoch 1: average_loss=" in result["out"]


PUBLISHED = {
    "torch_ddp": "fp32",
    "torch_ddp_fp16": "fp16",
    "low_level_zero": "fp16",
    "gemini": "fp16",
    "hybrid_parallel": "fp16",
}


@pytest.mark.parametrize("plugin, precision", PUBLISHED.items())
def test_published_preset_is_the_default_with_a_gpu(parse, plugin, precision):
    settings = parse(f"--plugin {plugin}", gpus=1)
    assert (settings.preset, settings.precision, settings.grad_checkpoint) == ("published", precision, True)
    assert settings.offload_optim_frac == (1.0 if plugin == "gemini" else 0.0)
    recipe = (
        settings.batch_size,
        settings.learning_rate,
        settings.num_epoch,
        settings.weight_decay,
        settings.warmup_ratio,
        settings.seed,
    )
    assert recipe == (32, 1e-4, 3, 0.05, 0.3, 42) and not settings.augment


@pytest.mark.parametrize("bf16, expected", [(True, "bf16"), (False, "fp16")])
def test_fast_preset_is_16_bit_without_recomputation_and_offload(parse, bf16, expected):
    settings = parse("--preset fast --plugin gemini", gpus=1, bf16=bf16)
    assert (settings.precision, settings.grad_checkpoint, settings.offload_optim_frac) == (
        expected,
        False,
        0.0,
    )


def test_defaults_follow_the_machine(parse):
    settings = parse(local=False)
    assert (settings.model_name_or_path, settings.dataset, settings.plugin, settings.precision) == (
        "vit-demo",
        "drawn",
        "torch_ddp",
        "fp32",
    )
    assert len(settings.notes) == 1 and "no GPU" in settings.notes[0]


@pytest.mark.parametrize(
    "given, expected", [("", 8), ("--batch_size 6", 6), ("--batch_size 4 --num_microbatches 2", 2)]
)
def test_microbatches_divide_the_batch(parse, given, expected):
    settings = parse(f"--plugin hybrid_parallel --pp_size 2 {given}", world=2)
    assert settings.num_microbatches == expected and settings.batch_size % expected == 0


def test_auto_means_the_default(parse):
    line = (
        "--plugin auto --precision auto --batch_size auto --learning_rate auto --num_epoch "
        "auto --preset auto --zero_stage auto"
    )
    assert vars(parse(line)) | {"notes": 0} == vars(parse()) | {"notes": 0}


def test_check_stops_before_anything_is_done(parse, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--check")
    assert end.value.code == 0 and list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_folder_named_like_a_preset_wins(parse, tmp_path):
    save_tiny_vit(tmp_path / "vit-demo", num_attention_heads=2)
    assert parse("--model_name_or_path vit-demo --plugin hybrid_parallel --tp_size 2", world=2).layout.tp == 2


@pytest.mark.parametrize("silent", [True, False], ids=["silent hub", "refusing hub"])
def test_unreachable_hub_is_one_error_and_no_long_wait(tmp_path, silent):
    with socket.socket() as hub:  # connections wait here for ever, as behind a firewall; or are refused
        hub.bind(("127.0.0.1", 0))
        if silent:
            hub.listen()
        environment = {
            name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
        }
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.getsockname()[1]}"
        names = ["--model_name_or_path", "google/vit-base-patch16-224", "--dataset", "AI-Lab-Makerere/beans"]
        run = subprocess.run(
            [sys.executable, ROOT / "vit_train_demo.py", *names],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
            timeout=60,
        )  # 15 seconds and the start-up, which other work on the machine makes longer
    assert run.returncode == 2 and run.stdout == "" and len(run.stderr.splitlines()) == 1
    for part in (
        "google/vit-base-patch16-224",
        "AI-Lab-Makerere/beans",
        "does not answer",
        "MODEL=",
        "DATASET=",
        "drawn",
        "vit-demo",
    ):
        assert part in run.stderr


@pytest.mark.parametrize("variable, below", [("HF_HOME", ""), ("XDG_CACHE_HOME", "huggingface/")])
@pytest.mark.parametrize(
    "flag, copy",
    [
        ("--model_name_or_path", "hub/models--someone--leaves/snapshots/1"),
        ("--dataset", "hub/datasets--someone--leaves/snapshots/1"),
        ("--dataset", "datasets/someone___leaves/default"),
    ],
)
def test_cached_copies_do_without_the_hub(
    monkeypatch, tmp_path, parse, problems, variable, below, flag, copy
):
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HOME"):  # HOME: a user without one
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    assert "no copy is cached" in problems(f"{flag} someone/leaves")[0]
    (tmp_path / "cache" / below / copy).mkdir(parents=True)
    settings = parse(f"{flag} someone/leaves")
    assert settings.notes == ["the HuggingFace hub does not answer: using the cached copies"]


def test_commands_are_recorded_as_they_can_be_given_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/there/train.py", "--config", "a b.py"])
    assert recorded_command() == "python train.py --config 'a b.py'"
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert (
        recorded_command() == "python train.py --config 'a b.py'"
    )  # each started by hand, with flags that say so
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert recorded_command() == "torchrun --nproc_per_node=8 train.py --config 'a b.py'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert recorded_command() == "torchrun --nnodes=2 --nproc_per_node=4 train.py --config 'a b.py'"


def test_how_to_predict_is_said_for_where_the_run_was_started(monkeypatch):
    from vit.run_folder import predict_command

    monkeypatch.chdir(ROOT)
    assert predict_command("out").endswith(" vit_predict.py --model out IMAGE_OR_FOLDER")
    monkeypatch.chdir(ROOT / "tests")
    assert predict_command("out").endswith(" ../vit_predict.py --model out IMAGE_OR_FOLDER")
