"""The command lines of the programs: flags, the defaults that follow from the machine, and `Settings`.

All bad settings are reported together, each with its flag, its value and a fix, before anything is launched.
To add a flag: a field of `Settings` (vit/settings.py), a line here, or in vit/flags.py if programs share it,
a rule in vit/checks.py if a value can be wrong, a test, and a line in docs/. `resolve` fills in what the
machine decides.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from vit import hub
from vit.checks import data_problems, finetune_problems, hub_problems, names_on_hub, too_many_ranks
from vit.config import ConfigError, load_config
from vit.config_settings import config_problems, to_settings
from vit.console import exit_with_errors, rank
from vit.data.sources import DEMO_DATASET
from vit.files import DamagedRows, read_jsonl
from vit.flags import (
    DATA_FLAGS,
    SEED,
    add_data_flags,
    add_launch_flags,
    add_optimizer_flags,
    add_parallel_flags,
    add_plugin_flags,
)
from vit.layout import ParallelLayout
from vit.output_checks import output_problems
from vit.parallel.plugins import PEERS
from vit.parser import Parser
from vit.presets import PRESETS
from vit.resolve import (
    BASE_DATASET,
    BASE_MODEL,
    DEMO_MODEL,
    METHOD_DEFAULTS,
    Case,
    resolve_cases,
    resolve_finetune,
    set_rank_environment,
    world_size_of,
)
from vit.settings import AUTO_AUGMENT, SELECTION_METRICS, Settings
from vit.system import this_machine
from vit.tracking import TRACKER_HELP, TRACKERS
from vit.validate import Number, OneOf, fraction, positive

MODEL_DEFAULT = f"(default: {BASE_MODEL} with a GPU, else {DEMO_MODEL})"
MODEL_HELP = f"hub name, local folder, or preset ({', '.join(PRESETS)}) {MODEL_DEFAULT}"
BENCHMARK_MODEL_HELP = f"known ViT name or preset; random weights, no hub {MODEL_DEFAULT}"
DATASET_HELP = (
    f"hub name, local folder, parquet or arrow files, or {DEMO_DATASET}: synthetic leaf images "
    f"(default: {BASE_DATASET} with a GPU, else {DEMO_DATASET})"
)


# ---- flags


def finetune_parser() -> Parser:
    parser = Parser("vit_train_demo.py", "Fine-tune a Vision Transformer with a Colossal-AI plugin.")
    add = parser.add
    parser.group("most used")
    add("--model_name_or_path", str, MODEL_HELP, auto=True)
    add("--dataset", str, DATASET_HELP, auto=True)
    add("--output_path", str, "folder of the result")
    add_plugin_flags(add)
    add("--batch_size", positive(), "images per data-parallel rank and batch (default: 32)", auto=True)
    add("--learning_rate", positive(float), "peak, before scaling (default: 1e-4; vit-demo 1e-3)", auto=True)
    add("--num_epoch", positive(), "passes over the training images (default: 3; vit-demo 5)", auto=True)
    add("--image_size", Number(int, low=8), "pixels; interpolates positions (default: the model's)")
    add("--resume", str, "`auto`: the newest checkpoint in the output folder; or the path of one")

    parser.group("data")
    add_data_flags(add)
    part = positive(float, high=0.9)
    add("--validation_fraction", part, "held out of train if there is no validation split")
    add("--fold", str, "validate on fold K of N of the training split, to choose settings by", metavar="K/N")
    add("--max_train_samples", positive(), "train on this many images (default: all)")
    add("--max_eval_samples", positive(), "evaluate on this many images of each split (default: all)")
    add("--data_memory", positive(float), "GiB for decoded images (default: a quarter of the memory)")
    workers = Number(int, low=0, high=64)
    add("--num_workers", workers, "data-loading processes per rank (default: by the cores)")

    parser.group("optimisation")
    add("--scale_lr", bool, "multiply the learning rate by the data-parallel size (default: yes)")
    add("--weight_decay", Number(float, low=0), "of matrices, not of biases (default: 0.05)", auto=True)
    add("--warmup_ratio", fraction(1), "steps with a rising learning rate (default: 0.3)", auto=True)
    add_optimizer_flags(parser)
    add("--layer_decay", positive(float, high=1), "learning rate of a layer over that of the layer above it")
    add("--freeze", str, "backbone: train the classifier alone; N: not the embeddings and the first N layers")
    add("--lora_rank", Number(int, low=0), "train LoRA of this rank and the classifier alone; 0: all weights")
    add("--lora_alpha", positive(float), "LoRA is multiplied by alpha / rank (default: the rank)")
    add("--ema", fraction(0.99999), "decay of averaged weights, which are evaluated and exported; 0: none")
    epochs = OneOf(("best", "last"))
    add("--keep", epochs, "epoch to test and export: the best by --selection_metric, or the last")
    metrics = OneOf(SELECTION_METRICS)
    add("--selection_metric", metrics, "of the validation images: which epoch is best, also for --patience")
    add("--patience", positive(), "end after this many epochs without a better one (default: never)")
    add("--seed", SEED, "of initial weights, order and augmentation")

    parser.group("augmentation and regularisation")
    add("--augment", bool, "random resized crop and flip (default: off, as published)")
    policies = OneOf(tuple(AUTO_AUGMENT))
    add("--auto_augment", policies, "TrivialAugmentWide or RandAugment after the crop of --augment")
    add("--label_smoothing", fraction(), "part of each label spread over all classes in training")
    weights = OneOf(("none", "balanced"))
    add("--class_weights", weights, "balanced: weigh losses by images / (classes x images of the class)")
    add("--drop_path", fraction(), "chance that an image skips the last layer's branches; first layer: 0")
    add("--mixup", Number(float, low=0), "alpha of mixing two images and their labels; 0: never")
    add("--cutmix", Number(float, low=0), "alpha of pasting a part of one image into another; 0: never")

    parser.group("parallelism, precision and memory")
    add_parallel_flags(parser)

    parser.group("output")
    add("--checkpoint_steps", Number(int, low=0), "also save every this many steps; 0: only after each epoch")
    add("--keep_checkpoints", Number(int, low=0), "newest checkpoints kept; 0: none once the run is complete")
    add("--overwrite_output", bool, "replace a finished or interrupted run in the output folder")
    add("--tensorboard", bool, "write event files to OUTPUT_PATH/tensorboard")
    add("--report_to", OneOf(tuple(TRACKERS)), TRACKER_HELP)
    add("--push_to_hub", str, "upload the result to this model repository of the hub", metavar="OWNER/NAME")
    add("--eval_only", bool, "evaluate the model on validation and test, and stop")
    add("--dry_run", bool, "print the plan and stop")

    parser.group("advanced")
    add_launch_flags(parser)
    return parser


# ---- one function a program


def finetune_settings(argv: list[str] | None = None) -> tuple[Settings, list[str], bool]:
    """-> (settings of vit_train_demo.py, what is wrong with them, whether they are only checked)"""
    parser, machine = finetune_parser(), this_machine()
    args = parser.parse(argv)
    settings = resolve_finetune(args, machine)
    problems = parser.problems + finetune_problems(settings, machine)
    if not problems and names_on_hub(settings) and not hub.is_online():
        note = "the HuggingFace hub does not answer: using the cached copies"
        settings = replace(settings, notes=(*settings.notes, note))
    return settings, problems, args.check


def parse_finetune(argv: list[str] | None = None) -> Settings:
    """The settings of vit_train_demo.py, resolved and checked; ends the program with every problem
    otherwise.
    """
    settings, problems, only_check = finetune_settings(argv)
    end_after_checks(problems, only_check)
    hub.go_offline_if_possible(names_on_hub(settings), uploads=bool(settings.push_to_hub))
    return settings


def end_after_checks(problems: list[str], only_check: bool) -> None:
    if problems:
        exit_with_errors(*problems)
    if only_check:
        raise SystemExit(0)


def scratch_parser() -> Parser:
    parser = Parser(
        "train.py", "Train a ViT from scratch by a config file. DATA (environment) is the data set."
    )
    add = parser.add
    add("--config", str, "a Python file, such as configs/cifar10/vit_lite_7_4_vanilla.py", default=None)
    many = {"nargs": "+", "action": "extend", "default": [], "metavar": "NAME=VALUE"}
    add("--set", str, "override values of the config", **many)
    add("--output_path", str, "folder (default: LOG_PATH, or ./runs/<config name>)", auto=True, default=None)
    add("--resume", str, "`auto`: the newest checkpoint in the output folder; or the path of one")
    add("--overwrite_output", bool, "replace a finished or interrupted run in the output folder")
    add("--report_to", OneOf(tuple(TRACKERS)), TRACKER_HELP)
    parser.group("data")
    add_data_flags(add)
    parser.group("advanced")
    parser.add_check()
    parser.group("one process at a time, where no launcher says so")
    add("--world_size", Number(int, low=0), "processes in all", default=None)
    add("--rank", Number(int, low=0), "this one's rank", default=None)
    add("--local_rank", Number(int, low=0), "its rank on its machine", default=None)
    add("--host", str, "machine of rank 0", default=None)
    add("--port", Number(int, low=1, high=65535), "a port that is free there", default=None)
    return parser


def parse_scratch(argv: list[str] | None = None) -> Settings:
    """The settings of train.py, resolved and checked; ends the program with every problem otherwise."""
    parser, machine = scratch_parser(), this_machine()
    args = parser.parse(argv)
    launched = "WORLD_SIZE" in os.environ
    problems = parser.problems + set_rank_environment(args, machine)
    if launched and (problem := too_many_ranks(machine)):
        problems.append(problem)
    if args.config is None:
        exit_with_errors(
            *problems, "--config: name a config file, such as configs/cifar10/vit_lite_7_4_vanilla.py"
        )
    try:
        config, found = load_config(args.config, args.set)
    except ConfigError as error:
        exit_with_errors(*problems, str(error))
    world_size = world_size_of(args)
    problems += found + config_problems(config, world_size, machine)
    output_path = args.output_path or config["LOG_PATH"] or f"./runs/{Path(args.config).stem}"
    settings = to_settings(
        config,
        args.config,
        ParallelLayout(world_size, config["tp"], config["pp"], rank()),
        dataset=os.environ.get("DATA"),
        output_path=output_path,
        resume=args.resume,
        overwrite_output=args.overwrite_output,
        **{name: getattr(args, name) for name in (*DATA_FLAGS, "report_to")},
    )
    if not settings.dataset:
        problems.append(
            "DATA: set this environment variable to the data set: cifar-10-batches-py, an image folder, "
            "a prepared folder, a parquet copy, or synthetic"
        )
    else:
        problems += [*data_problems(settings), *hub_problems(settings)]
    end_after_checks([*problems, *output_problems(settings)], args.check)
    hub.go_offline_if_possible(names_on_hub(settings), uploads=False)
    if not launched and args.world_size:
        print(
            f"rank {rank()} of {args.world_size}: waiting for the others at {args.host}:{args.port}",
            flush=True,
        )
    return settings


METHOD_HELP = {
    "warmup_steps": "steps before the clock starts",
    "window_steps": "steps per timed window",
    "windows": "timed windows; the median is reported",
}


def benchmark_parser() -> Parser:
    parser = Parser("vit_benchmark.py", "Measure a plugin's training speed and memory on synthetic images.")
    add = parser.add
    parser.group("what is measured")
    add("--model_name_or_path", str, BENCHMARK_MODEL_HELP, auto=True)
    add_plugin_flags(add, others=tuple(PEERS))
    add("--peers", bool, "run_benchmark.sh: measure timm and transformers by themselves, too", default=False)
    add("--batch_size", positive(), "one or more; images per data-parallel rank", nargs="+", default=[8, 32])
    add("--image_size", Number(int, low=8), "pixels (default: the model's)")
    add("--num_labels", Number(int, low=2), "size of the classifier", default=1000)
    add("--learning_rate", positive(float), "constant learning rate of the timed steps", default=1e-4)
    add("--weight_decay", Number(float, low=0), "weight decay of the timed steps", default=0.05)
    add_optimizer_flags(parser)
    parser.group("parallelism, precision and memory")
    add_parallel_flags(parser)
    parser.group("how it is measured")
    for name, (with_gpu, without) in METHOD_DEFAULTS.items():
        text = f"{METHOD_HELP[name]} (default: {with_gpu}; {without} without a GPU)"
        add(f"--{name}", positive(), text, auto=True, default=None)
    add("--mem_cap", positive(float), "GiB of each GPU that may be used (default: all)", default=None)
    add("--seed", SEED, "of weights and images")
    add("--results", str, "file to append one JSON row per case to", default="./benchmark_results/rows.jsonl")
    add("--remeasure", bool, "measure cases again that the results hold already", default=False)
    parser.group("advanced")
    add_launch_flags(parser)
    return parser


def benchmark_cases(argv: list[str] | None = None) -> tuple[list[Case], argparse.Namespace, list[str]]:
    """-> (a case for each batch size, the flags, what is wrong with these)"""
    parser = benchmark_parser()
    args = parser.parse(argv)
    cases, problems = resolve_cases(args, this_machine())
    try:
        read_jsonl(Path(args.results))
    except FileNotFoundError:
        pass
    except DamagedRows as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"--results {args.results}: {error.strerror}; name a file in another folder")
    return cases, args, parser.problems + problems


def parse_benchmark(argv: list[str] | None = None) -> tuple[list[Case], argparse.Namespace]:
    """The cases of vit_benchmark.py, and its flags; ends the program with every wrong flag otherwise."""
    cases, args, problems = benchmark_cases(argv)
    end_after_checks(problems, args.check)
    return cases, args
