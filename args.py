"""Every command line of this example, and every check that needs no process group.

All bad settings are reported together, each with its flag, its value and a mend, before anything is launched.
"""

import argparse
import math
import os
import re
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from launch import resolves
from vit.checks import check_data, check_hub, check_model, check_output, check_push
from vit.config import ConfigError, config_layout, config_problems, load_config, recorded_settings
from vit.console import exit_with_errors, rank
from vit.data.cifar10 import CIFAR10_FOLDER
from vit.data.dataset import DataError
from vit.data.sources import DEMO_DATASET
from vit.data.transforms import POLICIES
from vit.layout import ParallelLayout
from vit.model import PRESETS, known_architecture
from vit.settings import MESH_MODES, PLUGIN_PRECISIONS
from vit.system import gpu_count, gpu_has_bf16

# The published runs fine-tune on Beans; the demo trains a small ViT from scratch on drawn leaves.
MACHINE_DEFAULTS = {
    "fine-tune": dict(
        batch_size=32, learning_rate=1e-4, num_epoch=3, weight_decay=0.05, warmup_ratio=0.3, augment=False
    ),
    "demo": dict(
        batch_size=32, learning_rate=5e-4, num_epoch=8, weight_decay=0.05, warmup_ratio=0.3, augment=False
    ),
}


class Parser(argparse.ArgumentParser):
    """argparse, but bad values are collected instead of ending the program at the first one."""

    def __init__(self, *args, **kwargs):
        super().__init__(
            *args, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs
        )
        self.problems: list[str] = []

    def number(self, flag: str, kind, low=None, high=None, above=None, auto=False, **kwargs):
        """A flag for a bounded number; ``auto`` accepts the word and stores None."""

        def convert(text: str):
            if auto and text == "auto":
                return None
            try:
                value = kind(text)
            except ValueError:
                value = None
            bad = (
                value is None
                or not math.isfinite(value)
                or (low is not None and value < low)
                or (high is not None and value > high)
                or (above is not None and value <= above)
            )
            if bad:
                bounds = [
                    f">= {low}" * (low is not None),
                    f"> {above}" * (above is not None),
                    f"<= {high}" * (high is not None),
                ]
                what = "a whole number" if kind is int else "a number"
                self.problems.append(
                    f"{flag} {text}: must be {what} {' and '.join(filter(None, bounds))}".rstrip()
                )
                return kwargs.get("default")
            return value

        self.add_argument(flag, type=convert, metavar=kind.__name__.upper(), **kwargs)

    def numbers(self, flag: str, kind, low, default, **kwargs):
        """A flag for one or more bounded numbers."""

        def convert(text: str):
            if not text.isdigit() or kind(text) < low:
                self.problems.append(f"{flag} {text}: must be whole numbers >= {low}")
                return default[0]
            return kind(text)

        self.add_argument(
            flag, type=convert, nargs="+", default=default, metavar=kind.__name__.upper(), **kwargs
        )

    def choice(self, flag: str, choices, auto=False, **kwargs):
        """A flag for one of ``choices``."""

        def convert(text: str):
            if auto and text == "auto":
                return None
            if text not in choices:
                self.problems.append(f"{flag} {text}: must be one of {', '.join(choices)}")
                return kwargs.get("default")
            return text

        self.add_argument(flag, type=convert, metavar="{" + ",".join(choices) + "}", **kwargs)

    def switch(self, flag: str, **kwargs):
        """``--x`` and ``--no-x``."""
        self.add_argument(flag, action=argparse.BooleanOptionalAction, **kwargs)

    def text(self, flag: str, auto=False, **kwargs):
        """A path or a name; ``auto`` stores None."""
        self.add_argument(flag, type=lambda value: None if auto and value == "auto" else value, **kwargs)

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.problems.append(f"{' '.join(unknown)}: no such option (see --help)")
        args.notes = []  # one line each, printed with the plan
        return args


def add_parallel_flags(parser: Parser) -> None:
    """Plugin, precision, layout and memory: the same for training and for the benchmark."""
    parser.choice(
        "--preset",
        ("published", "fast", "cpu"),
        auto=True,
        help="published: the published runs' precision, gradient checkpointing and offload; fast: "
        "16 bit without either; cpu: 32 bit without either (default: published with a GPU, "
        "cpu without)",
    )
    parser.choice(
        "--precision", ("fp32", "fp16", "bf16"), auto=True, help="default: the preset's for this plugin"
    )
    parser.number("--tp_size", int, low=1, default=1, help="tensor-parallel processes (hybrid_parallel)")
    parser.number("--pp_size", int, low=1, default=1, help="pipeline stages (hybrid_parallel)")
    parser.number(
        "--num_microbatches",
        int,
        low=1,
        auto=True,
        help="micro-batches of a pipeline's batch (default: the largest divisor of the batch up "
        "to 4 per stage)",
    )
    parser.number(
        "--zero_stage",
        int,
        low=0,
        high=2,
        auto=True,
        help="what low_level_zero (1, 2) and hybrid_parallel (0, 1, 2) shard: 1 optimizer states, "
        "2 gradients too (default: 1; 0)",
    )
    parser.choice(
        "--placement_policy", ("static", "auto"), default="static", help="gemini's placement of parameters"
    )
    parser.number(
        "--offload_optim_frac",
        float,
        low=0,
        high=1,
        auto=True,
        help="part of the optimizer states kept in CPU memory (default: the preset's)",
    )
    parser.number(
        "--offload_param_frac",
        float,
        low=0,
        high=1,
        default=0.0,
        help="part of gemini's parameters kept in CPU memory",
    )
    parser.choice(
        "--optimizer",
        ("adamw", "hybrid_adam"),
        default="adamw",
        help="torch's fused AdamW, or Colossal-AI's HybridAdam (compiles its kernels at first use)",
    )
    parser.switch(
        "--grad_checkpoint",
        default=None,
        help="recompute activations in the backward pass (default: the preset's)",
    )
    parser.switch("--compile", default=False, help="torch.compile each transformer layer")
    parser.switch(
        "--cuda_graphs",
        default=False,
        help="compile, and replay a step (torch_ddp, none) or the model as CUDA graphs: for small "
        "batches, where starting kernels takes longer than running them",
    )
    parser.number("--max_norm", float, low=0, default=0.0, help="clip gradients to this norm; 0: no clipping")
    parser.number(
        "--gradient_accumulation_steps", int, low=1, default=1, help="batches summed up into one step"
    )
    parser.number(
        "--world_size", int, low=1, help="processes this will run on; known by itself inside a launch"
    )
    parser.add_argument(
        "--check", action="store_true", help="check the settings and stop (used before a launch)"
    )


def finetune_parser() -> Parser:
    parser = Parser(
        prog="vit_train_demo.py", description="Fine-tune a Vision Transformer with a Colossal-AI plugin."
    )
    parser.text(
        "--model_name_or_path",
        auto=True,
        help=f"hub name, local folder, or preset ({', '.join(PRESETS)}) (default: "
        "google/vit-base-patch16-224 with a GPU, vit-demo without)",
    )
    parser.text(
        "--dataset",
        auto=True,
        help=f"hub name, local folder, parquet or arrow files, or {DEMO_DATASET} (default: "
        f"AI-Lab-Makerere/beans with a GPU, {DEMO_DATASET} without)",
    )
    parser.text("--output_path", default="./output_model", help="folder of the result")
    parser.choice(
        "--plugin", tuple(PLUGIN_PRECISIONS), auto=True, help="default: gemini with a GPU, torch_ddp without"
    )
    add_parallel_flags(parser)
    parser.number(
        "--batch_size", int, low=1, auto=True, help="images per data-parallel group and batch (default: 32)"
    )
    parser.number(
        "--learning_rate",
        float,
        above=0,
        auto=True,
        help="peak, before scaling (default: 1e-4; vit-demo 5e-4)",
    )
    parser.switch(
        "--scale_lr", default=True, help="multiply the learning rate by the number of data-parallel groups"
    )
    parser.number("--num_epoch", int, low=1, auto=True, help="default: 3; vit-demo 8")
    parser.number(
        "--weight_decay",
        float,
        low=0,
        auto=True,
        help="of matrices; biases, LayerNorms and embeddings have none (default: 0.05)",
    )
    parser.number("--warmup_ratio", float, low=0, high=1, auto=True, help="part of the steps (default: 0.3)")
    parser.number(
        "--seed", int, low=0, high=2**31 - 1, default=42, help="of initial weights, order and augmentation"
    )
    parser.number(
        "--image_size", int, low=8, help="pixels; position embeddings are interpolated (default: the model's)"
    )
    parser.switch("--augment", default=None, help="random resized crop and flip (default: off, as published)")
    parser.choice(
        "--auto_augment",
        tuple(POLICIES),
        help="with --augment: torchvision's TrivialAugmentWide or RandAugment after the crop",
    )
    parser.number(
        "--label_smoothing",
        float,
        low=0,
        high=0.99,
        default=0.0,
        help="part of each label spread over all classes in training",
    )
    parser.number(
        "--layer_decay",
        float,
        above=0,
        high=1,
        default=1.0,
        help="learning rate of a layer over that of the layer above it",
    )
    parser.number(
        "--drop_path",
        float,
        low=0,
        high=0.99,
        default=0.0,
        help="chance that an image skips the last layer's branches in training; falls linearly to "
        "0 at the first",
    )
    parser.number(
        "--mixup", float, low=0, default=0.0, help="alpha of mixing two images and their labels; 0: never"
    )
    parser.number(
        "--cutmix",
        float,
        low=0,
        default=0.0,
        help="alpha of pasting a part of one image into another; 0: never; with --mixup one of "
        "the two at random",
    )
    parser.number(
        "--ema",
        float,
        low=0,
        high=0.99999,
        default=0.0,
        help="evaluate and export weights averaged over the steps with this decay; 0: the weights themselves",
    )
    parser.choice(
        "--keep",
        ("best", "last"),
        default="best",
        help="epoch that is tested and exported: the best by validation, whose accuracy there "
        "that flatters, or the last",
    )
    parser.text("--image_column", help="column of the images (default: found by its type)")
    parser.text("--label_column", help="column of the labels (default: found by its type)")
    parser.number(
        "--validation_fraction",
        float,
        above=0,
        high=0.9,
        default=0.1,
        help="held out of train where there is no validation split",
    )
    parser.text(
        "--fold",
        metavar="K/N",
        help="validate on part K of N equal parts of the training split, and use no other split: "
        "to choose settings by",
    )
    parser.switch("--skip_bad_images", default=False, help="leave out unreadable images, named and counted")
    parser.number("--max_train_samples", int, low=1, help="train on this many images")
    parser.number("--max_eval_samples", int, low=1, help="evaluate on this many images of each split")
    parser.number(
        "--data_memory",
        float,
        above=0,
        help="GiB a machine may spend on decoded images (default: a quarter of its memory)",
    )
    parser.number(
        "--num_workers",
        int,
        low=0,
        high=64,
        help="data-loading processes per process (default: by the cores)",
    )
    parser.text(
        "--resume", help="`auto` (the newest checkpoint in the output folder, if any) or a checkpoint's path"
    )
    parser.number(
        "--checkpoint_steps",
        int,
        low=0,
        default=0,
        help="also save every this many steps; 0: only after each epoch",
    )
    parser.number(
        "--keep_checkpoints",
        int,
        low=0,
        default=1,
        help="newest checkpoints kept, beside the best epoch's; 0: none once the run is complete",
    )
    parser.switch(
        "--overwrite_output", default=False, help="replace a finished or interrupted run in the output folder"
    )
    parser.switch("--tensorboard", default=False, help="write event files to OUTPUT_PATH/tensorboard")
    parser.text(
        "--push_to_hub",
        metavar="OWNER/NAME",
        help="upload the result to this model repository of the HuggingFace hub",
    )
    parser.switch("--eval_only", default=False, help="evaluate the model on validation and test, and stop")
    parser.switch("--dry_run", default=False, help="print the plan and stop")
    return parser


def parse_finetune(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of vit_train_demo.py, resolved and checked; ends the program with every problem otherwise.

    ``args.layout`` is the parallel layout, ``args.notes`` what the user should know.
    """
    parser = finetune_parser()
    args = parser.parse(argv)
    problems = parser.problems
    gpus = gpu_count()
    if args.model_name_or_path is None:
        args.model_name_or_path = "google/vit-base-patch16-224" if gpus else "vit-demo"
    if args.dataset is None:
        demo = args.model_name_or_path == "vit-demo"
        args.dataset = DEMO_DATASET if demo else "AI-Lab-Makerere/beans"
    if not gpus and args.model_name_or_path == "vit-demo" and args.dataset == DEMO_DATASET:
        args.notes.append(
            "no GPU: training the small embedded model on drawn leaf images (MODEL and DATASET choose others)"
        )
    if args.plugin is None:
        args.plugin = "gemini" if gpus else "torch_ddp"
    recipe = MACHINE_DEFAULTS["demo" if args.model_name_or_path == "vit-demo" else "fine-tune"]
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    resolve_parallel(args, problems, gpus)
    if args.layer_decay < 1 and args.zero_stage and args.pp_size > 1:
        problems.append(
            f"--layer_decay {args.layer_decay}: the library's ZeRO wants a part of every "
            "parameter group on each pipeline stage; use --zero_stage 0 or PP_SIZE=1"
        )
    if args.auto_augment and not args.augment:
        problems.append(f"--auto_augment {args.auto_augment}: follows the random crop; add --augment")
    fold = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", args.fold or "1/2")
    if not fold or not 2 <= int(fold[2]) <= 100 or int(fold[1]) > int(fold[2]):
        problems.append(f"--fold {args.fold}: must be K/N, part K of N from 2 to 100, such as 1/5")
    check_model(args, problems)
    check_data(args, problems)
    check_hub(args, problems)
    check_push(args, problems)
    check_output(args, problems)
    finish(args, problems)
    return args


def finish(args, problems: list[str]) -> None:
    """Report all problems, or stop here after a mere check."""
    if problems:
        exit_with_errors(*problems)
    if args.check:
        raise SystemExit(0)


def resolve_parallel(args, problems: list[str], gpus: int) -> None:
    """Fill in what the preset decides and refuse what the plugin, the layout or the device cannot do."""
    launched = "WORLD_SIZE" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if launched else (args.world_size or 1)
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus and on_this_machine > gpus:
        problems.append(
            f"{on_this_machine} processes on a machine with {gpus} GPU(s): set GPUNUM to at most {gpus}"
        )
    if args.preset is None:
        args.preset = "published" if gpus else "cpu"
    hybrid = args.plugin == "hybrid_parallel"
    if not hybrid and args.tp_size * args.pp_size > 1:
        args.notes.append(
            f"TP_SIZE and PP_SIZE are for hybrid_parallel; {args.plugin} runs data parallel on all {world}"
        )
        args.tp_size = args.pp_size = 1
    args.layout = ParallelLayout(world, args.tp_size, args.pp_size, int(os.environ.get("RANK", 0)))
    problems += args.layout.problems()

    allowed = PLUGIN_PRECISIONS[args.plugin]
    if args.precision is None:
        has_bf16 = gpus and gpu_has_bf16()
        wanted = {"published": allowed[0], "cpu": "fp32", "fast": "bf16" if has_bf16 or not gpus else "fp16"}[
            args.preset
        ]
        if args.preset == "cpu" and args.plugin == "gemini":
            wanted = "bf16"  # gemini has no fp32; CPUs add bf16 faster than fp16
        args.precision = wanted if wanted in allowed else allowed[0]
    elif args.precision not in allowed:
        mend = "use torch_ddp for it" if args.plugin == "torch_ddp_fp16" else f"choose {' or '.join(allowed)}"
        if args.plugin == "torch_ddp":
            mend = "use torch_ddp_fp16 for it"
        problems.append(f"--precision {args.precision}: {args.plugin} trains in {', '.join(allowed)}; {mend}")
    if args.precision == "bf16" and gpus and not gpu_has_bf16():
        problems.append(
            "--precision bf16: this GPU has no bf16 units (they came with Ampere); use --precision fp16"
        )

    if args.zero_stage is None:
        args.zero_stage = 1 if args.plugin == "low_level_zero" else 0
    elif args.plugin == "low_level_zero" and args.zero_stage == 0:
        problems.append(
            "--zero_stage 0: low_level_zero shards something by definition; use 1 or 2, or torch_ddp"
        )
    elif args.plugin not in ("low_level_zero", "hybrid_parallel"):
        args.notes.append(f"--zero_stage is for low_level_zero and hybrid_parallel; {args.plugin} ignores it")
        args.zero_stage = 0
    if hybrid and args.zero_stage and args.layout.dp == 1:
        args.notes.append("--zero_stage: nothing to shard with one data-parallel group; ZeRO is off")
        args.zero_stage = 0
    if hybrid and args.zero_stage and args.precision == "fp32":
        problems.append(
            "--zero_stage with --precision fp32: hybrid_parallel shards 16-bit training only; "
            "use bf16 or fp16"
        )

    if args.grad_checkpoint is None:
        args.grad_checkpoint = args.preset == "published"
    if args.offload_optim_frac is None:
        args.offload_optim_frac = (
            1.0 if args.preset == "published" and args.plugin == "gemini" and gpus else 0.0
        )
    for flag in ("offload_optim_frac", "offload_param_frac"):
        if getattr(args, flag) and not gpus:
            problems.append(f"--{flag} {getattr(args, flag)}: there is no GPU to offload from; set it to 0")
    if args.offload_param_frac and args.plugin != "gemini":
        problems.append(f"--offload_param_frac {args.offload_param_frac}: only gemini offloads parameters")
    if args.offload_optim_frac and args.plugin in ("torch_ddp", "torch_ddp_fp16", "none"):
        problems.append(
            f"--offload_optim_frac {args.offload_optim_frac}: {args.plugin} keeps all its states; "
            "use low_level_zero or gemini"
        )
    if hybrid and args.offload_optim_frac and not args.zero_stage:
        problems.append(
            f"--offload_optim_frac {args.offload_optim_frac}: hybrid_parallel offloads with "
            "--zero_stage 1 or 2 only"
        )
    if args.placement_policy == "auto" and (args.plugin != "gemini" or not gpus):
        problems.append("--placement_policy auto: is gemini's, on a GPU")
    if args.optimizer == "hybrid_adam":
        if not gpus:
            problems.append("--optimizer hybrid_adam: its kernels need a GPU; use adamw")
        elif (
            args.plugin == "gemini" and args.precision == "bf16" and args.max_norm and args.offload_optim_frac
        ):
            problems.append(
                "--max_norm with --optimizer hybrid_adam, bf16 and offload: the library skips the "
                "clipping; use --optimizer adamw"
            )
    if vars(args).get("tensorboard") and not find_spec("tensorboard"):
        problems.append("--tensorboard: it is not installed; `pip install tensorboard`, or leave it out")
    if args.cuda_graphs and args.optimizer == "hybrid_adam" and args.plugin in ("torch_ddp", "none"):
        problems.append("--cuda_graphs with --optimizer hybrid_adam: its step cannot be recorded; use adamw")
    if args.cuda_graphs:
        if not gpus:
            problems.append("--cuda_graphs: needs a GPU; leave it out")
        if args.gradient_accumulation_steps > 1 or args.pp_size > 1 or args.grad_checkpoint:
            problems.append(
                "--cuda_graphs: a graph runs a whole batch at once; without accumulation, pipeline "
                "and --grad_checkpoint (PRESET=fast)"
            )
    if args.compile or args.cuda_graphs:
        flag = "--cuda_graphs" if args.cuda_graphs else "--compile"
        if args.plugin == "gemini":
            problems.append(f"{flag}: gemini swaps parameter storage under the compiler; use another plugin")
        elif args.tp_size > 1:
            problems.append(f"{flag}: tensor parallelism is not proved with it; use TP_SIZE=1")
        elif args.pp_size > 1 and args.compile:
            problems.append(f"{flag}: pipeline parallelism is not proved with it; use PP_SIZE=1")

    if args.pp_size > 1:
        if args.num_microbatches is None:
            fits = [n for n in range(args.pp_size, 4 * args.pp_size + 1) if args.batch_size % n == 0]
            args.num_microbatches = max(fits, default=0)
            if not fits:
                problems.append(
                    f"--batch_size {args.batch_size}: does not divide into {args.pp_size} or more "
                    "micro-batches for "
                    f"--pp_size {args.pp_size}; use a multiple of {args.pp_size}"
                )
        else:
            if args.num_microbatches < args.pp_size:
                problems.append(
                    f"--num_microbatches {args.num_microbatches}: fewer than the {args.pp_size} stages "
                    f"would leave some idle; use {args.pp_size} or more"
                )
            if args.batch_size % args.num_microbatches:
                problems.append(
                    f"--num_microbatches {args.num_microbatches}: does not divide --batch_size "
                    f"{args.batch_size}; leave it out for the best fit"
                )
    else:
        args.num_microbatches = 1


def benchmark_parser() -> Parser:
    parser = Parser(
        prog="vit_benchmark.py",
        description="Measure a plugin's training speed and memory on synthetic images.",
    )
    parser.text(
        "--model_name_or_path",
        auto=True,
        help="known ViT name or preset; random weights, no hub (default: "
        "google/vit-base-patch16-224 with a GPU, vit-demo without)",
    )
    parser.choice("--plugin", tuple(PLUGIN_PRECISIONS), default="gemini", help="none: plain PyTorch")
    add_parallel_flags(parser)
    parser.numbers(
        "--batch_size",
        int,
        low=1,
        default=[8, 32],
        help="one or more; images per data-parallel group and step",
    )
    parser.number("--image_size", int, low=8, help="pixels (default: the model's)")
    parser.number("--num_labels", int, low=2, default=1000, help="size of the classifier")
    parser.number("--learning_rate", float, above=0, default=1e-4, help="constant, used")
    parser.number("--weight_decay", float, low=0, default=0.05, help="used")
    parser.number(
        "--warmup_steps",
        int,
        low=1,
        auto=True,
        help="steps before the clock starts (default: 10; 2 without a GPU)",
    )
    parser.number(
        "--window_steps", int, low=1, auto=True, help="steps per timed window (default: 10; 3 without a GPU)"
    )
    parser.number(
        "--windows",
        int,
        low=1,
        auto=True,
        help="timed windows; the median is reported (default: 5; 7 without a GPU, where others "
        "compute on the same cores)",
    )
    parser.number("--mem_cap", float, above=0, help="GiB of each GPU that may be used (default: all)")
    parser.number("--seed", int, low=0, high=2**31 - 1, default=42, help="of weights and images")
    parser.text(
        "--results", default="./benchmark_results/rows.jsonl", help="file to append one JSON row per case to"
    )
    parser.switch("--remeasure", default=False, help="measure cases again that the results hold already")
    parser.switch(
        "--check_settings",
        default=False,
        help="stop if these are wrong, else do nothing (run_benchmark.sh's own)",
    )
    parser.number(
        "--known_from",
        int,
        low=0,
        help="rows of the results from this one on count as measured, whatever became of them "
        "(run_benchmark.sh's own, for a second launch)",
    )
    parser.text(
        "--record_failure",
        help="write a row that the first case without one failed, for this reason, and stop "
        "(run_benchmark.sh's own, for processes that were killed)",
    )
    return parser


def parse_benchmark(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of vit_benchmark.py.

    A wrong flag ends the program, as everywhere. A case that is well said but impossible here (a layout, a
    precision) is a result: it is returned in ``args.impossible``, batch size -> reason.
    """
    parser = benchmark_parser()
    args = parser.parse(argv)
    problems = parser.problems
    gpus = gpu_count()
    if args.model_name_or_path is None:
        args.model_name_or_path = "google/vit-base-patch16-224" if gpus else "vit-demo"
    architecture = known_architecture(args.model_name_or_path)
    if architecture and args.image_size == architecture.image_size:
        args.image_size = None  # the model's own
    if architecture is None:
        problems.append(
            f"--model_name_or_path {args.model_name_or_path}: unknown; known are the presets "
            f"{', '.join(PRESETS)}, also with an owner as on the hub"
        )
    for name, with_gpu, without in (("warmup_steps", 10, 2), ("window_steps", 10, 3), ("windows", 5, 7)):
        if getattr(args, name) is None:
            setattr(args, name, with_gpu if gpus else without)
    if problems:
        exit_with_errors(*problems)
    if args.check_settings:
        raise SystemExit(0)
    args.cases, args.impossible = [], {}
    for batch_size in dict.fromkeys(args.batch_size):
        case, reasons = argparse.Namespace(**vars(args) | {"batch_size": batch_size, "notes": []}), []
        resolve_parallel(case, reasons, gpus)
        check_model(case, reasons)
        args.cases.append(case)
        if reasons:
            args.impossible[batch_size] = "; ".join(reasons)
    return args


def parse_scratch(argv: list[str] | None = None) -> Namespace:
    """The settings and the config, resolved and checked; ends the program with every problem otherwise."""
    parser = Parser(
        prog="train.py",
        description="Train a ViT from scratch by a config file. DATA (environment) is the data set.",
    )
    parser.text(
        "--config",
        help="a Python file, such as configs/cifar10/vit_lite_7_4_vanilla.py; config.py lists the names",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="override values of the config",
    )
    parser.text(
        "--output_path",
        auto=True,
        help="folder of the result (default: the config's LOG_PATH, or ./runs/<its name>)",
    )
    parser.text(
        "--resume", help="`auto` (the newest checkpoint in the output folder, if any) or a checkpoint's path"
    )
    parser.switch(
        "--overwrite_output", default=False, help="replace a finished or interrupted run in the output folder"
    )
    parser.switch("--skip_bad_images", default=False, help="leave out unreadable images, named and counted")
    parser.add_argument(
        "--check", action="store_true", help="check the settings and stop (used before a launch)"
    )
    for flag, what in (
        ("--world_size", "processes in all"),
        ("--rank", "this one's number"),
        ("--local_rank", "its number on its machine"),
    ):
        parser.number(flag, int, low=0, help=f"{what}, where no launcher says so")
    parser.text("--host", help="machine of rank 0, where no launcher says so")
    parser.number("--port", int, low=1, high=65535, help="a port that is free there")
    args = parser.parse(argv)
    problems = parser.problems
    launched = "WORLD_SIZE" in os.environ
    set_rank_environment(args, problems)
    world = int(os.environ.get("WORLD_SIZE", args.world_size or 1))
    gpus = gpu_count()
    if launched and gpus and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
        problems.append(f"{os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {gpus} GPU(s)")
    if args.config is None:
        exit_with_errors(
            *problems, "--config: name a config file, such as configs/cifar10/vit_lite_7_4_vanilla.py"
        )
    try:
        config, found = load_config(args.config, args.set)
    except ConfigError as error:
        exit_with_errors(*problems, str(error))
    problems += found + config_problems(config, world)
    args.dataset = os.environ.get("DATA")
    if not args.dataset:
        problems.append(
            "DATA: set this environment variable to the data set: cifar-10-batches-py, an image "
            "folder, a prepared folder, a parquet copy, or synthetic"
        )
    else:
        from data import find_scratch_source

        try:
            args.dataset_kind = find_scratch_source(args.dataset, config["NUM_CLASSES"], config["IMG_SIZE"])
            args.model_name_or_path, args.notes = Path(args.config).stem, []
            check_hub(args, problems)
            if args.dataset_kind == CIFAR10_FOLDER and config["RANDOM_RESIZED_CROP"] is not None:
                problems.append(
                    f"RANDOM_RESIZED_CROP {config['RANDOM_RESIZED_CROP']}: is for image files; "
                    f"DATA={args.dataset} has pixels of one size: use RANDOM_CROP_PADDING"
                )
        except DataError as error:
            problems.append(str(error))
    args.output_path = args.output_path or config["LOG_PATH"] or f"./runs/{Path(args.config).stem}"
    args.eval_only = args.dry_run = False
    check_output(args, problems, sources=("dataset",))
    if problems:
        exit_with_errors(*problems)
    if args.check:
        raise SystemExit(0)
    if not launched and args.world_size:
        print(
            f"rank {rank()} of {args.world_size}: waiting for the others at {args.host}:{args.port}",
            flush=True,
        )

    # the names that plugins.py and checkpoint.py know
    args.layout = config_layout(config, world, rank())
    args.precision, args.max_norm = config["precision"], config["clip_grad_norm"]
    if config["mode"] in MESH_MODES:
        args.plugin = config["mode"]
    elif config["tp"] * config["pp"] > 1:
        args.plugin = "hybrid_parallel"
    else:
        args.plugin = "torch_ddp_fp16" if args.precision == "fp16" else "torch_ddp"
    args.learning_rate, args.weight_decay = config["LEARNING_RATE"], config["WEIGHT_DECAY"]
    args.gradient_accumulation_steps = config["gradient_accumulation"]
    args.num_microbatches = config["NUM_MICRO_BATCHES"] if config["pp"] > 1 else 1
    args.optimizer, args.zero_stage, args.offload_optim_frac = "adamw", 0, 0.0
    args.grad_checkpoint, args.compile, args.cuda_graphs = False, config["COMPILE"], config["CUDA_GRAPHS"]
    args.values = config
    args.settings = {"dataset": args.dataset} | recorded_settings(config)
    return args


def set_rank_environment(args, problems: list[str]) -> None:
    """--world_size, --rank, --local_rank, --host and --port as the environment that torchrun would have
    set.
    """
    given = {
        "WORLD_SIZE": args.world_size,
        "RANK": args.rank,
        "LOCAL_RANK": args.local_rank,
        "MASTER_ADDR": args.host,
        "MASTER_PORT": args.port,
    }
    by_hand = any(value is not None for name, value in given.items() if name != "WORLD_SIZE")
    if args.check or "WORLD_SIZE" in os.environ:
        return
    if args.world_size is None and not by_hand:
        return  # one process
    if missing := [
        name for name in ("world_size", "rank", "local_rank", "host", "port") if getattr(args, name) is None
    ]:
        problems.append(
            f"{', '.join('--' + name for name in missing)}: missing; one process at a time needs "
            "--world_size, --rank, --local_rank, --host and --port"
        )
    elif args.world_size < 1 or args.rank >= args.world_size or args.local_rank > args.rank:
        problems.append(
            f"--rank {args.rank} --local_rank {args.local_rank}: must be below --world_size "
            f"{args.world_size}, the local rank at most the rank"
        )
    elif (gpus := gpu_count()) and args.local_rank >= gpus:
        problems.append(f"--local_rank {args.local_rank}: this machine has {gpus} GPU(s), numbered from 0")
    elif not resolves(args.host):
        problems.append(
            f"--host {args.host}: there is no machine of that name; give rank 0's name or address"
        )
    else:
        os.environ.update({name: str(value) for name, value in given.items()})
