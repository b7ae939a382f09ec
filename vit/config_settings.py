"""From the values of a config file to `Settings`: what follows from them, and what does not fit together."""

from __future__ import annotations

from pathlib import Path

from vit.config import AMP_TYPE, DEFAULTS, FIELDS, MAY_CHANGE_ON_RESUME
from vit.layout import ParallelLayout, mesh_problems
from vit.presets import VitPreset, mean_pooled_config
from vit.settings import MESH_MODES, Settings
from vit.system import Machine, why_no_compiler
from vit.validate import positive

MODES = ("1d", *MESH_MODES)
# Recorded as mode, tp, pp, depth and precision instead.
RESOLVED = (
    "parallel fp16 bf16 TENSOR_PARALLEL_MODE TENSOR_PARALLEL_SIZE TENSOR_PARALLEL_DEPTH NUM_MICRO_BATCHES"
).split()


def resolve(config: dict) -> list[str]:
    """Fill in what follows from other values, in place: batch sizes, mode, tp, pp, depth, precision.

    -> problems
    """
    problems = _resolve_batch_size(config) + _resolve_parallelism(config)
    fp16 = config["fp16"]
    if fp16 is not None:
        kind = fp16.get("mode")
        known = {kind.value for kind in AMP_TYPE}
        kind_is_known = isinstance(kind, (AMP_TYPE, str)) and getattr(kind, "value", kind) in known
        if set(fp16) - {"mode"} or not kind_is_known:
            problems.append(
                f"fp16 = {fp16!r}: must be dict(mode=AMP_TYPE.TORCH), APEX or NAIVE; all train with fp32 "
                "master weights and a loss scale"
            )
        if config["bf16"]:
            problems.append("fp16 and bf16: give one of them")
    for name in ("MEAN", "STD"):
        config[name] = config[name] and tuple(config[name])
    if config["RAND_AUGMENT"] and len(config["RAND_AUGMENT"]) == 2:
        config["RAND_AUGMENT"] = (*config["RAND_AUGMENT"], 31)
    if config["tp"] * config["pp"] > 1:  # inherited from a config of data parallelism
        config["PLUGIN"] = DEFAULTS["PLUGIN"]
    config["precision"] = "bf16" if config["bf16"] else "fp16" if fp16 is not None else "fp32"
    return problems


def _resolve_batch_size(config: dict) -> list[str]:
    accumulation, total, batch = (
        config[name] for name in ("gradient_accumulation", "TOTAL_BATCH_SIZE", "BATCH_SIZE")
    )
    problems = []
    if batch is None:
        if total % accumulation:
            problems.append(
                f"TOTAL_BATCH_SIZE {total}: is no multiple of gradient_accumulation {accumulation}"
            )
        batch = total // accumulation
    elif total is not None and total != batch * accumulation:
        product = f"BATCH_SIZE {batch} x gradient_accumulation {accumulation}"
        problems.append(f"TOTAL_BATCH_SIZE {total}: is not {product}")
    config["TOTAL_BATCH_SIZE"], config["BATCH_SIZE"] = batch * accumulation, batch
    return problems


def _resolve_parallelism(config: dict) -> list[str]:
    parallel, problems = config["parallel"] or {}, []
    tensor = parallel.get("tensor") or {}
    tensor = {"size": tensor} if isinstance(tensor, int) else tensor  # Colossal-AI's short form
    unknown = [f"parallel[{name!r}]" for name in set(parallel) - {"pipeline", "tensor"}]
    if isinstance(tensor, dict):
        unknown += [f"parallel['tensor'][{name!r}]" for name in set(tensor) - {"mode", "size", "depth"}]
    else:
        unknown.append("parallel['tensor']")
        tensor = {}
    if unknown:
        form = "parallel is dict(pipeline=, tensor=dict(mode=, size=, depth=)); data parallelism follows"
        problems.append(f"{', '.join(sorted(unknown))}: {form}")
    for key in ("mode", "size", "depth"):
        name = f"TENSOR_PARALLEL_{key.upper()}"
        if config[name] is not None and key in tensor and config[name] != tensor[key]:
            problems.append(f"{name} {config[name]}: parallel['tensor'][{key!r}] is {tensor[key]!r}")

    def given(*values):  # 0 is given, and wrong
        return next(value for value in values if value is not None)

    mode = given(tensor.get("mode"), config["TENSOR_PARALLEL_MODE"], "vanilla")
    size = given(tensor.get("size"), config["TENSOR_PARALLEL_SIZE"], 1)
    depth = given(tensor.get("depth"), config["TENSOR_PARALLEL_DEPTH"] if mode == "2.5d" else None, 1)
    pipeline = given(parallel.get("pipeline"), 1)
    pipeline = pipeline.get("size", 1) if isinstance(pipeline, dict) else pipeline
    numbers = {"tensor parallel size": size, "depth": depth, "pipeline": pipeline}
    wrong = [f"{what} {n!r}: {problem}" for what, n in numbers.items() if (problem := positive().problem(n))]
    if mode not in (*MODES, "vanilla"):
        wrong.append(f"tensor parallel mode {mode!r}: must be one of {', '.join(MODES)}, vanilla")
    elif mode == "vanilla" and size != 1 and not wrong:
        wrong.append(f"tensor parallel size {size}: needs a mode, one of {', '.join(MODES)}")
    if wrong:  # what follows is checked without parallelism
        mode, size, depth, pipeline = "vanilla", 1, 1, 1
    config |= {"mode": mode, "tp": size, "depth": depth, "pp": pipeline}
    return problems + wrong


def config_problems(config: dict, world_size: int, machine: Machine) -> list[str]:
    """Everything in a loaded config that does not fit together or with ``world_size`` ranks.

    Calls `resolve`.
    """
    if config["bf16"] == "auto":
        config["bf16"] = machine.gpus > 0 and machine.has_bf16 and config["fp16"] is None
    problems = resolve(config)
    _decide_graphs(config, machine)
    problems += _value_problems(config, machine)
    mode, tp, pp = config["mode"], config["tp"], config["pp"]
    if tp * pp > 1:
        alone = ("POOLING", "POSITIONS", "COMPILE", "CUDA_GRAPHS", "OPTIMIZER")  # as by default otherwise
        problems += [
            f"{name} {config[name]!r}: only goes with data parallelism, not with {mode}, pipeline {pp}"
            for name in alone
            if config[name] != DEFAULTS[name]
        ]
    if world_size % (tp * pp):
        needs = f"tensor parallel size {tp} x pipeline {pp} needs a multiple of {tp * pp}"
        problems.append(f"{world_size} process(es): {needs} (GPUNUM, --nproc_per_node)")
        world_size = tp * pp  # for what follows
    dp, batch = ParallelLayout(world_size, tp, pp).data_parallel_size, config["BATCH_SIZE"]
    if batch % dp:
        groups = f"the {dp} data-parallel groups of {world_size} processes"
        problems.append(f"BATCH_SIZE {batch}: is no multiple of {groups}")
    return problems + _parallelism_problems(config, local_batch_size=batch // dp)


def _decide_graphs(config: dict, machine: Machine) -> None:
    """Decide CUDA_GRAPHS "auto" by what this machine and the config's form can do, in place, and whether
    something is compiled.
    """
    why_not = ""
    if config["CUDA_GRAPHS"] == "auto":
        alone = config["tp"] * config["pp"] == config["gradient_accumulation"] == 1
        config["CUDA_GRAPHS"] = machine.gpus > 0 and alone and config["precision"] != "fp16"
        why_not = why_no_compiler() if config["CUDA_GRAPHS"] and not config["COMPILE"] else ""
    config["compiles"] = config["COMPILE"] or (config["CUDA_GRAPHS"] and not why_not)
    config["notes"] = (f"nothing is compiled: {why_not}",) if why_not else ()


def _value_problems(config: dict, machine: Machine) -> list[str]:
    hidden, warmup = config["HIDDEN_SIZE"], (config["WARMUP_EPOCHS"], config["WARMUP_STEPS"])
    sines = {"POSITIONS": "sincos", "INITIAL_WEIGHTS": "mimetic"}
    with_sines = [f"{name} {value!r}" for name, value in sines.items() if config[name] == value]
    accumulation = config["gradient_accumulation"]
    rules = [
        (
            config["IMG_SIZE"] % config["PATCH_SIZE"],
            f"IMG_SIZE {config['IMG_SIZE']}: is no multiple of PATCH_SIZE {config['PATCH_SIZE']}",
        ),
        (
            hidden % config["NUM_HEADS"],
            f"HIDDEN_SIZE {hidden}: is no multiple of NUM_HEADS {config['NUM_HEADS']}",
        ),
        (
            None not in warmup,
            f"WARMUP_EPOCHS {warmup[0]} and WARMUP_STEPS {warmup[1]}: give one of them, the other as None",
        ),
        (
            (config["MEAN"] is None) != (config["STD"] is None) or (config["STD"] and not all(config["STD"])),
            "MEAN and STD: give both or neither, and no STD of 0",
        ),
        (
            config["RANDOM_RESIZED_CROP"] is not None and config["RANDOM_CROP_PADDING"],
            f"RANDOM_RESIZED_CROP and RANDOM_CROP_PADDING {config['RANDOM_CROP_PADDING']}: give one of them",
        ),
        (
            config["MIX_EPOCHS"] is not None and not (config["MIXUP"] or config["CUTMIX"]),
            f"MIX_EPOCHS {config['MIX_EPOCHS']}: nothing is mixed; set MIXUP or CUTMIX, or leave it out",
        ),
        (
            config["OPTIMIZER"] == "muon" and config["PLUGIN"] != DEFAULTS["PLUGIN"],
            f"OPTIMIZER 'muon': only goes with PLUGIN 'torch_ddp', not with {config['PLUGIN']!r}",
        ),
        (
            config["AUTO_AUGMENT"] and config["RAND_AUGMENT"],
            "AUTO_AUGMENT and RAND_AUGMENT: give one of them",
        ),
        (
            with_sines and (hidden % 4 or hidden < 8),
            f"{', '.join(with_sines)}: needs a HIDDEN_SIZE that is a multiple of 4 from 8, not {hidden}",
        ),
        (
            config["CUDA_GRAPHS"] and accumulation > 1,
            f"CUDA_GRAPHS: a graph runs a whole batch at once, gradient_accumulation is {accumulation}",
        ),
        (config["CUDA_GRAPHS"] and not machine.gpus, "CUDA_GRAPHS: needs a GPU; leave it out"),
    ]
    return [problem for applies, problem in rules if applies]


def _parallelism_problems(config: dict, local_batch_size: int) -> list[str]:
    mode, tp, pp, depth = (config[name] for name in ("mode", "tp", "pp", "depth"))
    problems = []
    if mode in MESH_MODES:
        if pp > 1:
            problems.append(f"pipeline {pp}: goes with 1d and vanilla, not with {mode}")
        problems += mesh_problems(mode, tp, depth, vit_config(config), local_batch_size)
    elif depth > 1:
        problems.append(f"depth {depth}: is for 2.5d, not for {mode}")
    else:
        hidden, heads = config["HIDDEN_SIZE"], config["NUM_HEADS"]
        sizes = {
            "NUM_HEADS": heads,
            "HIDDEN_SIZE": hidden,
            "the MLP size": round(hidden * config["MLP_RATIO"]),
        }
        for name, value in sizes.items():
            if value % tp:
                problems.append(f"{name} {value}: is no multiple of the tensor parallel size {tp}")
    if pp > 1:
        parts = config["NUM_MICRO_BATCHES"] = config["NUM_MICRO_BATCHES"] or pp
        if pp > config["DEPTH"]:
            problems.append(f"pipeline {pp}: is more stages than the {config['DEPTH']} layers")
        if parts < pp:
            problems.append(f"NUM_MICRO_BATCHES {parts}: would leave some of the {pp} stages idle")
        if local_batch_size % parts:
            images = f"the {local_batch_size} images of a data-parallel group"
            problems.append(f"NUM_MICRO_BATCHES {parts}: does not divide {images}")
    return problems


def vit_sizes(config: dict) -> VitPreset:
    """The sizes of the config's model."""
    hidden = config["HIDDEN_SIZE"]
    mlp = round(hidden * config["MLP_RATIO"])
    return VitPreset(
        config["IMG_SIZE"], config["PATCH_SIZE"], hidden, config["DEPTH"], config["NUM_HEADS"], mlp
    )


def vit_config(config: dict, labels: list[str] | None = None):
    """The HuggingFace config of the model: a ViT, or I-JEPA's form of it, which classifies the mean of the
    patches.
    """
    names = {}
    if labels is not None:
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    vit = vit_sizes(config).config(config["NUM_CLASSES"], **names)
    vit.hidden_dropout_prob, vit.attention_probs_dropout_prob = config["DROPOUT"], config["ATTENTION_DROPOUT"]
    return mean_pooled_config(vit) if config["POOLING"] == "mean" else vit


def record(config: dict) -> dict:
    """What must be equal for a resumed run to be the same run, as JSON keeps it."""
    names = [*FIELDS, "mode", "tp", "pp", "depth", "precision"]
    kept = {name: config[name] for name in names if name not in (*MAY_CHANGE_ON_RESUME, *RESOLVED)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def plugin_of(config: dict) -> str:
    """The plugin that trains in the config's form of parallelism."""
    if config["mode"] in MESH_MODES:
        return config["mode"]
    if config["tp"] * config["pp"] > 1 or config["PLUGIN"] == "hybrid_parallel":
        return "hybrid_parallel"
    return "torch_ddp_fp16" if config["precision"] == "fp16" else "torch_ddp"


def to_settings(config: dict, path: str, layout: ParallelLayout, **options) -> Settings:
    """The `Settings` of a checked config. ``options``: those that do not come from the config."""
    return Settings(
        model_name_or_path=Path(path).stem,
        config_path=path,
        config=config | {"record": record(config)},
        layout=layout,
        plugin=plugin_of(config),
        precision=config["precision"],
        tp_size=config["tp"],
        pp_size=config["pp"],
        tp_depth=config["depth"],
        num_microbatches=config["NUM_MICRO_BATCHES"] if config["pp"] > 1 else 1,
        zero_stage=0,
        offload_optim_frac=0.0,
        grad_checkpoint=False,
        compile=config["compiles"],
        cuda_graphs=config["CUDA_GRAPHS"],
        batch_size=config["BATCH_SIZE"] // max(1, layout.data_parallel_size),  # 0: too few ranks
        gradient_accumulation_steps=config["gradient_accumulation"],
        learning_rate=config["LEARNING_RATE"],
        scale_lr=False,
        weight_decay=config["WEIGHT_DECAY"],
        optimizer=config["OPTIMIZER"],
        num_epoch=config["NUM_EPOCHS"],
        max_norm=config["clip_grad_norm"],
        label_smoothing=config["LABEL_SMOOTHING"],
        drop_path=config["DROP_PATH"],
        mixup=config["MIXUP"],
        cutmix=config["CUTMIX"],
        mix_epochs=config["MIX_EPOCHS"],
        ema=config["EMA"],
        keep="last",  # no epoch is selected by the split that the run is evaluated on
        seed=config["SEED"],
        num_workers=config["NUM_WORKERS"],
        checkpoint_epochs=config["CHECKPOINT_EPOCHS"],
        notes=config["notes"],
        **options,
    )


def warmup_steps(config: dict, steps_per_epoch: int) -> int:
    if config["WARMUP_STEPS"] is not None:
        return config["WARMUP_STEPS"]
    return round(steps_per_epoch * config["WARMUP_EPOCHS"])
