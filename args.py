"""Every command line of this example, and every check that needs no process group.

All bad settings are reported together, each with its flag, its value and a mend, before anything is launched.
"""

import argparse
import math
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import hub
from console import fail
from data import DRAWN, POLICIES, DataError, locate
from layout import Layout
from model import FAMILIES, PRESETS, known_architecture, read_config

PLUGINS = {  # plugin -> the precisions it can do, its published one first
    "torch_ddp": ("fp32", "bf16"),
    "torch_ddp_fp16": ("fp16",),
    "low_level_zero": ("fp16", "bf16", "fp32"),
    "gemini": ("fp16", "bf16"),
    "hybrid_parallel": ("fp16", "bf16", "fp32"),
    "none": ("fp32", "fp16", "bf16"),  # plain PyTorch, the reference
}

OFFLINE_CHOICES = (
    "offline choices: MODEL=a local folder (config.json and weights) or a preset with random weights "
    f"({', '.join(PRESETS)}); DATASET=a local folder of images, parquet or arrow files, or `drawn`"
)

# The published runs fine-tune on Beans; the demo trains a small ViT from scratch on drawn leaves.
RECIPES = {
    "fine-tune": dict(
        batch_size=32, learning_rate=1e-4, num_epoch=3, weight_decay=0.05, warmup_ratio=0.3, augment=False
    ),
    "demo": dict(
        batch_size=32, learning_rate=5e-4, num_epoch=8, weight_decay=0.05, warmup_ratio=0.3, augment=False
    ),
}
# What the published setting leaves out, with the value that means so.
RECIPE = dict(
    augment=False,
    auto_augment=None,
    label_smoothing=0.0,
    layer_decay=1.0,
    drop_path=0.0,
    mixup=0.0,
    cutmix=0.0,
    ema=0.0,
    keep="best",
)


def recipe_of(settings: dict) -> str:
    """The recipe's flags as they are typed: `--augment --mixup 0.2`; `none` of the published setting."""
    flags = {name: settings.get(name, off) for name, off in RECIPE.items()}
    return (
        " ".join(
            f"--{name}" if value is True else f"--{name} {value}"
            for name, value in flags.items()
            if value != RECIPE[name]
        )
        or "none"
    )


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
        help=f"hub name, local folder, parquet or arrow files, or {DRAWN} (default: "
        f"AI-Lab-Makerere/beans with a GPU, {DRAWN} without)",
    )
    parser.text("--output_path", default="./output_model", help="folder of the result")
    parser.choice("--plugin", tuple(PLUGINS), auto=True, help="default: gemini with a GPU, torch_ddp without")
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
        args.dataset = DRAWN if demo else "AI-Lab-Makerere/beans"
    if not gpus and args.model_name_or_path == "vit-demo" and args.dataset == DRAWN:
        args.notes.append(
            "no GPU: training the small embedded model on drawn leaf images (MODEL and DATASET choose others)"
        )
    if args.plugin is None:
        args.plugin = "gemini" if gpus else "torch_ddp"
    recipe = RECIPES["demo" if args.model_name_or_path == "vit-demo" else "fine-tune"]
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
        fail(*problems)
    if args.check:
        raise SystemExit(0)


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


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
    args.layout = Layout(world, args.tp_size, args.pp_size, int(os.environ.get("RANK", 0)))
    problems += args.layout.problems()

    allowed = PLUGINS[args.plugin]
    if args.precision is None:
        has_bf16 = gpus and _bf16()
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
    if args.precision == "bf16" and gpus and not _bf16():
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


def _bf16() -> bool:
    import torch

    return torch.cuda.get_device_capability()[0] >= 8


def _divisors(number: int) -> str:
    """`1, 2 or 3` of 6, without 6 itself where there are many."""
    *found, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(found)} or {last}" if found else last


def check_model(args, problems: list[str]) -> None:
    """The model's name, and what its architecture must divide into, as far as it is known without the hub."""
    name = args.model_name_or_path
    heads = layers = patch = None
    if Path(name).is_dir():
        config = read_config(Path(name))
        if not config:
            problems.append(
                f"--model_name_or_path {name}: the folder has no readable config.json; name the "
                "folder that a run or save_pretrained wrote"
            )
        elif config.get("model_type") not in FAMILIES:
            problems.append(
                f"--model_name_or_path {name}: is a {config.get('model_type')!r} model; this example "
                "trains ViTs, such as google/vit-base-patch16-224 or a preset"
            )
        elif config["model_type"] == "ijepa" and args.plugin == "hybrid_parallel":
            problems.append(
                f"--plugin hybrid_parallel: the library cannot cut {name}, which averages its "
                "patches; use another plugin"
            )
        elif not any(Path(name).glob("*.safetensors")) and not any(Path(name).glob("pytorch_model*.bin")):
            problems.append(
                f"--model_name_or_path {name}: has a config.json, but no weights beside it "
                "(model.safetensors); copy them there"
            )
        # what the config leaves out has the library's default
        heads, layers = config.get("num_attention_heads", 12), config.get("num_hidden_layers", 12)
        patch = config.get("patch_size", 16)
    elif shape := known_architecture(name):
        heads, layers, patch = shape.heads, shape.layers, shape.patch_size
    elif not hub.is_name(name):
        problems.append(
            f"--model_name_or_path {name}: no such folder, and no preset ({', '.join(PRESETS)}); "
            "a hub name has the form owner/name"
        )
    if heads and heads % args.tp_size:
        problems.append(
            f"--tp_size {args.tp_size}: does not divide the {heads} attention heads of {name}; "
            f"use {_divisors(heads)}"
        )
    if layers and args.pp_size > layers:
        problems.append(
            f"--pp_size {args.pp_size}: more stages than the {layers} layers of {name}; use {layers} or fewer"
        )
    if patch and args.image_size and args.image_size % patch:
        problems.append(
            f"--image_size {args.image_size}: no multiple of the {patch} px patches of {name}; "
            f"use {args.image_size // patch * patch or patch} or "
            f"{(args.image_size // patch + 1) * patch}"
        )


def check_data(args, problems: list[str]) -> None:
    try:
        args.dataset_kind = locate(args.dataset)
    except (DataError, OSError) as error:  # PermissionError
        problems.append(
            str(error) if isinstance(error, DataError) else f"--dataset {args.dataset}: {error.strerror}"
        )
        args.dataset_kind = None


def check_hub(args, problems: list[str]) -> None:
    """A hub name needs the hub, or a copy in its cache.

    Says so at once instead of after minutes of retries.
    """
    name = args.model_name_or_path
    wanted = []
    if name not in PRESETS and hub.is_name(name):
        wanted.append(("model", name, "models"))
    if args.dataset_kind == "hub":
        wanted.append(("dataset", args.dataset, "datasets"))
    if not wanted:
        if not vars(args).get("push_to_hub"):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local: no library shall look for updates
        return
    reachable = os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0", "false") and hub.answers()
    if reachable:
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    missing = [f"{what} {name}" for what, name, kind in wanted if not hub.is_cached(name, kind)]
    if missing:
        problems.append(
            f"{' and '.join(missing)}: the HuggingFace hub ({hub.endpoint()}) does not answer and "
            f"no copy is cached; {OFFLINE_CHOICES}"
        )
    else:
        args.notes.append("the HuggingFace hub does not answer: using the cached copies")


def check_push(args, problems: list[str]) -> None:
    """Whether the result can go to the hub is known before hours of training."""
    if not args.push_to_hub or args.eval_only or args.dry_run:
        return
    if not hub.NAME.fullmatch(args.push_to_hub):
        problems.append(f"--push_to_hub {args.push_to_hub}: must be OWNER/NAME, such as your-name/vit-beans")
    elif not hub.answers():
        problems.append(
            f"--push_to_hub {args.push_to_hub}: the HuggingFace hub does not answer; leave it "
            f"out, and upload later with `huggingface-cli upload {args.push_to_hub} "
            f"{args.output_path}`"
        )
    else:
        from huggingface_hub import get_token

        if not get_token():
            problems.append(
                f"--push_to_hub {args.push_to_hub}: not logged in; run `huggingface-cli login`, or "
                "set HF_TOKEN"
            )


# What a run writes into its output folder, and --overwrite_output removes.
WRITTEN = (
    "checkpoints",
    "tensorboard",
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "metrics.jsonl",
    "metrics.png",
    "README.md",
)


def check_output(
    args, problems: list[str], sources: tuple[str, ...] = ("model_name_or_path", "dataset")
) -> None:
    """Nothing that is there is overwritten unasked, nor what the run is made from. ``sources``.

    The settings that name that.
    """
    if args.eval_only or args.dry_run:
        return
    try:
        _check_output(
            args, Path(args.output_path), [name for name in sources if getattr(args, name, None)], problems
        )
    except OSError as error:  # PermissionError in a folder above
        problems.append(f"--output_path {args.output_path}: {error.strerror}")


def _check_output(args, folder: Path, sources: list[str], problems: list[str]) -> None:
    if folder.exists() and not folder.is_dir():
        return problems.append(f"--output_path {folder}: is a file")
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    finished = bool(lines) and '"kind": "end"' in lines[-1]
    saved = any((folder / "checkpoints").glob("*/meta.json"))
    used = folder.is_dir() and any(folder.iterdir())
    # of this folder's run, or of another into a folder where there is nothing to lose yet
    resumes = (
        args.resume == "auto"
        or args.resume
        and (
            folder.resolve() in Path(args.resume, "x").resolve().parents
            or lines
            and not finished
            and not saved
        )
    )
    if used and args.overwrite_output:
        removed = [(folder / name).resolve() for name in WRITTEN if (folder / name).exists()]
        for name in sources:
            source = Path(getattr(args, name)).resolve()
            own_model = name == "model_name_or_path" and source == folder.resolve()
            if removed and (own_model or set(removed) & {source, *source.parents}):
                problems.append(
                    f"--overwrite_output: {folder} holds {getattr(args, name)}, which this run is made "
                    "from; set OUTPUT_PATH to another folder"
                )
        if removed and not any(
            (folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "failed.json")
        ):
            named = ", ".join(path.name for path in removed)
            problems.append(
                f"--overwrite_output: {folder} would lose {named}, and holds no run that they are of; "
                "set OUTPUT_PATH to another folder"
            )
    elif used and not resumes:
        problems.append(
            f"--output_path {folder}: is not empty; continue that run with --resume auto, replace it with "
            "--overwrite_output, or set OUTPUT_PATH to another folder"
        )
    elif used and args.resume == "auto" and not saved:
        if finished:
            problems.append(
                f"--output_path {folder}: holds a finished run and no checkpoint to go on from; set "
                "OUTPUT_PATH to another folder, or replace it with --overwrite_output"
            )
        elif not lines and any(path.name not in ("failed.json", "checkpoints") for path in folder.iterdir()):
            problems.append(
                f"--output_path {folder}: is not empty and holds no run to resume; set OUTPUT_PATH to "
                "another folder"
            )
    parent = folder.resolve()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        problems += [f"--output_path {folder}: {parent} is a file"] * (parent != folder.resolve())
    elif not os.access(parent, os.W_OK):
        problems.append(f"--output_path {folder}: {parent} cannot be written")
    if args.resume and args.resume != "auto" and not Path(args.resume).is_dir():
        problems.append(f"--resume {args.resume}: no such checkpoint folder (or use `auto`)")
    if args.resume and args.overwrite_output:
        problems.append(
            "--resume with --overwrite_output: one keeps the run, the other removes it; give one of them"
        )


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
    parser.choice("--plugin", tuple(PLUGINS), default="gemini", help="none: plain PyTorch")
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
        fail(*problems)
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


def command_line(without: str | None = None) -> str:
    """This run's command, for the records; ``without`` a flag and its value."""
    import shlex

    words = sys.argv[1:]
    if without in words:
        at = words.index(without)
        del words[at : at + 2]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    by_hand = "TORCHELASTIC_RUN_ID" not in os.environ  # the words have all of it
    start = (
        ["python"]
        if processes == 1 or by_hand
        else ["torchrun", *[f"--nnodes={processes // here}"] * (processes > here), f"--nproc_per_node={here}"]
    )
    return shlex.join([*start, os.path.basename(sys.argv[0]), *words])
