"""Every bad setting is refused before anything starts, with its flag, its value and a fix; all at once."""

import json
import os
import socket
import subprocess
import sys

import pytest
from helpers import ROOT, save_tiny_vit, write_folder

# (flags, a part of the message, the machine if it matters)
BAD = [
    # numbers, words and switches
    ("--batch_size 0", "--batch_size 0: must be a whole number >= 1"),
    ("--batch_size 1.5", "--batch_size 1.5: must be a whole number >= 1"),
    ("--learning_rate 0", "--learning_rate 0: must be a number > 0"),
    ("--learning_rate nan", "--learning_rate nan: must be a number > 0"),
    ("--learning_rate inf", "--learning_rate inf: must be a number > 0"),
    ("--warmup_ratio 1.1", "--warmup_ratio 1.1: must be a number >= 0 and <= 1"),
    ("--weight_decay -1", "--weight_decay -1: must be a number >= 0"),
    ("--num_epoch many", "--num_epoch many: must be a whole number >= 1"),
    ("--tp_size 0", "--tp_size 0: must be a whole number >= 1"),
    ("--validation_fraction 0", "--validation_fraction 0: must be a number > 0 and <= 0.9"),
    ("--offload_optim_frac 2", "--offload_optim_frac 2: must be a number >= 0 and <= 1"),
    (
        "--plugin ddp",
        "--plugin ddp: must be one of torch_ddp, torch_ddp_fp16, low_level_zero, gemini, torch_fsdp, "
        "hybrid_parallel, none",
    ),
    ("--precision int8", "--precision int8: must be one of fp32, fp16, bf16"),
    ("--augmentation", "--augmentation: no such option"),
    ("--batch 8", "--batch 8: no such option"),
    ("--mixup -1", "--mixup -1: must be a number >= 0"),
    ("--layer_decay 0", "--layer_decay 0: must be a number > 0 and <= 1"),
    ("--drop_path 1", "--drop_path 1: must be a number >= 0 and <= 0.99"),
    ("--auto_augment trivial", "--auto_augment trivial: follows the random crop; add --augment"),
    ("--patience 2 --keep last", "--patience 2: waits for a better epoch, not with --keep last"),
    ("--freeze head", "--freeze head: must be `backbone` or a number of layers, such as 6"),
    ("--freeze -1", "--freeze -1: must be `backbone` or a number of layers"),
    ("--freeze 5", "--freeze 5: the model has 4 layers; use at most 4, or backbone"),
    (
        "--plugin hybrid_parallel --pp_size 2 --freeze backbone",
        "--freeze backbone: the first of 2 pipeline stages would have nothing to train; use --freeze 1",
        dict(world=2),
    ),
    (
        "--plugin hybrid_parallel --pp_size 2 --freeze 2",
        "--freeze 2: the first of 2 pipeline stages would have nothing to train; use --freeze 1 or less",
        dict(world=2),
    ),
    (
        "--plugin hybrid_parallel --pp_size 4 --freeze 1",
        "--freeze 1: the first of 4 pipeline stages would have nothing to train; use --freeze 0 or less",
        dict(world=4),
    ),
    ("--lora_rank -1", "--lora_rank -1: must be a whole number >= 0"),
    ("--lora_alpha 8", "--lora_alpha 8: is a factor of LoRA; add --lora_rank 16"),
    (
        "--lora_rank 8 --freeze 2",
        "--lora_rank 8: trains the classifier and LoRA alone, and --freeze something",
    ),
    ("--lora_rank 8 --compile", "--lora_rank 8: is not tested with --compile and --cuda_graphs"),
    ("--lora_rank 8", "--lora_rank 8: PEFT is not installed", dict(without="peft")),
    (
        "--lora_rank 8 --plugin gemini",
        "--lora_rank 8: gemini has no LoRA in Colossal-AI (its support_lora() is False); use torch_ddp, "
        "torch_ddp_fp16, low_level_zero, hybrid_parallel",
    ),
    ("--lora_rank 8 --plugin torch_fsdp", "--lora_rank 8: torch_fsdp has no LoRA in Colossal-AI"),
    ("--lora_rank 8 --plugin none", "--lora_rank 8: none has no Booster, which adds it"),
    (
        "--lora_rank 8 --plugin hybrid_parallel --tp_size 2",
        "--lora_rank 8: Colossal-AI's LoRA cannot be cut by tensor parallelism; use TP_SIZE=1",
        dict(world=2),
    ),
    (
        "--lora_rank 8 --plugin hybrid_parallel --pp_size 2",
        "--lora_rank 8: pipeline stages are cut from a bare ViT, and PEFT wraps it; use PP_SIZE=1",
        dict(world=2),
    ),
    ("--class_weights inverse", "--class_weights inverse: must be one of none, balanced"),
    ("--selection_metric f1", "--selection_metric f1: must be one of accuracy, loss, macro_f1"),
    ("--selection_metric loss --keep last", "--selection_metric loss: chooses the best epoch, not with"),
    ("--augment --auto_augment all", "--auto_augment all: must be one of trivial, rand"),
    ("--fold 6/5", "--fold 6/5: must be K/N"),
    ("--fold 0/5", "--fold 0/5: must be K/N"),
    ("--fold 1", "--fold 1: must be K/N"),
    ("--push_to_hub beans", "--push_to_hub beans: must be OWNER/NAME"),
    # layouts
    (
        "--plugin hybrid_parallel --pp_size 2 --zero_stage 1 --precision bf16 --layer_decay 0.7",
        "--layer_decay 0.7: ZeRO of Colossal-AI needs a part",
        dict(world=4),
    ),
    (
        "--plugin hybrid_parallel --tp_size 2 --pp_size 2",
        "--tp_size 2 x --pp_size 2 = 4 does not divide the 2 process(es): set GPUNUM to a multiple of 4",
        dict(world=2),
    ),
    (
        "--plugin hybrid_parallel --tp_size 3",
        "--tp_size 3: does not divide the 4 attention heads",
        dict(world=3),
    ),
    ("--plugin hybrid_parallel --pp_size 5", "--pp_size 5: more stages than the 4 layers", dict(world=5)),
    (
        "--plugin hybrid_parallel --pp_size 4 --num_microbatches 2",
        "--num_microbatches 2: fewer than the 4 stages",
        dict(world=4),
    ),
    (
        "--plugin hybrid_parallel --pp_size 2 --num_microbatches 3",
        "--num_microbatches 3: does not divide --batch_size 32",
        dict(world=2),
    ),
    (
        "--plugin hybrid_parallel --pp_size 2 --batch_size 31",
        "--batch_size 31: does not divide into 2 or more micro-batches",
        dict(world=2),
    ),
    # precision
    (
        "--plugin torch_ddp_fp16 --precision bf16",
        "--precision bf16: torch_ddp_fp16 trains in fp16; use torch_ddp for it",
    ),
    (
        "--plugin torch_ddp --precision fp16",
        "--precision fp16: torch_ddp trains in fp32, bf16; use torch_ddp_fp16 for it",
    ),
    (
        "--plugin gemini --precision fp32",
        "--precision fp32: gemini trains in fp16, bf16; choose fp16 or bf16",
    ),
    (
        "--plugin low_level_zero --precision bf16",
        "--precision bf16: this GPU has no bf16 units",
        dict(gpus=1, bf16=False),
    ),
    # ZeRO, offload, optimizer, compiler
    (
        "--plugin low_level_zero --zero_stage 0",
        "--zero_stage 0: low_level_zero shards something by definition; use 1 or 2, or torch_ddp",
    ),
    (
        "--plugin hybrid_parallel --zero_stage 1 --precision fp32",
        "--zero_stage with --precision fp32: hybrid_parallel shards 16-bit training only",
        dict(world=2),
    ),
    (
        "--plugin gemini --offload_optim_frac 1",
        "--offload_optim_frac 1.0: there is no GPU to offload from; set it to 0",
    ),
    (
        "--plugin torch_ddp --offload_optim_frac 1",
        "--offload_optim_frac 1.0: torch_ddp keeps all its states",
        dict(gpus=1),
    ),
    (
        "--plugin low_level_zero --offload_param_frac 0.5",
        "--offload_param_frac 0.5: low_level_zero keeps all parameters; gemini offloads them",
        dict(gpus=1),
    ),
    (
        "--plugin hybrid_parallel --offload_optim_frac 1",
        "hybrid_parallel offloads with --zero_stage 1 or 2 only",
        dict(gpus=1),
    ),
    ("--placement_policy auto", "--placement_policy auto: is gemini's, on a GPU"),
    ("--optimizer hybrid_adam", "--optimizer hybrid_adam: its kernels need a GPU; use adamw"),
    (
        "--plugin gemini --precision bf16 --optimizer hybrid_adam --max_norm 1 --offload_optim_frac 1",
        "Colossal-AI skips the clipping; use --optimizer adamw",
        dict(gpus=1),
    ),
    ("--plugin gemini --compile", "--compile: gemini"),
    ("--preset fast --plugin gemini --compile", "--compile: gemini", dict(gpus=1)),
    (
        "--tensorboard",
        "--tensorboard: it is not installed; `pip install tensorboard`, or leave it out",
        dict(without="tensorboard"),
    ),
    (
        "--plugin hybrid_parallel --tp_size 2 --compile",
        "--compile: is not tested with tensor parallelism; use TP_SIZE=1",
        dict(world=2),
    ),
    (
        "--preset fast --plugin torch_ddp --cuda_graphs --optimizer hybrid_adam",
        "--cuda_graphs with --optimizer hybrid_adam: its step cannot be recorded",
        dict(gpus=1),
    ),
    (
        "--plugin hybrid_parallel --pp_size 2 --compile",
        "--compile: is not tested with pipeline parallelism; use PP_SIZE=1",
        dict(world=2),
    ),
    # files
    ("--image_size 18", "--image_size 18: no multiple of the 4 px patches"),
    (
        "--output_path full",
        "--output_path full: is not empty; continue that run with --resume auto, replace it "
        "with --overwrite_output",
    ),
    (
        "--output_path full --resume auto",
        "--output_path full: is not empty and holds no run to resume; set OUTPUT_PATH to another folder",
    ),
    (
        "--output_path finished --resume auto",
        "--output_path finished: holds a finished run and no checkpoint to resume",
    ),
    ("--output_path a_file/below", "/a_file is a file"),
    ("--output_path a_file", "--output_path a_file: is a file"),
    (
        "--output_path finished --resume full",
        "--output_path finished: is not empty; continue that run with --resume auto",
    ),
    (
        "--output_path bare --overwrite_output",
        "--overwrite_output: bare would lose config.json, and holds no run that they are of; set OUTPUT_PATH",
    ),
    ("--resume nowhere", "--resume nowhere: no such checkpoint folder"),
    ("--resume auto --overwrite_output", "--resume with --overwrite_output"),
    (
        "--model_name_or_path nowhere",
        "--model_name_or_path nowhere: no such folder, and no preset (vit-demo,",
    ),
    ("--model_name_or_path bare", "--model_name_or_path bare: has a config.json, but no weights beside it"),
    ("--model_name_or_path bert", "--model_name_or_path bert: is a 'bert' model; this example trains ViTs"),
    ("--model_name_or_path full", "--model_name_or_path full: the folder has no readable config.json"),
    ("--dataset ./nowhere", "--dataset ./nowhere: no such folder or file"),
]


@pytest.mark.parametrize(
    "line, message, machine", [(*case, {})[:3] for case in BAD], ids=[line for line, *_ in BAD]
)
def test_bad_setting_is_named_with_a_fix(problems, tmp_path, line, message, machine):
    for folder in ("full", "bert", "bare", "finished"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "finished" / "metrics.jsonl").write_text('{"kind": "run"}\n{"kind": "end", "seconds": 1.0}\n')
    (tmp_path / "a_file").touch()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    found = problems(line, **machine)
    assert len(found) == 1 and message in found[0]


def test_model_that_averages_its_patches_is_not_cut(problems, tmp_path):
    (tmp_path / "mean").mkdir()
    (tmp_path / "mean" / "config.json").write_text('{"model_type": "ijepa"}')
    found = problems(f"--model_name_or_path {tmp_path}/mean --plugin hybrid_parallel")[0]
    assert found.startswith("--plugin hybrid_parallel: Colossal-AI cannot shard")


def test_overwriting_spares_what_the_run_is_made_from(parse, problems, tmp_path):
    out = save_tiny_vit(tmp_path / "out")
    write_folder(out, {"train": 6, "validation": 3})
    (out / "metrics.jsonl").write_text('{"kind": "run"}\n')
    found = problems("--output_path out --overwrite_output --model_name_or_path out")[0]
    assert found.startswith("--overwrite_output: out holds out, which this run is made from")
    assert parse("--output_path out --overwrite_output --dataset out").overwrite_output  # the images stay
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "train.log").touch()
    assert parse("--output_path new --overwrite_output").overwrite_output  # nothing is lost


def test_a_run_that_was_started_from_another_ones_checkpoint_can_be_started_again(parse, problems, tmp_path):
    for name, last in (("started", "epoch"), ("done", "end")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"kind": "run"}}\n{{"kind": "{last}"}}\n')
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    assert parse("--output_path started --resume other").resume == "other"
    assert "done: is not empty" in problems("--output_path done --resume other")[0]
    (tmp_path / "started" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "started" / "checkpoints" / "1" / "meta.json").touch()
    assert "started: is not empty" in problems("--output_path started --resume other")[0]


def test_more_processes_than_gpus_are_refused(problems, monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert problems("", gpus=2) == ["4 processes on a machine with 2 GPU(s): set GPUNUM to at most 2"]


def test_all_problems_are_reported_together(problems):
    line = "--batch_size 0 --plugin hybrid_parallel --tp_size 3 --precision fp64 --dataset ./nowhere"
    found = problems(f"{line} --image_size 18 --what", world=4)
    parts = ["--batch_size 0", "does not divide the 4 process(es)", "attention heads", "--precision fp64"]
    parts += ["./nowhere", "--image_size 18", "--what"]
    for part in parts:
        assert sum(part in problem for problem in found) == 1, part
    assert len(found) == len(parts)


def test_folder_named_like_a_preset_wins(parse, tmp_path):
    save_tiny_vit(tmp_path / "vit-demo", num_attention_heads=2)
    settings = parse("--model_name_or_path vit-demo --plugin hybrid_parallel --tp_size 2", world=2)
    assert settings.layout.tensor_size == 2


@pytest.mark.parametrize("silent", [True, False], ids=["silent hub", "refusing hub"])
def test_unreachable_hub_is_one_error_and_no_long_wait(tmp_path, silent):
    with socket.socket() as hub:  # connections wait here for ever, as behind a firewall; or are refused
        hub.bind(("127.0.0.1", 0))
        if silent:
            hub.listen()
        own = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        environment = own | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}"}
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
    missing = "model google/vit-base-patch16-224 and dataset AI-Lab-Makerere/beans"
    assert run.stderr.startswith(f"error: {missing}: ")
    for part in ("does not answer", "MODEL=", "DATASET=", "drawn", "vit-demo"):
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
    assert settings.notes == ("the HuggingFace hub does not answer: using the cached copies",)
