"""Checks of settings that need no process group. Each returns what is wrong, where, and how to fix it."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from vit import hub, patches
from vit.data.cifar10 import IMAGE_SIZE, cifar10_label_names
from vit.data.dataset import DataError, check_all_classes, check_class_count
from vit.data.prepared import read_index
from vit.data.sources import class_folders, find_source
from vit.model import read_config
from vit.parallel.plugins import PLUGINS
from vit.presets import FAMILIES, PRESETS, known_architecture
from vit.run_folder import RUN_FILES
from vit.settings import Settings
from vit.system import Machine

OFFLINE_HINT = (
    "offline choices: MODEL=a local folder (config.json and weights) or a preset with random weights "
    f"({', '.join(PRESETS)}); DATASET=a local folder of images, parquet or arrow files, or `drawn`"
)

Rules = list[tuple[object, str]]  # (whether it applies, the problem)


def applying(rules: Rules) -> list[str]:
    return [problem for applies, problem in rules if applies]


def finetune_problems(settings: Settings, machine: Machine) -> list[str]:
    """Everything that is wrong with a run of vit_train_demo.py."""
    fold = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", settings.fold or "1/2")
    fold_is_wrong = not fold or not 2 <= int(fold[2]) <= 100 or int(fold[1]) > int(fold[2])
    rules = [
        (
            settings.layer_decay < 1 and settings.zero_stage and settings.pp_size > 1,
            f"--layer_decay {settings.layer_decay}: ZeRO of Colossal-AI needs a part of every "
            "parameter group on each "
            "pipeline stage; use --zero_stage 0 or PP_SIZE=1",
        ),
        (
            settings.auto_augment and not settings.augment,
            f"--auto_augment {settings.auto_augment}: follows the random crop; add --augment",
        ),
        (fold_is_wrong, f"--fold {settings.fold}: must be K/N, fold K of N from 2 to 100, such as 1/5"),
    ]
    return [
        *patch_problems(),
        *plugin_problems(settings, machine),
        *applying(rules),
        *model_problems(settings),
        *data_problems(settings),
        *hub_problems(settings),
        *upload_problems(settings),
        *output_problems(settings),
    ]


def patch_problems() -> list[str]:
    names = ", ".join(patches.PATCHES)
    return [f"VIT_DISABLE_PATCHES={name}: no such patch; there are {names}" for name in patches.unknown()]


# ---- parallelism, precision and memory


def plugin_problems(settings: Settings, machine: Machine) -> list[str]:
    """What the plugin, the layout or the device cannot do."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    too_many = machine.gpus and local_ranks > machine.gpus
    gpus = (
        f"{local_ranks} processes on a machine with {machine.gpus} GPU(s): set GPUNUM to at "
        f"most {machine.gpus}"
    )
    return [
        *([gpus] if too_many else []),
        *settings.layout.problems(),
        *precision_problems(settings, machine),
        *zero_problems(settings),
        *offload_problems(settings, machine),
        *optimizer_problems(settings, machine),
        *compile_problems(settings, machine),
        *pipeline_problems(settings),
    ]


def precision_problems(settings: Settings, machine: Machine) -> list[str]:
    precision, own = settings.precision, PLUGINS[settings.plugin]
    allowed, fix = own.precisions, f"choose {' or '.join(own.precisions)}"
    relatives = [name for name, plugin in PLUGINS.items() if own.build and plugin.build is own.build]
    if others := [name for name in relatives if precision in PLUGINS[name].precisions]:
        fix = f"use {others[0]} for it"
    return applying(
        [
            (
                precision not in allowed,
                f"--precision {precision}: {settings.plugin} trains in {', '.join(allowed)}; {fix}",
            ),
            (
                precision == "bf16" and machine.gpus and not machine.has_bf16,
                "--precision bf16: this GPU has no bf16 units (they came with Ampere); use --precision fp16",
            ),
        ]
    )


def zero_problems(settings: Settings) -> list[str]:
    stages = PLUGINS[settings.plugin].zero_stages
    shards_16_bit_only = PLUGINS[settings.plugin].model_parallel
    return applying(
        [
            (
                stages and settings.zero_stage not in stages,
                f"--zero_stage {settings.zero_stage}: {settings.plugin} shards something by definition; use "
                f"{' or '.join(map(str, stages))}, or torch_ddp",
            ),
            (
                settings.zero_stage and shards_16_bit_only and settings.precision == "fp32",
                f"--zero_stage with --precision fp32: {settings.plugin} shards 16-bit training only; "
                "use bf16 or fp16",
            ),
        ]
    )


def offload_problems(settings: Settings, machine: Machine) -> list[str]:
    plugin, name = PLUGINS[settings.plugin], settings.plugin
    optim, param = settings.offload_optim_frac, settings.offload_param_frac
    return applying(
        [
            (
                optim and not machine.gpus,
                f"--offload_optim_frac {optim}: there is no GPU to offload from; set it to 0",
            ),
            (
                param and not machine.gpus,
                f"--offload_param_frac {param}: there is no GPU to offload from; set it to 0",
            ),
            (
                param and "param" not in plugin.offloads,
                f"--offload_param_frac {param}: {name} keeps all parameters; gemini offloads them",
            ),
            (
                optim and "optim" not in plugin.offloads,
                f"--offload_optim_frac {optim}: {name} keeps all its states; use low_level_zero or gemini",
            ),
            (
                optim and "optim" in plugin.offloads and not plugin.shards_optimizer(settings.zero_stage),
                f"--offload_optim_frac {optim}: {name} offloads with --zero_stage 1 or 2 only",
            ),
            (
                settings.placement_policy == "auto" and ("param" not in plugin.offloads or not machine.gpus),
                "--placement_policy auto: is gemini's, on a GPU",
            ),
        ]
    )


def optimizer_problems(settings: Settings, machine: Machine) -> list[str]:
    plugin, hybrid_adam = PLUGINS[settings.plugin], settings.optimizer == "hybrid_adam"
    skips_clipping = (
        plugin.own_adam and settings.precision == "bf16" and settings.max_norm and settings.offload_optim_frac
    )
    return applying(
        [
            (hybrid_adam and not machine.gpus, "--optimizer hybrid_adam: its kernels need a GPU; use adamw"),
            (
                hybrid_adam and machine.gpus and skips_clipping,
                "--max_norm with --optimizer hybrid_adam, bf16 and offload: Colossal-AI skips the "
                "clipping; use --optimizer "
                "adamw",
            ),
            (
                settings.tensorboard and not find_spec("tensorboard"),
                "--tensorboard: it is not installed; `pip install tensorboard`, or leave it out",
            ),
            (
                settings.cuda_graphs and hybrid_adam and plugin.replicates_model,
                "--cuda_graphs with --optimizer hybrid_adam: its step cannot be recorded; use adamw",
            ),
        ]
    )


def compile_problems(settings: Settings, machine: Machine) -> list[str]:
    compiles = settings.compile or settings.cuda_graphs
    flag = "--cuda_graphs" if settings.cuda_graphs else "--compile"
    cuts_batch = settings.gradient_accumulation_steps > 1 or settings.pp_size > 1 or settings.grad_checkpoint
    supported = PLUGINS[settings.plugin].compiles
    return applying(
        [
            (settings.cuda_graphs and not machine.gpus, "--cuda_graphs: needs a GPU; leave it out"),
            (
                settings.cuda_graphs and cuts_batch,
                "--cuda_graphs: a graph runs a whole batch at once; without accumulation, pipeline "
                "and --grad_checkpoint "
                "(PRESET=fast)",
            ),
            (
                compiles and not supported,
                f"{flag}: {settings.plugin} swaps parameter storage under the compiler; use another plugin",
            ),
            (
                compiles and supported and settings.tp_size > 1,
                f"{flag}: is not tested with tensor parallelism; use TP_SIZE=1",
            ),
            (
                compiles
                and supported
                and settings.tp_size == 1
                and settings.pp_size > 1
                and settings.compile,
                f"{flag}: is not tested with pipeline parallelism; use PP_SIZE=1",
            ),
        ]
    )


def pipeline_problems(settings: Settings) -> list[str]:
    stages, parts, batch = settings.pp_size, settings.num_microbatches, settings.batch_size
    if stages == 1:
        return []
    if not parts:
        return [
            f"--batch_size {batch}: does not divide into {stages} or more micro-batches for "
            f"--pp_size {stages}; use a "
            f"multiple of {stages}"
        ]
    return applying(
        [
            (
                parts < stages,
                f"--num_microbatches {parts}: fewer than the {stages} stages would leave some idle; "
                f"use {stages} or more",
            ),
            (
                batch % parts,
                f"--num_microbatches {parts}: does not divide --batch_size {batch}; leave it out for the best fit",
            ),
        ]
    )


# ---- model


def model_problems(settings: Settings) -> list[str]:
    """The model's name, and what its sizes must divide into, as far as they are known without the hub."""
    name, problems = settings.model_name_or_path, []
    heads = layers = patch = None
    if Path(name).is_dir():
        config = read_config(Path(name))
        problems = model_folder_problems(settings, config)
        # what the config leaves out has transformers' default
        heads, layers = config.get("num_attention_heads", 12), config.get("num_hidden_layers", 12)
        patch = config.get("patch_size", 16)
    elif shape := known_architecture(name):
        heads, layers, patch = shape.heads, shape.layers, shape.patch_size
    elif not hub.is_hub_name(name):
        presets = ", ".join(PRESETS)
        problems = [
            f"--model_name_or_path {name}: no such folder, and no preset ({presets}); a hub name "
            "has the form owner/name"
        ]
    tp, pp, size = settings.tp_size, settings.pp_size, settings.image_size
    return problems + applying(
        [
            (
                heads and heads % tp,
                f"--tp_size {tp}: does not divide the {heads} attention heads of {name}; use "
                f"{divisors_text(heads or 1)}",
            ),
            (
                layers and pp > layers,
                f"--pp_size {pp}: more stages than the {layers} layers of {name}; use {layers} or fewer",
            ),
            (
                patch and size and size % patch,
                f"--image_size {size}: no multiple of the {patch} px patches of {name}; use "
                f"{patch and size and (size // patch * patch or patch)} or "
                f"{patch and size and (size // patch + 1) * patch}",
            ),
        ]
    )


def model_folder_problems(settings: Settings, config: dict) -> list[str]:
    name, folder = settings.model_name_or_path, Path(settings.model_name_or_path)
    where = f"--model_name_or_path {name}"
    if not config:
        return [
            f"{where}: the folder has no readable config.json; name the folder that a run or "
            "save_pretrained wrote"
        ]
    kind = config.get("model_type")
    if kind not in FAMILIES:
        return [
            f"{where}: is a {kind!r} model; this example trains ViTs, such as "
            "google/vit-base-patch16-224 or a preset"
        ]
    if kind == "ijepa" and PLUGINS[settings.plugin].model_parallel:
        return [
            f"--plugin {settings.plugin}: Colossal-AI cannot shard {name}, which averages its "
            "patches; use another plugin"
        ]
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        return [f"{where}: has a config.json, but no weights beside it (model.safetensors); copy them there"]
    return []


def divisors_text(number: int) -> str:
    """`1, 2, 3 or 6` of 6."""
    *found, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(found)} or {last}" if found else last


# ---- data and hub


def data_problems(settings: Settings) -> list[str]:
    """Whether the data set is there; reads directory entries, and class names where a small file has them."""
    option = "DATA=" if settings.config is not None else "--dataset "
    try:
        source = find_source(settings.dataset)
        if settings.config is not None:
            return scratch_data_problems(settings, source)
        if source == "synthetic":
            return [f"--dataset {settings.dataset}: is for train.py; use drawn, a folder or a hub name"]
    except DataError as error:
        return [error.with_option(option)]
    except OSError as error:  # PermissionError
        return [f"{option}{settings.dataset}: {error.strerror}"]
    return []


def scratch_data_problems(settings: Settings, source: str) -> list[str]:
    name, config = settings.dataset, settings.config
    classes, path = config["NUM_CLASSES"], Path(settings.dataset)
    if source == "cifar10":
        if config["IMG_SIZE"] != IMAGE_SIZE:
            return [
                f"DATA={name}: its images have {IMAGE_SIZE} px, the config's IMG_SIZE is {config['IMG_SIZE']}"
            ]
        check_class_count(name, cifar10_label_names(name), classes)
        if config["RANDOM_RESIZED_CROP"] is not None:
            fix = f"DATA={name} has pixels of one size: use RANDOM_CROP_PADDING"
            return [f"RANDOM_RESIZED_CROP {config['RANDOM_RESIZED_CROP']}: is for image files; {fix}"]
    elif source == "prepared":
        check_class_count(name, read_index(path)["labels"], classes)
    elif source == "imagefolder":
        _, folders = class_folders(path)
        check_class_count(name, folders["train"], classes)
        for split in ("test", "validation"):
            if folders.get(split):
                check_all_classes(name, split, folders[split], folders["train"])
    return []


def names_on_hub(settings: Settings) -> list[tuple[str, str, str]]:
    """What has to come from the hub: ("model", its name, "models") and the same of the data set."""
    model, found = settings.model_name_or_path, []
    if settings.config is None and model not in PRESETS and hub.is_hub_name(model):
        found.append(("model", model, "models"))
    try:
        if find_source(settings.dataset) == "hub":
            found.append(("dataset", settings.dataset, "datasets"))
    except (DataError, OSError):
        pass  # `data_problems` says so
    return found


def hub_problems(settings: Settings) -> list[str]:
    """A hub name needs the hub, or a copy in its cache; told at once instead of after minutes of retries."""
    wanted = names_on_hub(settings)
    if not wanted or hub.is_online():
        return []
    missing = [f"{what} {name}" for what, name, kind in wanted if not hub.is_cached(name, kind)]
    if not missing:
        return []
    where = f"the HuggingFace hub ({hub.endpoint()}) does not answer and no copy is cached"
    return [f"{' and '.join(missing)}: {where}; {OFFLINE_HINT}"]


def upload_problems(settings: Settings) -> list[str]:
    """Whether the result can go to the hub is known before hours of training."""
    name = settings.push_to_hub
    if not name or settings.eval_only or settings.dry_run:
        return []
    if not hub.HUB_NAME.fullmatch(name):
        return [f"--push_to_hub {name}: must be OWNER/NAME, such as your-name/vit-beans"]
    if not hub.reachable():
        later = f"`huggingface-cli upload {name} {settings.output_path}`"
        return [
            f"--push_to_hub {name}: the HuggingFace hub does not answer; leave it out, and upload "
            f"later with {later}"
        ]
    from huggingface_hub import get_token

    if get_token():
        return []
    return [f"--push_to_hub {name}: not logged in; run `huggingface-cli login`, or set HF_TOKEN"]


# ---- output folder


def output_problems(settings: Settings) -> list[str]:
    """Nothing that is there is overwritten without being asked, nor what the run is made from."""
    if settings.eval_only or settings.dry_run:
        return []
    folder = Path(settings.output_path)
    try:
        if folder.exists() and not folder.is_dir():
            return [f"--output_path {folder}: is a file"]
        used = folder.is_dir() and any(folder.iterdir())
        problems = []
        if used and settings.overwrite_output:
            problems = overwrite_problems(settings, folder)
        elif used:
            problems = used_folder_problems(settings, folder)
        return problems + parent_problems(folder) + resume_problems(settings)
    except OSError as error:  # PermissionError in a folder above
        return [f"--output_path {folder}: {error.strerror}"]


def overwrite_problems(settings: Settings, folder: Path) -> list[str]:
    """--overwrite_output removes the files of a run, and never what this run is made from."""
    removed = [(folder / name).resolve() for name in RUN_FILES if (folder / name).exists()]
    model = None if settings.config is not None else settings.model_name_or_path
    problems = []
    for source in (model, settings.dataset):
        if not (source and removed):
            continue
        path = Path(source).resolve()
        is_own_model = source == model and path == folder.resolve()
        if is_own_model or set(removed) & {path, *path.parents}:
            what = f"{folder} holds {source}, which this run is made from"
            problems.append(f"--overwrite_output: {what}; set OUTPUT_PATH to another folder")
    if removed and not any(
        (folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "failed.json")
    ):
        lost = ", ".join(path.name for path in removed)
        problems.append(
            f"--overwrite_output: {folder} would lose {lost}, and holds no run that they are of; "
            "set OUTPUT_PATH to "
            "another folder"
        )
    return problems


def used_folder_problems(settings: Settings, folder: Path) -> list[str]:
    """A folder with files in it must be resumed, by this run or from another into one with nothing to lose yet."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    finished = bool(lines) and '"kind": "end"' in lines[-1]
    saved = any((folder / "checkpoints").glob("*/meta.json"))
    resume, where = settings.resume, f"--output_path {folder}"
    is_own = resume and folder.resolve() in Path(resume, "x").resolve().parents
    nothing_to_lose = lines and not finished and not saved
    if resume != "auto" and not (resume and (is_own or nothing_to_lose)):
        return [
            f"{where}: is not empty; continue that run with --resume auto, replace it with "
            "--overwrite_output, or set "
            "OUTPUT_PATH to another folder"
        ]
    if resume != "auto" or saved:
        return []
    if finished:
        return [
            f"{where}: holds a finished run and no checkpoint to resume; set OUTPUT_PATH to "
            "another folder, or replace "
            "it with --overwrite_output"
        ]
    if not lines and any(path.name not in ("failed.json", "checkpoints") for path in folder.iterdir()):
        return [f"{where}: is not empty and holds no run to resume; set OUTPUT_PATH to another folder"]
    return []


def parent_problems(folder: Path) -> list[str]:
    parent = folder.resolve()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        return [f"--output_path {folder}: {parent} is a file"] if parent != folder.resolve() else []
    return [] if os.access(parent, os.W_OK) else [f"--output_path {folder}: {parent} cannot be written"]


def resume_problems(settings: Settings) -> list[str]:
    resume = settings.resume
    return applying(
        [
            (
                resume and resume != "auto" and not Path(resume).is_dir(),
                f"--resume {resume}: no such checkpoint folder (or use `auto`)",
            ),
            (
                resume and settings.overwrite_output,
                "--resume with --overwrite_output: one keeps the run, the other removes it; give one of them",
            ),
        ]
    )
