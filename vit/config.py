"""A training run as a Python file: read it, override values, and say everything that is wrong with it at
once.

    config, problems = load("configs/cifar10/vit_lite_7_4_2d.py", ["NUM_EPOCHS=10"])
    problems += check(config, world=4)

Upper-case names are the trainer's, lower-case ones Colossal-AI's, as in its published configs. `NAMES`
lists them all.
Everything is checked without a process group.
"""

import ast
import builtins
import enum
import math
import types
from pathlib import Path

from vit.layout import ParallelLayout
from vit.system import gpu_count

MODES = ("1d", "2d", "2.5d", "3d")


REQUIRED = object()


class AMP_TYPE(enum.Enum):
    """The name that published configs import from ``colossalai.amp``; 0.5.0 has it no more."""

    APEX = "apex"
    TORCH = "torch"
    NAIVE = "naive"


def _number(kind, low=None, above=None, high=None, optional=False):
    """A check: None when the value is fine, else what it must be."""
    bounds = " and ".join(
        f"{sign} {bound}" for sign, bound in ((">=", low), (">", above), ("<=", high)) if bound is not None
    )
    what = (
        f"must be {'a whole number' if kind is int else 'a number'} {bounds}".rstrip() + " or None" * optional
    )

    def check(value):
        if optional and value is None:
            return None
        right = (
            isinstance(value, (int, float) if kind is float else int)
            and not isinstance(value, bool)
            and math.isfinite(value)
        )
        inside = (
            right
            and (low is None or value >= low)
            and (above is None or value > above)
            and (high is None or value <= high)
        )
        return None if inside else what

    return check


def _choice(*choices):
    return lambda value: None if value in choices else f"must be one of {', '.join(map(repr, choices))}"


def _boolean(value):
    return None if isinstance(value, bool) else "must be True or False"


def _text(value):
    return None if value is None or isinstance(value, str) else "must be a text or None"


def _rgb(value):
    right = (
        isinstance(value, (tuple, list))
        and len(value) == 3
        and all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in value)
    )
    return (
        None
        if value is None or right
        else "must be three numbers from 0 to 1 (red, green, blue), or None: measured"
    )


def _rand_augment(value):
    if value is None:
        return None
    whole = (
        isinstance(value, (tuple, list))
        and len(value) in (2, 3)
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    )
    layers, magnitude, bins = (*value, 31)[:3] if whole else (0, 0, 0)
    right = 1 <= layers <= 8 and 0 <= magnitude < bins and bins > 1
    return (
        None
        if right
        else (
            "must be None, or (layers from 1 to 8, magnitude from 0 to 30), or (layers, "
            "magnitude, magnitudes there are)"
        )
    )


def _dictionary(value):
    return None if value is None or isinstance(value, dict) else "must be a dict or None"


# name -> (default, check). The defaults of the model are ViT-S/16, which the published ImageNet configs
# mean without
# saying so.
FIELDS = {
    "TOTAL_BATCH_SIZE": (None, _number(int, low=1, optional=True)),  # images of a step, over all processes
    "BATCH_SIZE": (None, _number(int, low=1, optional=True)),  # images of a micro-step, over all processes
    "LEARNING_RATE": (REQUIRED, _number(float, above=0)),  # peak, for the whole batch
    "WEIGHT_DECAY": (
        REQUIRED,
        _number(float, low=0),
    ),  # of matrices; biases, LayerNorms and embeddings have none
    "NUM_EPOCHS": (REQUIRED, _number(int, low=1)),
    "WARMUP_EPOCHS": (
        None,
        _number(float, low=0, optional=True),
    ),  # linear, then a cosine to zero; a fifth of the training where it would not fit
    "WARMUP_STEPS": (None, _number(int, low=0, optional=True)),  # instead of WARMUP_EPOCHS
    "LABEL_SMOOTHING": (0.0, _number(float, low=0, high=0.99)),
    "SEED": (42, _number(int, low=0, high=2**31 - 1)),  # of initial weights, order and augmentation
    # the model
    "IMG_SIZE": (224, _number(int, low=4)),
    "PATCH_SIZE": (16, _number(int, low=1)),
    "HIDDEN_SIZE": (384, _number(int, low=1)),
    "DEPTH": (12, _number(int, low=1)),  # layers; NUM_LAYERS is the same
    "NUM_HEADS": (6, _number(int, low=1)),
    "MLP_RATIO": (4, _number(float, above=0)),  # MLP size over hidden size
    "NUM_CLASSES": (1000, _number(int, low=2)),
    "DROPOUT": (0.0, _number(float, low=0, high=0.99)),
    "ATTENTION_DROPOUT": (0.0, _number(float, low=0, high=0.99)),
    "DROP_PATH": (
        0.0,
        _number(float, low=0, high=0.99),
    ),  # chance that an image skips the last layer's branches; falls to 0 at the first
    "EMA": (
        0.0,
        _number(float, low=0, high=0.99999),
    ),  # decay of the weights' moving average, which is evaluated and exported; 0: the weights
    "POOLING": (
        "class",
        _choice("class", "mean"),
    ),  # what is classified: a class token, or the mean of the patches (there is no class token then)
    "POSITIONS": ("learned", _choice("learned", "sincos")),  # sincos: fixed, in two dimensions
    "INITIAL_WEIGHTS": (
        "usual",
        _choice("usual", "mimetic"),
    ),  # usual: transformers'; mimetic: attention as trained ViTs have it, learned positions from sines
    # the images
    "RANDOM_RESIZED_CROP": (
        None,
        _number(float, above=0, high=1, optional=True),
    ),  # smallest area of a crop; evaluation: shorter side, centre crop
    "RANDOM_CROP_PADDING": (0, _number(int, low=0)),  # pixels; 0: no crop
    "RANDOM_FLIP": (False, _boolean),
    "AUTO_AUGMENT": (None, _choice(None, "cifar10", "imagenet", "svhn")),
    "RAND_AUGMENT": (
        None,
        _rand_augment,
    ),  # (layers, magnitude) of torchvision's 31 magnitudes, or with their number: (2, 10, 11)
    "MIXUP": (0.0, _number(float, low=0)),  # alpha; 0: never
    "CUTMIX": (0.0, _number(float, low=0)),  # alpha; with MIXUP one of the two at random
    "MIX_EPOCHS": (
        None,
        _number(int, low=0, optional=True),
    ),  # how many epochs, from the first, are mixed; None: all
    "MEAN": (None, _rgb),
    "STD": (None, _rgb),
    "VALIDATION_FRACTION": (None, _number(float, above=0, high=0.9, optional=True)),  # of train, held out
    "NUM_WORKERS": (
        None,
        _number(int, low=0, high=256, optional=True),
    ),  # processes that decode, of each process; None: by the cores
    # parallelism
    "TENSOR_PARALLEL_SIZE": (None, _number(int, low=1, optional=True)),
    "TENSOR_PARALLEL_MODE": (None, _choice(None, "vanilla", *MODES)),
    "TENSOR_PARALLEL_DEPTH": (None, _number(int, low=1, optional=True)),  # 2.5d alone
    "NUM_MICRO_BATCHES": (None, _number(int, low=1, optional=True)),  # of a pipeline's micro-step
    "parallel": (None, _dictionary),
    "fp16": (None, _dictionary),
    "bf16": (False, _boolean),
    "gradient_accumulation": (1, _number(int, low=1)),
    "clip_grad_norm": (0.0, _number(float, low=0)),
    "COMPILE": (False, _boolean),  # torch.compile each layer
    "CUDA_GRAPHS": (False, _boolean),  # compile, and replay whole steps as CUDA graphs: for small batches
    # the run
    "CHECKPOINT_EPOCHS": (1, _number(int, low=1)),  # epochs from one checkpoint to the next
    "LOG_PATH": (None, _text),  # folder of the result where --output_path names none
}


ALIASES = {"NUM_LAYERS": "DEPTH", "gradient_clipping": "clip_grad_norm", "seed": "SEED"}


# What may differ between a run and its continuation.
MAY_CHANGE_ON_RESUME = (
    "LOG_PATH",
    "CHECKPOINT_EPOCHS",
    "BATCH_SIZE",
    "gradient_accumulation",
    "NUM_WORKERS",
    "COMPILE",
    "CUDA_GRAPHS",
)


class ConfigError(ValueError):
    """The file is no config; the message says why, in one line."""


def execute_config(path: Path, overrides: dict) -> dict:
    """Execute a config file; each name in ``overrides`` has that value wherever the file assigns it.

    So what is worked out from an overridden value follows it. A file beside it can be a base:
    ``from vit_lite_7_4_vanilla import *``.
    """
    try:
        tree = ast.parse(path.read_text(), str(path))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:  # ValueError: not text, or null bytes
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        reason = error.msg if isinstance(error, SyntaxError) else "it is not text"
        raise ConfigError(f"--config {path}{line}: is not a Python file: {reason}") from None

    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [t.id for t in targets if isinstance(t, ast.Name) and t.id in overrides]
            if names:
                node.value = ast.copy_location(
                    ast.Subscript(ast.Name("__overrides__", ast.Load()), ast.Constant(names[0]), ast.Load()),
                    node,
                )
    ast.fix_missing_locations(tree)

    def imports(name, globals=None, locals=None, fromlist=(), level=0):
        if name.split(".")[0] == "colossalai" and "AMP_TYPE" in (fromlist or ()):
            return types.SimpleNamespace(AMP_TYPE=AMP_TYPE)
        sibling = path.parent / f"{name}.py"
        if level == 0 and sibling.is_file():
            module = types.ModuleType(name)
            vars(module).update(execute_config(sibling, overrides))
            return module
        return builtins.__import__(name, globals, locals, fromlist, level)

    names = {
        "__builtins__": vars(builtins) | {"__import__": imports},
        "__overrides__": overrides,
        "__name__": path.stem,
        "__file__": str(path),
    }
    try:
        exec(compile(tree, str(path), "exec"), names)
    except (Exception, SystemExit) as error:
        trace = error.__traceback__
        lines = []
        while trace:
            if trace.tb_frame.f_code.co_filename == str(path):
                lines.append(trace.tb_lineno)
            trace = trace.tb_next
        where = f", line {lines[-1]}" if lines else ""
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--config {path}{where}: {type(error).__name__}: {error}") from None
    return names


def parse_overrides(words: list[str]) -> tuple[dict, list[str]]:
    """``NAME=VALUE`` words to values: Python expressions as in a config, and bare words as texts.

    -> (values, problems)
    """
    values, problems = {}, []
    for word in words:
        name, equals, text = word.partition("=")
        name = ALIASES.get(name, name)
        if not equals or name not in FIELDS:
            problems.append(f"--set {word}: must be NAME=VALUE with a name of config.py" + did_you_mean(name))
            continue
        try:
            values[name] = eval(text, {"__builtins__": {"dict": dict}, "AMP_TYPE": AMP_TYPE})
        except Exception:
            values[name] = text
    return values, problems


def load_config(path: str, overrides: list[str] = ()) -> tuple[dict, list[str]]:
    """-> (value of every known name, problems of names and kinds). Sizes: `check`.

    Raises:
        ConfigError: no such file, or it is not a Python file that runs.
    """
    values, problems = parse_overrides(overrides)
    # a file may assign the synonym
    names = execute_config(
        Path(path), values | {other: values[name] for other, name in ALIASES.items() if name in values}
    )
    found = {}
    for name, value in names.items():
        if name.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
            continue  # helpers and imports
        name = ALIASES.get(name, name)
        if name in FIELDS:
            found[name] = value
        elif name.isupper() or name.islower():
            problems.append(
                f"{name} = {value!r}: config.py knows no such name"
                + did_you_mean(name)
                + "; helpers begin with an underscore"
            )
    found |= values
    config = {}
    for name, (default, wrong) in FIELDS.items():
        if name not in found and default is REQUIRED:
            problems.append(f"{name} is missing")
        config[name] = fallback = 1 if default is REQUIRED else default  # so that `check` can go on
        if name in found:
            mend = wrong(found[name])
            config[name] = fallback if mend else found[name]
            if mend:
                problems.append(f"{name} = {found[name]!r}: {mend}")
    if config["WARMUP_EPOCHS"] is None and config["WARMUP_STEPS"] is None:
        config["WARMUP_EPOCHS"] = 0
        problems.append("WARMUP_EPOCHS is missing")
    if config["TOTAL_BATCH_SIZE"] is None and config["BATCH_SIZE"] is None:
        config["TOTAL_BATCH_SIZE"] = 0  # divisible by all
        if not {"TOTAL_BATCH_SIZE", "BATCH_SIZE"} & found.keys():
            problems.append("TOTAL_BATCH_SIZE is missing")
    return config, problems


def did_you_mean(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, [*FIELDS, *ALIASES], 1)
    return f" (did you mean {near[0]}?)" if near else ""


def docstring(path: str) -> str:
    """The card of an experiment: the docstring of its config."""
    return ast.get_docstring(ast.parse(Path(path).read_text())) or ""


def resolve_parallelism(config: dict, problems: list[str]) -> None:
    """Fill in what follows from other values, in place.

    Batch sizes, ``mode``, ``tp``, ``pp``, ``depth``, ``precision``.
    """
    accumulation, total, batch = (
        config["gradient_accumulation"],
        config["TOTAL_BATCH_SIZE"],
        config["BATCH_SIZE"],
    )
    if batch is None:
        if total % accumulation:
            problems.append(
                f"TOTAL_BATCH_SIZE {total}: is no multiple of gradient_accumulation {accumulation}"
            )
        batch = total // accumulation
    elif total is not None and total != batch * accumulation:
        problems.append(
            f"TOTAL_BATCH_SIZE {total}: is not BATCH_SIZE {batch} x gradient_accumulation {accumulation}"
        )
    config["TOTAL_BATCH_SIZE"], config["BATCH_SIZE"] = batch * accumulation, batch

    parallel = config["parallel"] or {}
    tensor = parallel.get("tensor") or {}
    tensor = {"size": tensor} if isinstance(tensor, int) else tensor  # Colossal-AI's short form
    strangers = [f"parallel[{name!r}]" for name in set(parallel) - {"pipeline", "tensor"}]
    strangers += (
        [f"parallel['tensor'][{name!r}]" for name in set(tensor) - {"mode", "size", "depth"}]
        if isinstance(tensor, dict)
        else ["parallel['tensor']"]
    )
    if strangers:
        problems.append(
            f"{', '.join(sorted(strangers))}: parallel is dict(pipeline=, tensor=dict(mode=, "
            "size=, depth=)); data parallelism follows"
        )
        tensor = tensor if isinstance(tensor, dict) else {}
    for name, key in (
        ("TENSOR_PARALLEL_MODE", "mode"),
        ("TENSOR_PARALLEL_SIZE", "size"),
        ("TENSOR_PARALLEL_DEPTH", "depth"),
    ):
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
    wrong = [
        f"{what} {number!r}: {mend}"
        for what, number in numbers.items()
        if (mend := _number(int, low=1)(number))
    ]
    if mode not in (*MODES, "vanilla"):
        wrong.append(f"tensor parallel mode {mode!r}: must be one of {', '.join(MODES)}, vanilla")
    elif mode == "vanilla" and size != 1 and not wrong:
        wrong.append(f"tensor parallel size {size}: needs a mode, one of {', '.join(MODES)}")
    if wrong:  # what follows is checked without parallelism
        problems += wrong
        mode, size, depth, pipeline = "vanilla", 1, 1, 1
    config |= dict(mode=mode, tp=size, depth=depth, pp=pipeline)

    fp16 = config["fp16"]
    kind = (fp16 or {}).get("mode")
    if fp16 is not None and (
        set(fp16) - {"mode"}
        or not isinstance(kind, (AMP_TYPE, str))
        or getattr(kind, "value", kind) not in {t.value for t in AMP_TYPE}
    ):
        problems.append(
            f"fp16 = {fp16!r}: must be dict(mode=AMP_TYPE.TORCH), APEX or NAIVE; all train with "
            "fp32 master weights and a loss scale"
        )
    if fp16 is not None and config["bf16"]:
        problems.append("fp16 and bf16: give one of them")
    for name in ("MEAN", "STD"):
        config[name] = config[name] and tuple(config[name])
    if config["RAND_AUGMENT"] and len(config["RAND_AUGMENT"]) == 2:
        config["RAND_AUGMENT"] = (*config["RAND_AUGMENT"], 31)
    config["precision"] = "bf16" if config["bf16"] else "fp16" if fp16 is not None else "fp32"


def config_layout(config: dict, world: int, rank: int = 0) -> ParallelLayout:
    return ParallelLayout(world, config["tp"], config["pp"], rank)


def vit_config(config: dict, labels: list[str] | None = None):
    """HuggingFace's config of the model.

    A ViT, or I-JEPA's form of it, which classifies the mean of the patches.
    """
    from vit.model import VitPreset
    from vit.model_variants import mean_pooled_config

    hidden = config["HIDDEN_SIZE"]
    sizes = VitPreset(
        config["IMG_SIZE"],
        config["PATCH_SIZE"],
        hidden,
        config["DEPTH"],
        config["NUM_HEADS"],
        round(hidden * config["MLP_RATIO"]),
    )
    names = (
        {}
        if labels is None
        else {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    )
    vit = sizes.config(config["NUM_CLASSES"], **names)
    vit.hidden_dropout_prob, vit.attention_probs_dropout_prob = config["DROPOUT"], config["ATTENTION_DROPOUT"]
    return mean_pooled_config(vit) if config["POOLING"] == "mean" else vit


def config_problems(config: dict, world: int) -> list[str]:
    """Everything in a loaded config that does not fit together or with ``world`` processes.

    Calls `resolve`.
    """
    problems = []
    resolve_parallelism(config, problems)
    mode, tp, pp, depth = config["mode"], config["tp"], config["pp"], config["depth"]
    hidden, heads, batch = config["HIDDEN_SIZE"], config["NUM_HEADS"], config["BATCH_SIZE"]
    if config["IMG_SIZE"] % config["PATCH_SIZE"]:
        problems.append(f"IMG_SIZE {config['IMG_SIZE']}: is no multiple of PATCH_SIZE {config['PATCH_SIZE']}")
    if hidden % heads:
        problems.append(f"HIDDEN_SIZE {hidden}: is no multiple of NUM_HEADS {heads}")
    if config["WARMUP_EPOCHS"] is not None and config["WARMUP_STEPS"] is not None:
        problems.append(
            f"WARMUP_EPOCHS {config['WARMUP_EPOCHS']} and WARMUP_STEPS {config['WARMUP_STEPS']}: "
            "give one of them, the other as None"
        )
    if (config["MEAN"] is None) != (config["STD"] is None) or (config["STD"] and not all(config["STD"])):
        problems.append("MEAN and STD: give both or neither, and no STD of 0")
    if config["RANDOM_RESIZED_CROP"] is not None and config["RANDOM_CROP_PADDING"]:
        problems.append(
            f"RANDOM_RESIZED_CROP and RANDOM_CROP_PADDING {config['RANDOM_CROP_PADDING']}: give one of them"
        )
    if config["MIX_EPOCHS"] is not None and not (config["MIXUP"] or config["CUTMIX"]):
        problems.append(
            f"MIX_EPOCHS {config['MIX_EPOCHS']}: nothing is mixed; set MIXUP or CUTMIX, or leave it out"
        )
    if config["AUTO_AUGMENT"] and config["RAND_AUGMENT"]:
        problems.append("AUTO_AUGMENT and RAND_AUGMENT: give one of them")
    sines = [
        f"{name} {value!r}"
        for name, value in (("POSITIONS", "sincos"), ("INITIAL_WEIGHTS", "mimetic"))
        if config[name] == value
    ]
    if sines and (hidden % 4 or hidden < 8):
        problems.append(
            f"{', '.join(sines)}: needs a HIDDEN_SIZE that is a multiple of 4 from 8, not {hidden}"
        )
    if config["CUDA_GRAPHS"] and config["gradient_accumulation"] > 1:
        problems.append(
            "CUDA_GRAPHS: a graph runs a whole batch at once, gradient_accumulation is "
            f"{config['gradient_accumulation']}"
        )
    if config["CUDA_GRAPHS"] and not gpu_count():
        problems.append("CUDA_GRAPHS: needs a GPU; leave it out")
    if tp * pp > 1:
        alone = {"POOLING": "class", "POSITIONS": "learned", "COMPILE": False, "CUDA_GRAPHS": False}
        problems += [
            f"{name} {config[name]!r}: only goes with data parallelism, not with {mode}, pipeline {pp}"
            for name in alone
            if config[name] != alone[name]
        ]
    if world % (tp * pp):
        problems.append(
            f"{world} process(es): tensor parallel size {tp} x pipeline {pp} needs a multiple of "
            f"{tp * pp} (GPUNUM, --nproc_per_node)"
        )
        world = tp * pp  # for what follows
    dp = config_layout(config, world).dp
    if batch % dp:
        problems.append(
            f"BATCH_SIZE {batch}: is no multiple of the {dp} data-parallel groups of {world} processes"
        )
    rows = batch // dp
    if mode in ("2d", "2.5d", "3d"):
        from vit.layout import mesh_problems

        if config["DROP_PATH"]:
            problems.append(
                f"DROP_PATH {config['DROP_PATH']}: goes with 1d and vanilla; in {mode} the slices of "
                "an image would not be skipped together"
            )
        if pp > 1:
            problems.append(f"pipeline {pp}: goes with 1d and vanilla, not with {mode}")
        problems += mesh_problems(mode, tp, depth, vit_config(config), rows)
    elif depth > 1:
        problems.append(f"depth {depth}: is for 2.5d, not for {mode}")
    else:
        mlp = round(hidden * config["MLP_RATIO"])
        for name, value in (("NUM_HEADS", heads), ("HIDDEN_SIZE", hidden), ("the MLP size", mlp)):
            if value % tp:
                problems.append(f"{name} {value}: is no multiple of the tensor parallel size {tp}")
    if pp > 1:
        pieces = config["NUM_MICRO_BATCHES"] = config["NUM_MICRO_BATCHES"] or pp
        if pp > config["DEPTH"]:
            problems.append(f"pipeline {pp}: is more stages than the {config['DEPTH']} layers")
        if pieces < pp:
            problems.append(f"NUM_MICRO_BATCHES {pieces}: would leave some of the {pp} stages idle")
        if rows % pieces:
            problems.append(
                f"NUM_MICRO_BATCHES {pieces}: does not divide the {rows} images of a data-parallel group"
            )
    return problems


def recorded_settings(config: dict) -> dict:
    """What must be equal for a resumed run to be the same run, as JSON keeps it.

    See checkpoint.check_settings.
    """
    kept = {
        name: config[name]
        for name in [*FIELDS, "mode", "tp", "pp", "depth", "precision"]
        if name not in MAY_CHANGE_ON_RESUME
    }
    drop = (
        "parallel",
        "fp16",
        "bf16",
        "TENSOR_PARALLEL_MODE",
        "TENSOR_PARALLEL_SIZE",
        "TENSOR_PARALLEL_DEPTH",
        "NUM_MICRO_BATCHES",
    )
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in kept.items()
        if name not in drop
    }
