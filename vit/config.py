"""Loads a Python config file, applies `--set NAME=VALUE`, and reports all invalid values together.

    config, problems = load_config("configs/cifar10/vit_lite_7_4_2d.py", ["NUM_EPOCHS=10"])

Upper-case names are this program's, lower-case ones Colossal-AI's, as in its published configs. `FIELDS`
lists them.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import enum
import types
from collections.abc import Callable, Sequence
from pathlib import Path

from vit.validate import Number, fraction, positive

REQUIRED = object()


class AMP_TYPE(enum.Enum):
    """The name that published configs import from ``colossalai.amp``; Colossal-AI 0.5.0 no longer has it."""

    APEX = "apex"
    TORCH = "torch"
    NAIVE = "naive"


class ConfigError(ValueError):
    """The file is no config; the message says why, in one line."""


# ---- checks of one value: None if it is right, else what it must be


def _choice(*choices) -> Callable:
    return lambda value: None if value in choices else f"must be one of {', '.join(map(repr, choices))}"


def _of(*kinds: type, what: str) -> Callable:
    return lambda value: None if value is None or isinstance(value, kinds) else f"must be {what} or None"


def _boolean(value) -> str | None:
    return None if isinstance(value, bool) else "must be True or False"


def _switch(value) -> str | None:
    return None if isinstance(value, bool) or value == "auto" else 'must be True, False or "auto"'


def _rgb(value) -> str | None:
    right = isinstance(value, (tuple, list)) and len(value) == 3
    right = right and all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in value)
    what = "must be three numbers from 0 to 1 (red, green, blue), or None: measured"
    return None if value is None or right else what


def _rand_augment(value) -> str | None:
    if value is None:
        return None
    numbers = isinstance(value, (tuple, list)) and len(value) in (2, 3)
    numbers = numbers and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    layers, magnitude, bins = (*value, 31)[:3] if numbers else (0, 0, 0)
    if 1 <= layers <= 8 and 0 <= magnitude < bins and bins > 1:
        return None
    return (
        "must be None, or (layers from 1 to 8, magnitude from 0 to 30), or (layers, "
        "magnitude, magnitudes there are)"
    )


_count = positive(optional=True).problem
_alpha = Number(float, low=0).problem

# name -> (default, check). The model's defaults are ViT-S/16, which the published ImageNet configs leave
# unsaid.
FIELDS: dict[str, tuple] = {
    # optimisation
    "TOTAL_BATCH_SIZE": (None, _count),  # images of a step, over all processes
    "BATCH_SIZE": (None, _count),  # images of a micro-step, over all processes
    "LEARNING_RATE": (REQUIRED, positive(float).problem),  # peak, for the whole batch
    "WEIGHT_DECAY": (
        REQUIRED,
        Number(float, low=0).problem,
    ),  # of matrices; biases, LayerNorms, embeddings: none
    # muon: of the layers' matrices; AdamW of all else (vit/muon.py)
    "OPTIMIZER": ("adamw", _choice("adamw", "muon")),
    "NUM_EPOCHS": (REQUIRED, positive().problem),
    # linear warm-up, then a cosine to zero; a fifth of the training where it would not fit
    "WARMUP_EPOCHS": (None, Number(float, low=0, optional=True).problem),
    "WARMUP_STEPS": (None, Number(int, low=0, optional=True).problem),  # instead of WARMUP_EPOCHS
    "LABEL_SMOOTHING": (0.0, fraction().problem),
    "SEED": (42, Number(int, low=0, high=2**31 - 1).problem),  # of initial weights, order and augmentation
    # the model
    "IMG_SIZE": (224, Number(int, low=4).problem),
    "PATCH_SIZE": (16, positive().problem),
    "HIDDEN_SIZE": (384, positive().problem),
    "DEPTH": (12, positive().problem),  # layers; NUM_LAYERS is the same
    "NUM_HEADS": (6, positive().problem),
    "MLP_RATIO": (4, positive(float).problem),  # MLP size over hidden size
    "NUM_CLASSES": (1000, Number(int, low=2).problem),
    "DROPOUT": (0.0, fraction().problem),
    "ATTENTION_DROPOUT": (0.0, fraction().problem),
    "DROP_PATH": (
        0.0,
        fraction().problem,
    ),  # chance that an image skips the last layer's branches; first layer: 0
    "EMA": (
        0.0,
        fraction(0.99999).problem,
    ),  # decay of the averaged weights, which are evaluated; 0: the weights
    "POOLING": ("class", _choice("class", "mean")),  # classify a class token, or the mean of the patches
    "POSITIONS": ("learned", _choice("learned", "sincos")),  # sincos: fixed, in two dimensions
    # usual: transformers'; mimetic: attention as trained ViTs have it (vit/model_variants.py)
    "INITIAL_WEIGHTS": ("usual", _choice("usual", "mimetic")),
    # the images
    "RANDOM_RESIZED_CROP": (None, positive(float, high=1, optional=True).problem),  # smallest area of a crop
    "RANDOM_CROP_PADDING": (0, Number(int, low=0).problem),  # pixels; 0: no crop
    "RANDOM_FLIP": (False, _boolean),
    "AUTO_AUGMENT": (None, _choice(None, "cifar10", "imagenet", "svhn")),
    "RAND_AUGMENT": (
        None,
        _rand_augment,
    ),  # (layers, magnitude) of torchvision's 31 magnitudes, or with their number
    "MIXUP": (0.0, _alpha),  # alpha; 0: never
    "CUTMIX": (0.0, _alpha),  # alpha; with MIXUP one of the two at random
    "MIX_EPOCHS": (None, Number(int, low=0, optional=True).problem),  # mix the first epochs only; None: all
    "MEAN": (None, _rgb),
    "STD": (None, _rgb),
    "VALIDATION_FRACTION": (None, positive(float, high=0.9, optional=True).problem),  # of train, held out
    "NUM_WORKERS": (
        None,
        Number(int, low=0, high=256, optional=True).problem,
    ),  # of each process; None: by cores
    # parallelism
    # of data parallelism; hybrid_parallel: weights of 16 bit, with fp32 ones in the optimizer
    "PLUGIN": ("torch_ddp", _choice("torch_ddp", "hybrid_parallel")),
    "TENSOR_PARALLEL_SIZE": (None, _count),
    "TENSOR_PARALLEL_MODE": (None, _choice(None, "vanilla", "1d", "2d", "2.5d", "3d")),
    "TENSOR_PARALLEL_DEPTH": (None, _count),  # 2.5d only
    "NUM_MICRO_BATCHES": (None, _count),  # of a pipeline's micro-step
    "parallel": (None, _of(dict, what="a dict")),
    "fp16": (None, _of(dict, what="a dict")),
    "bf16": (False, _switch),  # "auto": on a GPU with bf16, otherwise fp32
    "gradient_accumulation": (1, positive().problem),
    "clip_grad_norm": (0.0, Number(float, low=0).problem),
    "COMPILE": (False, _boolean),  # torch.compile each layer
    # compile, and replay whole steps as CUDA graphs; "auto": on a GPU, where a step can be recorded
    "CUDA_GRAPHS": (False, _switch),
    # the run
    "CHECKPOINT_EPOCHS": (1, positive().problem),  # epochs from one checkpoint to the next
    "LOG_PATH": (None, _of(str, what="a text")),  # folder of the result where --output_path names none
}
DEFAULTS = {name: default for name, (default, _) in FIELDS.items()}
# May differ between a run and its continuation.
MAY_CHANGE_ON_RESUME = (
    "LOG_PATH CHECKPOINT_EPOCHS BATCH_SIZE gradient_accumulation NUM_WORKERS COMPILE CUDA_GRAPHS"
).split()
ALIASES = {"NUM_LAYERS": "DEPTH", "gradient_clipping": "clip_grad_norm", "seed": "SEED"}


# ---- reading


def execute_config(path: Path, overrides: dict) -> dict:
    """Execute a config file; each name in ``overrides`` has that value wherever the file assigns it.

    So what the file computes from an overridden value follows it. A file in the same folder can be a base:
    ``from vit_lite_7_4_vanilla import *``.

    Raises:
        ConfigError: the file cannot be read or run.
    """

    def import_base(name, globals=None, locals=None, fromlist=(), level=0):
        if name.split(".")[0] == "colossalai" and "AMP_TYPE" in (fromlist or ()):
            return types.SimpleNamespace(AMP_TYPE=AMP_TYPE)
        sibling = path.parent / f"{name}.py"
        if level == 0 and sibling.is_file():
            module = types.ModuleType(name)
            vars(module).update(execute_config(sibling, overrides))
            return module
        return builtins.__import__(name, globals, locals, fromlist, level)

    tree = _with_overrides(_parse(path), overrides)
    names: dict = {"__builtins__": vars(builtins) | {"__import__": import_base}}
    names |= {"__overrides__": overrides, "__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(tree, str(path), "exec"), names)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        line = _line_in(path, error)
        raise ConfigError(f"--config {path}{line}: {type(error).__name__}: {error}") from None
    return names


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        raise ConfigError(
            f"--config {path}, line {error.lineno}: is not a Python file: {error.msg}"
        ) from None
    except ValueError:  # not text, or null bytes
        raise ConfigError(f"--config {path}: is not a Python file: it is not text") from None


def _with_overrides(tree: ast.Module, overrides: dict) -> ast.Module:
    """The file with every assignment to an overridden name reading its value from ``__overrides__``."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [
                target.id for target in targets if isinstance(target, ast.Name) and target.id in overrides
            ]
            if names:
                value = ast.parse(f"__overrides__[{names[0]!r}]", mode="eval").body
                node.value = ast.copy_location(value, node)
    return ast.fix_missing_locations(tree)


def _line_in(path: Path, error: BaseException) -> str:
    """Where in the config an exception was raised."""
    trace, lines = error.__traceback__, []
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""


def parse_overrides(words: Sequence[str]) -> tuple[dict, list[str]]:
    """``NAME=VALUE`` words to values: Python expressions as in a config, bare words as texts.

    -> (values, problems)
    """
    values, problems = {}, []
    for word in words:
        name, equals, text = word.partition("=")
        name = ALIASES.get(name, name)
        if not equals or name not in FIELDS:
            problem = f"--set {word}: must be NAME=VALUE with a name of vit/config.py"
            problems.append(problem + did_you_mean(name))
            continue
        try:
            values[name] = eval(text, {"__builtins__": {"dict": dict}, "AMP_TYPE": AMP_TYPE})
        except Exception:
            values[name] = text
    return values, problems


def load_config(path: str, overrides: Sequence[str] = ()) -> tuple[dict, list[str]]:
    """-> (the value of every name in `FIELDS`, problems of names and kinds)

    Raises:
        ConfigError: no such file, or it is not a Python file that runs.
    """
    values, problems = parse_overrides(overrides)
    aliased = {alias: values[name] for alias, name in ALIASES.items() if name in values}
    found = {}
    for name, value in execute_config(Path(path), values | aliased).items():
        if name.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
            continue  # helpers and imports
        name = ALIASES.get(name, name)
        if name in FIELDS:
            found[name] = value
        elif name.isupper() or name.islower():
            hint = did_you_mean(name) + "; helpers begin with an underscore"
            problems.append(f"{name} = {value!r}: vit/config.py knows no such name{hint}")
    found |= values
    config = {}
    for name, (default, check) in FIELDS.items():
        config[name] = 1 if default is REQUIRED else default  # so that further checks can run
        if name not in found:
            problems += [f"{name} is missing"] if default is REQUIRED else []
        elif problem := check(found[name]):
            problems.append(f"{name} = {found[name]!r}: {problem}")
        else:
            config[name] = found[name]
    if config["WARMUP_EPOCHS"] is None and config["WARMUP_STEPS"] is None:
        config["WARMUP_EPOCHS"] = 0
        problems.append("WARMUP_EPOCHS is missing")
    if config["TOTAL_BATCH_SIZE"] is None and config["BATCH_SIZE"] is None:
        config["TOTAL_BATCH_SIZE"] = 0  # divisible by everything
        if not {"TOTAL_BATCH_SIZE", "BATCH_SIZE"} & found.keys():
            problems.append("TOTAL_BATCH_SIZE is missing")
    return config, problems


def did_you_mean(name: str) -> str:
    near = difflib.get_close_matches(name, [*FIELDS, *ALIASES], 1)
    return f" (did you mean {near[0]}?)" if near else ""
