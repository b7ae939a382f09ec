"""From flags to settings: the defaults that follow from the machine, the model, the preset and the plugin."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, fields, replace

from vit.checks import form_problems, model_problems, plugin_problems
from vit.data.sources import DEMO_DATASET
from vit.layout import ParallelLayout
from vit.parallel.plugins import PEERS, plugin_named
from vit.presets import PRESETS, known_architecture
from vit.settings import DEFAULTS, Settings
from vit.system import Machine, host_exists

# The published runs fine-tune a pretrained ViT; vit-demo is trained from scratch on synthetic leaf images.
TRAINING_DEFAULTS = {
    "batch_size": 32,
    "learning_rate": 1e-4,
    "num_epoch": 3,
    "weight_decay": 0.05,
    "warmup_ratio": 0.3,
    "augment": False,
}
DEMO_DEFAULTS = TRAINING_DEFAULTS | {"learning_rate": 1e-3, "num_epoch": 5}
DEMO_MODEL, BASE_MODEL, BASE_DATASET = "vit-demo", "google/vit-base-patch16-224", "AI-Lab-Makerere/beans"
# how much is measured: (with a GPU, without one, where others compute on the same cores)
METHOD_DEFAULTS = {"warmup_steps": (10, 2), "window_steps": (10, 3), "windows": (5, 7)}


def world_size_of(args: argparse.Namespace) -> int:
    return int(os.environ.get("WORLD_SIZE", args.world_size or 1))


def default_precision(plugin: str, preset: str, machine: Machine) -> str:
    allowed = plugin_named(plugin).precisions
    half = "bf16" if machine.has_bf16 or not machine.gpus else "fp16"
    # where a plugin has no fp32, CPUs add bf16 faster than fp16
    wanted = {"published": allowed[:1], "fast": (half,), "cpu": ("fp32", "bf16")}[preset]
    return next((precision for precision in wanted if precision in allowed), allowed[0])


def resolve_plugin(values: dict, machine: Machine, world_size: int) -> list[str]:
    """Fill in what preset and plugin decide, in place. -> notes: one line for each flag that has no effect"""
    notes, name = [], values["plugin"]
    plugin = plugin_named(name)
    without_gpu = "fast" if machine.has_bf16 else "cpu"
    values["preset"] = values["preset"] or ("published" if machine.gpus else without_gpu)
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


def settings_from(values: dict, notes: list[str], machine: Machine) -> Settings:
    known = {name: value for name, value in values.items() if name in DEFAULTS}
    return with_fast_steps(Settings(**known, notes=tuple(notes)), machine)


def with_fast_steps(settings: Settings, machine: Machine) -> Settings:
    """The settings with CUDA graphs and compilation chosen, where the user did not.

    By the preset `fast` steps are recorded if they can be. Whether it pays to compile depends on the length
    of the training, which is not known yet: ``compile`` stays None. With the other presets, and where
    steps cannot be recorded, ``--cuda_graphs`` compiles, too; nothing else is chosen there.
    """
    compiles, graphs, plugin = settings.compile, settings.cuda_graphs, plugin_named(settings.plugin)
    chooses = settings.preset == "fast" and machine.gpus and settings.plugin not in PEERS
    if graphs and compiles is None and (not chooses or plugin.why_not_recorded(settings)):
        compiles = plugin.compiles
    if not chooses:
        return replace(settings, compile=bool(compiles), cuda_graphs=bool(graphs))
    plain, notes = replace(settings, compile=False, cuda_graphs=False), settings.notes
    if compiles is None and form_problems(replace(plain, compile=True), machine):
        compiles = False
    if graphs is None:
        problems = form_problems(replace(plain, cuda_graphs=True), machine)
        reason = plugin.why_not_recorded(settings) or next(iter(problems), "")
        graphs = not reason
        if reason:
            note = f"PRESET=fast records no CUDA graphs: {reason.removeprefix('--cuda_graphs: ')}"
            notes = (*notes, note)
    return replace(settings, compile=compiles, cuda_graphs=graphs, notes=notes)


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
    return settings_from(values, notes, machine)


# ---- the benchmark


@dataclass(frozen=True)
class Case:
    """One case of the benchmark: settings with a batch size, and how it is measured.

    ``problem``: why the plugin, the layout or the device cannot do it; a result like others, recorded as a
    row.
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


def resolve_cases(args: argparse.Namespace, machine: Machine) -> tuple[list[Case], list[str]]:
    """-> (a case of the benchmark for each batch size, what is wrong with the flags)"""
    wrong = []
    args.model_name_or_path = args.model_name_or_path or (BASE_MODEL if machine.gpus else DEMO_MODEL)
    args.plugin = args.plugin or "gemini"
    architecture = known_architecture(args.model_name_or_path)
    if architecture is None:
        known = f"known are the presets {', '.join(PRESETS)}, also with an owner as on the hub"
        wrong.append(f"--model_name_or_path {args.model_name_or_path}: unknown; {known}")
    elif args.image_size == architecture.image_size:
        args.image_size = None  # the model's own
    for name, (with_gpu, without) in METHOD_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, with_gpu if machine.gpus else without)
    cases = []
    for batch_size in dict.fromkeys(args.batch_size):
        values = vars(args) | {"batch_size": batch_size or 1}
        notes = resolve_plugin(values, machine, world_size_of(args))
        settings = settings_from(values, notes, machine)
        settings = replace(settings, compile=settings.compile is not False)  # as in a long training
        problem = "; ".join([*plugin_problems(settings, machine), *model_problems(settings)])
        method = {name: getattr(args, name) for name in CASE_FIELDS - {"settings", "problem"}}
        cases.append(Case(settings, problem=problem, **method))
    return cases, wrong


# ---- one process at a time


def set_rank_environment(args: argparse.Namespace, machine: Machine) -> list[str]:
    """--world_size, --rank, --local_rank, --host and --port as the environment that torchrun would have set.

    -> problems
    """
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
