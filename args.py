"""The command lines of the programs: flags, the defaults that follow from the machine, and `Settings`.

All bad settings are reported together, each with its flag, its value and a fix, before anything is launched.
To add a flag: a field of `Settings` (vit/settings.py), a line in a `add_..._flags` function here, a rule in
vit/checks.py if a value can be wrong, a test, and a line in docs/. `resolve` fills in what the machine decides.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from vit import hub
from vit.checks import (
    data_problems,
    finetune_problems,
    hub_problems,
    model_problems,
    names_on_hub,
    output_problems,
    plugin_problems,
)
from vit.config import ConfigError, load_config
from vit.config_settings import config_problems, to_settings
from vit.console import exit_with_errors, rank
from vit.data.sources import DEMO_DATASET
from vit.data.transforms import POLICIES
from vit.layout import ParallelLayout
from vit.parallel.plugins import PLUGINS
from vit.presets import PRESETS, known_architecture
from vit.settings import DEFAULTS, Settings
from vit.system import Machine, host_exists, this_machine
from vit.validate import Number, OneOf, fraction, positive

# The published runs fine-tune a pretrained ViT; vit-demo is trained from scratch on synthetic leaf images.
TRAINING_DEFAULTS = {
    "batch_size": 32,
    "learning_rate": 1e-4,
    "num_epoch": 3,
    "weight_decay": 0.05,
    "warmup_ratio": 0.3,
    "augment": False,
}
DEMO_DEFAULTS = TRAINING_DEFAULTS | {"learning_rate": 5e-4, "num_epoch": 8}
DEMO_MODEL, BASE_MODEL, BASE_DATASET = "vit-demo", "google/vit-base-patch16-224", "AI-Lab-Makerere/beans"
SEED = Number(int, low=0, high=2**31 - 1)


class HelpFormatter(argparse.HelpFormatter):
    """Shows a default that is a value; one that follows from something is named in the help text."""

    def _get_help_string(self, action):
        text = action.help or ""
        shows = action.option_strings and action.default not in (None, False, argparse.SUPPRESS, [])
        return text if "default:" in text or not shows else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse, but bad values are collected in ``problems`` instead of ending the program at the first one."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        self.problems: list[str] = []
        self.section = self  # where `add` puts flags

    def group(self, title: str) -> None:
        """Start a group of flags in --help."""
        self.section = self.add_argument_group(title)

    def add(self, flag: str, kind, help: str, auto: bool = False, **options) -> None:
        """A flag.

        Args:
            kind: a `Number` or `OneOf`, str, or bool for ``--x`` and ``--no-x``.
            auto: the word `auto` stands for the default.
            options: of argparse; the default is that of the field in `Settings`, if there is one.
        """
        options.setdefault("default", DEFAULTS.get(flag.lstrip("-")))
        if kind is bool:
            action = self.section.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            action.help = help  # given above, Python 3.10 adds "(default: False)" to it
            return

        def convert(text: str):
            if auto and text == "auto":
                return None
            if kind is str:
                return text
            value = kind.parse(text)
            if problem := kind.problem(value):
                self.problems.append(f"{flag} {text}: {problem}")
                return None if "nargs" in options else options["default"]
            return value

        if isinstance(kind, OneOf):
            options["metavar"] = "{" + ",".join(kind.choices) + "}"
        elif isinstance(kind, Number):
            options["metavar"] = kind.kind.__name__.upper()
        self.section.add_argument(flag, type=convert, help=help, **options)

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.problems.append(f"{' '.join(unknown)}: no such option (see --help)")
        return args


# ---- flags


def add_plugin_flags(add) -> None:
    """The flags of parallelism, precision and memory that everybody needs."""
    add(
        "--plugin",
        OneOf(tuple(PLUGINS)),
        "training strategy; none: plain PyTorch (default: gemini with a GPU, torch_ddp without)",
        auto=True,
    )
    add(
        "--preset",
        OneOf(("published", "fast", "cpu")),
        "published: the published runs' precision, gradient checkpointing and offload; fast: "
        "16 bit without either; cpu: 32 bit without either (default: published with a GPU, "
        "cpu without)",
        auto=True,
    )


def add_parallel_flags(parser: Parser) -> None:
    """Precision, layout and memory: the same for training and for the benchmark."""
    add = parser.add
    add(
        "--precision",
        OneOf(("fp32", "fp16", "bf16")),
        "number format of forward and backward pass (default: the preset's for this plugin)",
        auto=True,
    )
    add("--tp_size", positive(), "tensor-parallel size: ranks that share each layer (hybrid_parallel)")
    add("--pp_size", positive(), "pipeline-parallel size: stages of layers (hybrid_parallel)")
    add(
        "--num_microbatches",
        positive(),
        "micro-batches of a pipeline's batch (default: the largest divisor of the batch up to 4 per stage)",
        auto=True,
    )
    add(
        "--zero_stage",
        Number(int, low=0, high=2),
        "what low_level_zero (1, 2) and hybrid_parallel (0, 1, 2) shard: 1 optimizer states, "
        "2 gradients too (default: 1; 0)",
        auto=True,
    )
    add("--placement_policy", OneOf(("static", "auto")), "gemini's placement of parameters")
    add(
        "--offload_optim_frac",
        fraction(1),
        "part of the optimizer states kept in CPU memory (default: the preset's)",
        auto=True,
    )
    add("--offload_param_frac", fraction(1), "part of gemini's parameters kept in CPU memory")
    add("--grad_checkpoint", bool, "recompute activations in the backward pass (default: the preset's)")
    add("--compile", bool, "torch.compile each transformer layer")
    add(
        "--cuda_graphs",
        bool,
        "compile, and replay a step (torch_ddp, none) or the model as CUDA graphs: for small "
        "batches, where starting kernels takes longer than running them",
    )


def add_optimizer_flags(parser: Parser) -> None:
    add = parser.add
    add("--gradient_accumulation_steps", positive(), "batches added up into one optimizer step")
    add("--max_norm", Number(float, low=0), "clip gradients to this norm; 0: no clipping")
    add(
        "--optimizer",
        OneOf(("adamw", "hybrid_adam")),
        "torch's fused AdamW, or Colossal-AI's HybridAdam (compiles its kernels at first use)",
    )


def add_launch_flags(parser: Parser) -> None:
    parser.add(
        "--world_size", positive(), "processes this will run on (default: those of the launch)", default=None
    )
    parser.section.add_argument(
        "--check", action="store_true", help="check the settings and stop (used before a launch)"
    )


def finetune_parser() -> Parser:
    parser = Parser(
        prog="vit_train_demo.py", description="Fine-tune a Vision Transformer with a Colossal-AI plugin."
    )
    add = parser.add
    parser.group("most used")
    add(
        "--model_name_or_path",
        str,
        f"hub name, local folder, or preset ({', '.join(PRESETS)}) (default: {BASE_MODEL} "
        f"with a GPU, {DEMO_MODEL} without)",
        auto=True,
    )
    add(
        "--dataset",
        str,
        f"hub name, local folder, parquet or arrow files, or {DEMO_DATASET} (default: "
        f"{BASE_DATASET} with a GPU, {DEMO_DATASET} without)",
        auto=True,
    )
    add("--output_path", str, "folder of the result")
    add_plugin_flags(add)
    add("--batch_size", positive(), "images per data-parallel rank and batch (default: 32)", auto=True)
    add("--learning_rate", positive(float), "peak, before scaling (default: 1e-4; vit-demo 5e-4)", auto=True)
    add("--num_epoch", positive(), "passes over the training images (default: 3; vit-demo 8)", auto=True)
    add(
        "--image_size",
        Number(int, low=8),
        "pixels; position embeddings are interpolated (default: the model's)",
    )
    add(
        "--resume",
        str,
        "`auto` (the newest checkpoint in the output folder, if any) or the path of a checkpoint",
    )

    parser.group("data")
    add("--image_column", str, "column of the images (default: found by its type)")
    add("--label_column", str, "column of the labels (default: found by its type)")
    add(
        "--validation_fraction",
        positive(float, high=0.9),
        "held out of train where there is no validation split",
    )
    add(
        "--fold",
        str,
        "validate on fold K of N equal parts of the training split, and use no other split: "
        "to choose settings by",
        metavar="K/N",
    )
    add("--skip_bad_images", bool, "leave out unreadable images, named and counted")
    add("--max_train_samples", positive(), "train on this many images (default: all)")
    add("--max_eval_samples", positive(), "evaluate on this many images of each split (default: all)")
    add(
        "--data_memory",
        positive(float),
        "GiB that a machine may spend on decoded images (default: a quarter of its memory)",
    )
    add(
        "--num_workers",
        Number(int, low=0, high=64),
        "data-loading processes of each process (default: by the cores)",
    )

    parser.group("optimisation")
    add("--scale_lr", bool, "multiply the learning rate by the data-parallel size (default: yes)")
    add(
        "--weight_decay",
        Number(float, low=0),
        "of matrices; biases, LayerNorms and embeddings have none (default: 0.05)",
        auto=True,
    )
    add(
        "--warmup_ratio",
        fraction(1),
        "part of the steps over which the learning rate rises (default: 0.3)",
        auto=True,
    )
    add_optimizer_flags(parser)
    add("--layer_decay", positive(float, high=1), "learning rate of a layer over that of the layer above it")
    add(
        "--ema",
        fraction(0.99999),
        "evaluate and export weights averaged over the steps with this decay; 0: the weights themselves",
    )
    add(
        "--keep",
        OneOf(("best", "last")),
        "epoch that is tested and exported: the best by validation, whose accuracy there "
        "that flatters, or the last",
    )
    add("--seed", SEED, "of initial weights, order and augmentation")

    parser.group("augmentation and regularisation")
    add("--augment", bool, "random resized crop and flip (default: off, as published)")
    add(
        "--auto_augment",
        OneOf(tuple(POLICIES)),
        "with --augment: torchvision's TrivialAugmentWide or RandAugment after the crop",
    )
    add("--label_smoothing", fraction(), "part of each label spread over all classes in training")
    add(
        "--drop_path",
        fraction(),
        "chance that an image skips the last layer's branches in training; falls linearly to 0 at the first",
    )
    add("--mixup", Number(float, low=0), "alpha of mixing two images and their labels; 0: never")
    add(
        "--cutmix",
        Number(float, low=0),
        "alpha of pasting a part of one image into another; 0: never; with --mixup one of the two at random",
    )

    parser.group("parallelism, precision and memory")
    add_parallel_flags(parser)

    parser.group("output")
    add("--checkpoint_steps", Number(int, low=0), "also save every this many steps; 0: only after each epoch")
    add(
        "--keep_checkpoints",
        Number(int, low=0),
        "newest checkpoints kept, beside the best epoch's; 0: none once the run is complete",
    )
    add("--overwrite_output", bool, "replace a finished or interrupted run in the output folder")
    add("--tensorboard", bool, "write event files to OUTPUT_PATH/tensorboard")
    add(
        "--push_to_hub",
        str,
        "upload the result to this model repository of the HuggingFace hub",
        metavar="OWNER/NAME",
    )
    add("--eval_only", bool, "evaluate the model on validation and test, and stop")
    add("--dry_run", bool, "print the plan and stop")

    parser.group("advanced")
    add_launch_flags(parser)
    return parser


# ---- defaults that follow from the machine and from other flags


def world_size_of(args: argparse.Namespace) -> int:
    return int(os.environ.get("WORLD_SIZE", args.world_size or 1))


def default_precision(plugin: str, preset: str, machine: Machine) -> str:
    allowed = PLUGINS[plugin].precisions
    half = "bf16" if machine.has_bf16 or not machine.gpus else "fp16"
    # where a plugin has no fp32, CPUs add bf16 faster than fp16
    wanted = {"published": allowed[:1], "fast": (half,), "cpu": ("fp32", "bf16")}[preset]
    return next((precision for precision in wanted if precision in allowed), allowed[0])


def resolve_plugin(values: dict, machine: Machine, world_size: int) -> list[str]:
    """Fill in what preset and plugin decide, in place. -> notes: one line for each flag that has no effect"""
    notes, name = [], values["plugin"]
    plugin = PLUGINS[name]
    values["preset"] = values["preset"] or ("published" if machine.gpus else "cpu")
    published = values["preset"] == "published"
    if not plugin.model_parallel and values["tp_size"] * values["pp_size"] > 1:
        notes.append(
            f"TP_SIZE and PP_SIZE are for hybrid_parallel; {name} runs data parallel on all {world_size}"
        )
        values["tp_size"] = values["pp_size"] = 1
    rank = int(os.environ.get("RANK", 0))
    layout = values["layout"] = ParallelLayout(world_size, values["tp_size"], values["pp_size"], rank)
    values["precision"] = values["precision"] or default_precision(name, values["preset"], machine)
    if values["zero_stage"] is None:
        values["zero_stage"] = plugin.zero_stages[0] if plugin.zero_stages else 0
    elif not plugin.zero_stages:
        notes.append(f"--zero_stage is for low_level_zero and hybrid_parallel; {name} ignores it")
        values["zero_stage"] = 0
    if plugin.model_parallel and values["zero_stage"] and layout.data_parallel_size == 1:
        notes.append("--zero_stage: nothing to shard with one data-parallel rank; ZeRO is off")
        values["zero_stage"] = 0
    if values["grad_checkpoint"] is None:
        values["grad_checkpoint"] = published
    if values["offload_optim_frac"] is None:
        values["offload_optim_frac"] = plugin.published_offload if published and machine.gpus else 0.0
    if values["pp_size"] == 1:
        values["num_microbatches"] = 1
    elif values["num_microbatches"] is None:
        counts = range(values["pp_size"], 4 * values["pp_size"] + 1)
        values["num_microbatches"] = max((n for n in counts if values["batch_size"] % n == 0), default=0)
    return notes


def settings_from(values: dict, notes: list[str]) -> Settings:
    return Settings(**{name: value for name, value in values.items() if name in DEFAULTS}, notes=tuple(notes))


def resolve_finetune(args: argparse.Namespace, machine: Machine) -> Settings:
    """The settings that the flags and this machine give."""
    values, notes = vars(args), []
    model = values["model_name_or_path"] = args.model_name_or_path or (
        BASE_MODEL if machine.gpus else DEMO_MODEL
    )
    is_demo = model == DEMO_MODEL
    values["dataset"] = args.dataset or (DEMO_DATASET if is_demo else BASE_DATASET)
    if not machine.gpus and is_demo and values["dataset"] == DEMO_DATASET:
        text = (
            "no GPU: training the small embedded model on synthetic leaf images (MODEL and "
            "DATASET choose others)"
        )
        notes.append(text)
    values["plugin"] = args.plugin or ("gemini" if machine.gpus else "torch_ddp")
    for name, value in (DEMO_DEFAULTS if is_demo else TRAINING_DEFAULTS).items():
        if values[name] is None:
            values[name] = value
    notes += resolve_plugin(values, machine, world_size_of(args))
    return settings_from(values, notes)


# ---- one function a program


def finetune_settings(argv: list[str] | None = None) -> tuple[Settings, list[str], bool]:
    """-> (settings of vit_train_demo.py, everything that is wrong with them, whether they are only checked)"""
    parser, machine = finetune_parser(), this_machine()
    args = parser.parse(argv)
    settings = resolve_finetune(args, machine)
    problems = parser.problems + finetune_problems(settings, machine)
    if not problems and names_on_hub(settings) and not hub.is_online():
        note = "the HuggingFace hub does not answer: using the cached copies"
        settings = replace(settings, notes=(*settings.notes, note))
    return settings, problems, args.check


def parse_finetune(argv: list[str] | None = None) -> Settings:
    """The settings of vit_train_demo.py, resolved and checked; ends the program with every problem otherwise."""
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
        prog="train.py",
        description="Train a ViT from scratch by a config file. DATA (environment) is the data set.",
    )
    add = parser.add
    add(
        "--config",
        str,
        "a Python file, such as configs/cifar10/vit_lite_7_4_vanilla.py; vit/config.py lists the names",
        default=None,
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="override values of the config",
    )
    add(
        "--output_path",
        str,
        "folder of the result (default: the config's LOG_PATH, or ./runs/<its name>)",
        auto=True,
        default=None,
    )
    add(
        "--resume",
        str,
        "`auto` (the newest checkpoint in the output folder, if any) or the path of a checkpoint",
    )
    add("--overwrite_output", bool, "replace a finished or interrupted run in the output folder")
    add("--skip_bad_images", bool, "leave out unreadable images, named and counted")
    parser.add_argument(
        "--check", action="store_true", help="check the settings and stop (used before a launch)"
    )
    parser.group("one process at a time, where no launcher says so")
    for flag, what in (
        ("--world_size", "processes in all"),
        ("--rank", "this one's rank"),
        ("--local_rank", "its rank on its machine"),
    ):
        add(flag, Number(int, low=0), what, default=None)
    add("--host", str, "machine of rank 0", default=None)
    add("--port", Number(int, low=1, high=65535), "a port that is free there", default=None)
    return parser


def parse_scratch(argv: list[str] | None = None) -> Settings:
    """The settings of train.py, resolved and checked; ends the program with every problem otherwise."""
    parser, machine = scratch_parser(), this_machine()
    args = parser.parse(argv)
    launched = "WORLD_SIZE" in os.environ
    problems = parser.problems + set_rank_environment(args, machine)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if launched and machine.gpus and local_ranks > machine.gpus:
        problems.append(f"{local_ranks} processes on a machine with {machine.gpus} GPU(s)")
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
        skip_bad_images=args.skip_bad_images,
    )
    if not settings.dataset:
        problems.append(
            "DATA: set this environment variable to the data set: cifar-10-batches-py, an image "
            "folder, a prepared "
            "folder, a parquet copy, or synthetic"
        )
    else:
        problems += data_problems(settings) + hub_problems(settings)
    end_after_checks(problems + output_problems(settings), args.check)
    hub.go_offline_if_possible(names_on_hub(settings), uploads=False)
    if not launched and args.world_size:
        print(
            f"rank {rank()} of {args.world_size}: waiting for the others at {args.host}:{args.port}",
            flush=True,
        )
    return settings


def set_rank_environment(args: argparse.Namespace, machine: Machine) -> list[str]:
    """--world_size, --rank, --local_rank, --host and --port as the environment that torchrun would have set. -> problems"""
    given = {
        "WORLD_SIZE": args.world_size,
        "RANK": args.rank,
        "LOCAL_RANK": args.local_rank,
        "MASTER_ADDR": args.host,
        "MASTER_PORT": args.port,
    }
    by_hand = any(value is not None for value in given.values())
    if args.check or "WORLD_SIZE" in os.environ or not by_hand:
        return []
    names = ("world_size", "rank", "local_rank", "host", "port")
    if missing := [f"--{name}" for name in names if getattr(args, name) is None]:
        flags = "--world_size, --rank, --local_rank, --host and --port"
        return [f"{', '.join(missing)}: missing; one process at a time needs {flags}"]
    if args.world_size < 1 or args.rank >= args.world_size or args.local_rank > args.rank:
        ranks = f"--rank {args.rank} --local_rank {args.local_rank}"
        return [f"{ranks}: must be below --world_size {args.world_size}, the local rank at most the rank"]
    if machine.gpus and args.local_rank >= machine.gpus:
        return [f"--local_rank {args.local_rank}: this machine has {machine.gpus} GPU(s), numbered from 0"]
    if not host_exists(args.host):
        return [f"--host {args.host}: there is no machine of that name; give rank 0's name or address"]
    os.environ.update({name: str(value) for name, value in given.items()})
    return []


@dataclass(frozen=True)
class Case:
    """One case of the benchmark: settings with a batch size, and how it is measured.

    ``problem``: why the plugin, the layout or the device cannot do it; a result like others, recorded as a row.
    """

    settings: Settings
    num_labels: int
    warmup_steps: int
    window_steps: int
    windows: int
    mem_cap: float | None
    problem: str

    def get(self, name: str):
        """A setting of the case, by its name in a row."""
        return getattr(self, name) if name in CASE_FIELDS else getattr(self.settings, name)


CASE_FIELDS = {field.name for field in fields(Case)}
# how much is measured: (with a GPU, without one, where others compute on the same cores)
METHOD_DEFAULTS = {"warmup_steps": (10, 2), "window_steps": (10, 3), "windows": (5, 7)}


def benchmark_parser() -> Parser:
    description = "Measure a plugin's training speed and memory on synthetic images."
    parser = Parser(prog="vit_benchmark.py", description=description)
    add = parser.add
    parser.group("what is measured")
    add(
        "--model_name_or_path",
        str,
        f"known ViT name or preset; random weights, no hub (default: {BASE_MODEL} with a GPU, "
        f"{DEMO_MODEL} without)",
        auto=True,
    )
    add_plugin_flags(add)
    add(
        "--batch_size",
        positive(),
        "one or more; images per data-parallel rank and step",
        nargs="+",
        default=[8, 32],
    )
    add("--image_size", Number(int, low=8), "pixels (default: the model's)")
    add("--num_labels", Number(int, low=2), "size of the classifier", default=1000)
    add("--learning_rate", positive(float), "constant learning rate of the timed steps", default=1e-4)
    add("--weight_decay", Number(float, low=0), "weight decay of the timed steps", default=0.05)
    add_optimizer_flags(parser)
    parser.group("parallelism, precision and memory")
    add_parallel_flags(parser)
    parser.group("how it is measured")
    add(
        "--warmup_steps",
        positive(),
        "steps before the clock starts (default: 10; 2 without a GPU)",
        auto=True,
        default=None,
    )
    add(
        "--window_steps",
        positive(),
        "steps per timed window (default: 10; 3 without a GPU)",
        auto=True,
        default=None,
    )
    add(
        "--windows",
        positive(),
        "timed windows; the median is reported (default: 5; 7 without a GPU)",
        auto=True,
        default=None,
    )
    add("--mem_cap", positive(float), "GiB of each GPU that may be used (default: all)", default=None)
    add("--seed", SEED, "of weights and images")
    add("--results", str, "file to append one JSON row per case to", default="./benchmark_results/rows.jsonl")
    add("--remeasure", bool, "measure cases again that the results hold already", default=False)
    parser.group("advanced")
    add_launch_flags(parser)
    return parser


def benchmark_cases(argv: list[str] | None = None) -> tuple[list[Case], argparse.Namespace, list[str]]:
    """-> (a case for each batch size, the flags, what is wrong with these)"""
    parser, machine = benchmark_parser(), this_machine()
    args = parser.parse(argv)
    args.model_name_or_path = args.model_name_or_path or (BASE_MODEL if machine.gpus else DEMO_MODEL)
    args.plugin = args.plugin or "gemini"
    architecture = known_architecture(args.model_name_or_path)
    if architecture is None:
        known = f"known are the presets {', '.join(PRESETS)}, also with an owner as on the hub"
        parser.problems.append(f"--model_name_or_path {args.model_name_or_path}: unknown; {known}")
    elif args.image_size == architecture.image_size:
        args.image_size = None  # the model's own
    for name, (with_gpu, without) in METHOD_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, with_gpu if machine.gpus else without)
    cases = []
    for batch_size in dict.fromkeys(args.batch_size):
        values = vars(args) | {"batch_size": batch_size or 1}
        notes = resolve_plugin(values, machine, world_size_of(args))
        settings = settings_from(values, notes)
        problem = "; ".join(plugin_problems(settings, machine) + model_problems(settings))
        method = {name: getattr(args, name) for name in CASE_FIELDS - {"settings", "problem"}}
        cases.append(Case(settings, problem=problem, **method))
    return cases, args, parser.problems


def parse_benchmark(argv: list[str] | None = None) -> tuple[list[Case], argparse.Namespace]:
    """The cases of vit_benchmark.py, and its flags; ends the program with every wrong flag otherwise."""
    cases, args, problems = benchmark_cases(argv)
    end_after_checks(problems, args.check)
    return cases, args
