"""Checks of settings that need no process group. Each yields what is wrong, where, and how to fix it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from vit import hub
from vit.data.cifar10 import IMAGE_SIZE, cifar10_label_names
from vit.data.dataset import DataError, check_all_classes, check_class_count
from vit.data.folders import class_folders
from vit.data.prepared import read_index
from vit.data.sources import find_source
from vit.layout import freeze_problem
from vit.model_folder import PREPROCESSING, read_model_folder
from vit.output_checks import output_problems
from vit.parallel.plugins import PEERS, PLUGINS, plugin_named
from vit.patches import disabled
from vit.presets import PRESETS, known_architecture
from vit.settings import Settings
from vit.system import Machine, local_world_size

OFFLINE_HINT = (
    "offline choices: MODEL=a local folder (config.json and weights) or a preset with random weights "
    f"({', '.join(PRESETS)}); DATASET=a local folder of images, parquet or arrow files, or `drawn`"
)


def finetune_problems(settings: Settings, machine: Machine) -> list[str]:
    """Everything that is wrong with a run of vit_train_demo.py."""
    checks = (recipe_problems, model_problems, data_problems, hub_problems, upload_problems, output_problems)
    return plugin_problems(settings, machine) + [problem for check in checks for problem in check(settings)]


def recipe_problems(settings: Settings) -> Iterator[str]:
    if settings.layer_decay < 1 and settings.zero_stage and settings.pp_size > 1:
        reason = "ZeRO of Colossal-AI needs a part of every parameter group on each pipeline stage"
        yield f"--layer_decay {settings.layer_decay}: {reason}; use --zero_stage 0 or PP_SIZE=1"
    if settings.auto_augment and not settings.augment:
        yield f"--auto_augment {settings.auto_augment}: follows the random crop; add --augment"
    if settings.patience and settings.keep == "last":
        yield f"--patience {settings.patience}: waits for a better epoch, not with --keep last; leave one out"
    if settings.selection_metric != "accuracy" and settings.keep == "last":
        flag = f"--selection_metric {settings.selection_metric}"
        yield f"{flag}: chooses the best epoch, not with --keep last; leave one out"
    if settings.freeze not in (None, "backbone") and not settings.freeze.isdecimal():
        yield f"--freeze {settings.freeze}: must be `backbone` or a number of layers, such as 6"
    fold = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", settings.fold or "1/2")
    if not fold or not 2 <= int(fold[2]) <= 100 or int(fold[1]) > int(fold[2]):
        yield f"--fold {settings.fold}: must be K/N, fold K of N from 2 to 100, such as 1/5"


# ---- parallelism, precision and memory


def plugin_problems(settings: Settings, machine: Machine) -> list[str]:
    """What the plugin, the layout or the device cannot do."""
    return [
        *settings.layout.problems(),
        *device_problems(settings, machine),
        *precision_problems(settings),
        *offload_problems(settings, machine),
        *form_problems(settings, machine),
        *pipeline_problems(settings),
        *peer_problems(settings),
    ]


def too_many_ranks(machine: Machine) -> str:
    """Says that this launch has more ranks on this machine than it has GPUs; empty if it has not."""
    ranks = local_world_size()
    if not machine.gpus or ranks <= machine.gpus:
        return ""
    return f"{ranks} processes on a machine with {machine.gpus} GPU(s)"


def device_problems(settings: Settings, machine: Machine) -> Iterator[str]:
    if where := too_many_ranks(machine):
        yield f"{where}: set GPUNUM to at most {machine.gpus}"
    if settings.precision == "bf16" and machine.gpus and not machine.has_bf16:
        yield "--precision bf16: this GPU has no bf16 units (they came with Ampere); use --precision fp16"
    if settings.optimizer == "hybrid_adam" and not machine.gpus:
        yield "--optimizer hybrid_adam: its kernels need a GPU; use adamw"
    if settings.optimizer == "muon" and not plugin_named(settings.plugin).replicates_model:
        whole = ", ".join(name for name, plugin in PLUGINS.items() if plugin.replicates_model)
        yield f"--optimizer muon: needs whole matrices, and {settings.plugin} may cut them; use {whole}"
    if settings.tensorboard and not find_spec("tensorboard"):
        yield "--tensorboard: it is not installed; `pip install tensorboard`, or leave it out"


def precision_problems(settings: Settings) -> Iterator[str]:
    plugin, name, precision = plugin_named(settings.plugin), settings.plugin, settings.precision
    if precision not in plugin.precisions:
        relatives = [other for other, entry in PLUGINS.items() if entry.build and entry.build is plugin.build]
        others = [other for other in relatives if precision in PLUGINS[other].precisions]
        fix = f"use {others[0]} for it" if others else f"choose {' or '.join(plugin.precisions)}"
        yield f"--precision {precision}: {name} trains in {', '.join(plugin.precisions)}; {fix}"
    if plugin.zero_stages and settings.zero_stage not in plugin.zero_stages:
        stages = " or ".join(map(str, plugin.zero_stages))
        reason = f"{name} shards something by definition"
        yield f"--zero_stage {settings.zero_stage}: {reason}; use {stages}, or torch_ddp"
    if settings.zero_stage and plugin.model_parallel and precision == "fp32":
        yield f"--zero_stage with --precision fp32: {name} shards 16-bit training only; use bf16 or fp16"


def offload_problems(settings: Settings, machine: Machine) -> Iterator[str]:
    plugin, name = plugin_named(settings.plugin), settings.plugin
    optim, param = settings.offload_optim_frac, settings.offload_param_frac
    for flag, part in (("offload_optim_frac", optim), ("offload_param_frac", param)):
        if part and not machine.gpus:
            yield f"--{flag} {part}: there is no GPU to offload from; set it to 0"
    if param and "param" not in plugin.offloads:
        yield f"--offload_param_frac {param}: {name} keeps all parameters; gemini offloads them"
    if optim and "optim" not in plugin.offloads:
        yield f"--offload_optim_frac {optim}: {name} keeps all its states; use low_level_zero or gemini"
    elif optim and not plugin.shards_optimizer(settings.zero_stage):
        yield f"--offload_optim_frac {optim}: {name} offloads with --zero_stage 1 or 2 only"
    if settings.placement_policy == "auto" and ("param" not in plugin.offloads or not machine.gpus):
        yield "--placement_policy auto: is gemini's, on a GPU"
    if settings.optimizer == "hybrid_adam" and machine.gpus and plugin.own_adam and optim:
        if settings.precision == "bf16" and settings.max_norm:
            flags = "--max_norm with --optimizer hybrid_adam, bf16 and offload"
            yield f"{flags}: Colossal-AI skips the clipping; use --optimizer adamw"


def form_problems(settings: Settings, machine: Machine) -> list[str]:
    """Why steps cannot be compiled, or recorded, as ``settings`` ask for."""
    return [*compile_problems(settings, machine), *lora_problems(settings)]


def compile_problems(settings: Settings, machine: Machine) -> Iterator[str]:
    plugin = plugin_named(settings.plugin)
    why_not = plugin.why_not_recorded(settings)
    if settings.cuda_graphs:
        passes = plugin.records_passes(settings)
        if settings.optimizer == "hybrid_adam" and not why_not and not passes:
            yield "--cuda_graphs with --optimizer hybrid_adam: its step cannot be recorded; use adamw"
        needed = {"steady_chunks", "operations_without_hooks", "update_after_replay"}
        if plugin.own_adam and needed & set(disabled()):
            yield "--cuda_graphs: VIT_DISABLE_PATCHES switches off what gemini needs for it; leave one out"
        if not machine.gpus:
            yield "--cuda_graphs: needs a GPU; leave it out"
        repeats = settings.grad_checkpoint and not passes
        if settings.gradient_accumulation_steps > 1 or settings.pp_size > 1 or repeats:
            fix = "without accumulation, pipeline and --grad_checkpoint (PRESET=fast)"
            yield f"--cuda_graphs: a graph runs a whole batch at once; {fix}"
        elif settings.grad_checkpoint and settings.drop_path:
            yield "--cuda_graphs with --grad_checkpoint: cannot record --drop_path; leave one of them out"
    if not (settings.compile or settings.cuda_graphs):
        return
    flag = "--compile"  # at fault also where graphs were chosen beside it
    if settings.cuda_graphs and (plugin.compiles or not settings.compile):
        flag = "--cuda_graphs"
    if not plugin.compiles and (settings.compile or not plugin.records):
        yield f"{flag}: {settings.plugin} {plugin.why_not_compiled}; use another plugin"
    elif not plugin.compiles and why_not:  # the others' forward and backward passes can still be recorded
        yield f"--cuda_graphs with {settings.plugin}: {why_not}; leave it out"
    elif settings.tp_size > 1:
        yield f"{flag}: is not tested with tensor parallelism; use TP_SIZE=1"
    elif settings.pp_size > 1 and settings.compile:
        yield f"{flag}: is not tested with pipeline parallelism; use PP_SIZE=1"


def pipeline_problems(settings: Settings) -> Iterator[str]:
    stages, parts, batch = settings.pp_size, settings.num_microbatches, settings.batch_size
    if stages == 1:
        return
    if not parts:
        where = f"{stages} or more micro-batches for --pp_size {stages}"
        yield f"--batch_size {batch}: does not divide into {where}; use a multiple of {stages}"
        return
    if parts < stages:
        reason = f"fewer than the {stages} stages would leave some idle"
        yield f"--num_microbatches {parts}: {reason}; use {stages} or more"
    if batch % parts:
        fix = "leave it out for the best fit"
        yield f"--num_microbatches {parts}: does not divide --batch_size {batch}; {fix}"


def peer_problems(settings: Settings) -> Iterator[str]:
    """Of the benchmark's other programs, which are measured in their plainest form."""
    name = settings.plugin
    if name not in PEERS:
        return
    if not find_spec(name):
        yield f"{name} is not installed: `pip install {name}`"
    for flag, given in (
        ("--cuda_graphs", settings.cuda_graphs),
        ("--gradient_accumulation_steps", settings.gradient_accumulation_steps > 1),
        ("--optimizer", settings.optimizer != "adamw"),
    ):
        if given:
            yield f"{flag}: {name} is measured without it"


def lora_problems(settings: Settings) -> Iterator[str]:
    flag, plugin = f"--lora_rank {settings.lora_rank}", plugin_named(settings.plugin)
    if not settings.lora_rank:
        if settings.lora_alpha is not None:
            yield f"--lora_alpha {settings.lora_alpha:g}: is a factor of LoRA; add --lora_rank 16"
        return
    if plugin.why_no_lora:
        able = ", ".join(name for name, other in PLUGINS.items() if not other.why_no_lora)
        yield f"{flag}: {settings.plugin} {plugin.why_no_lora}; use {able}"
    elif settings.tp_size > 1:
        yield f"{flag}: Colossal-AI's LoRA cannot be cut by tensor parallelism; use TP_SIZE=1"
    elif settings.pp_size > 1:
        yield f"{flag}: pipeline stages are cut from a bare ViT, and PEFT wraps it; use PP_SIZE=1"
    if settings.freeze is not None:
        yield f"{flag}: trains the classifier and LoRA alone, and --freeze something else; leave one out"
    if settings.compile or settings.cuda_graphs:
        yield f"{flag}: is not tested with --compile and --cuda_graphs; leave these out"
    if not find_spec("peft"):
        yield f"{flag}: PEFT is not installed; `pip install 'peft<0.14'`, or leave it out"


# ---- model


def model_problems(settings: Settings) -> Iterator[str]:
    """The model's name, and what its sizes must divide into, as far as they are known without the hub."""
    name = settings.model_name_or_path
    heads, layers, patch, known = 1, settings.pp_size, 1, True
    if Path(name).is_dir():
        kind = hub.read_config(Path(name)).get("model_type")
        if kind == "ijepa" and plugin_named(settings.plugin).model_parallel:
            reason = f"Colossal-AI cannot shard {name}, which averages its patches"
            yield f"--plugin {settings.plugin}: {reason}; use another plugin"
        try:
            config = read_model_folder(Path(name))
        except DataError as error:
            yield f"--model_name_or_path {name}: {error}"
        else:
            if settings.eval_only and not (Path(name) / PREPROCESSING).exists():
                yield f"--eval_only: {name} has no {PREPROCESSING} to prepare images by; copy it there"
            # what the config leaves out has transformers' default
            heads, layers = config.get("num_attention_heads", 12), config.get("num_hidden_layers", 12)
            patch = config.get("patch_size", 16)
    elif shape := known_architecture(name):
        heads, layers, patch = shape.heads, shape.layers, shape.patch_size
    elif known := not hub.is_hub_name(name):
        nothing = f"no such folder, and no preset ({', '.join(PRESETS)})"
        yield f"--model_name_or_path {name}: {nothing}; a hub name has the form owner/name"
    tp, pp, size = settings.tp_size, settings.pp_size, settings.image_size
    if heads % tp and heads > 1:
        heads_text = f"the {heads} attention heads of {name}"
        yield f"--tp_size {tp}: does not divide {heads_text}; use {divisors_text(heads)}"
    if pp > layers:
        yield f"--pp_size {pp}: more stages than the {layers} layers of {name}; use {layers} or fewer"
    if problem := freeze_problem(settings.freeze, pp, layers if known else None):
        yield problem
    if size and size % patch:
        below, above = size // patch * patch or patch, (size // patch + 1) * patch
        yield f"--image_size {size}: no multiple of the {patch} px patches of {name}; use {below} or {above}"


def divisors_text(number: int) -> str:
    """`1, 2, 3 or 6` of 6."""
    *found, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(found)} or {last}" if found else last


# ---- data and hub


def data_problems(settings: Settings) -> Iterator[str]:
    """Whether the data set is there; reads directory entries, and class names where a small file has them."""
    option = "--dataset " if settings.config is None else "DATA="
    if (given := settings.pixel_range) and not (None in given or given[0] < given[1]):
        yield f"--pixel_range {given[0]:g} {given[1]:g}: black must be below white"
    try:
        source = find_source(settings.dataset)
        if settings.config is not None:
            yield from scratch_data_problems(settings, source)
        elif source == "synthetic":
            yield f"--dataset {settings.dataset}: is for train.py; use drawn, a folder or a hub name"
    except DataError as error:
        yield error.with_option(option)
    except OSError as error:  # PermissionError
        yield f"{option}{settings.dataset}: {error.strerror}"


def scratch_data_problems(settings: Settings, source: str) -> Iterator[str]:
    name, config, path = settings.dataset, settings.config, Path(settings.dataset)
    classes, size, crop = config["NUM_CLASSES"], config["IMG_SIZE"], config["RANDOM_RESIZED_CROP"]
    if source == "cifar10":
        if size != IMAGE_SIZE:
            yield f"DATA={name}: its images have {IMAGE_SIZE} px, the config's IMG_SIZE is {size}"
            return
        check_class_count(name, cifar10_label_names(name), classes)
        if crop is not None:
            fix = f"DATA={name} has pixels of one size: use RANDOM_CROP_PADDING"
            yield f"RANDOM_RESIZED_CROP {crop}: is for image files; {fix}"
    elif source == "prepared":
        check_class_count(name, read_index(path)["labels"], classes)
    elif source == "imagefolder":
        _, folders = class_folders(path)
        check_class_count(name, folders["train"], classes)
        for split in ("test", "validation"):
            if folders.get(split):
                check_all_classes(name, split, folders[split], folders["train"])


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


def hub_problems(settings: Settings) -> Iterator[str]:
    """A hub name needs the hub, or a copy in its cache; said at once instead of after minutes of retries."""
    wanted = names_on_hub(settings)
    if not wanted or hub.is_online():
        return
    missing = [f"{what} {name}" for what, name, kind in wanted if not hub.is_cached(name, kind)]
    if missing:
        where = f"the HuggingFace hub ({hub.endpoint()}) does not answer and no copy is cached"
        yield f"{' and '.join(missing)}: {where}; {OFFLINE_HINT}"


def upload_problems(settings: Settings) -> Iterator[str]:
    """Whether the result can go to the hub is known before hours of training."""
    name = settings.push_to_hub
    if not name or settings.eval_only or settings.dry_run:
        return
    if not hub.HUB_NAME.fullmatch(name):
        yield f"--push_to_hub {name}: must be OWNER/NAME, such as your-name/vit-beans"
    elif not hub.reachable():
        later = f"`huggingface-cli upload {name} {settings.output_path}`"
        reason = "the HuggingFace hub does not answer"
        yield f"--push_to_hub {name}: {reason}; leave it out, and upload later with {later}"
    else:
        from huggingface_hub import get_token

        if not get_token():
            yield f"--push_to_hub {name}: not logged in; run `huggingface-cli login`, or set HF_TOKEN"
