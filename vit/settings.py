"""The settings of a run: one frozen record that both programs make once and never write to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any

from vit.layout import ParallelLayout

AUTO: Any = (
    None  # as a default: follows from the machine, the model or another setting; resolved in every run
)
# --auto_augment: torchvision's classes (Müller and Hutter, 2021; Cubuk et al., 2020)
AUTO_AUGMENT = {"trivial": "TrivialAugmentWide", "rand": "RandAugment"}
SELECTION_METRICS = ("accuracy", "loss", "macro_f1")
MESH_MODES = ("2d", "2.5d", "3d")  # tensor parallelism over a mesh of processes: vit/parallel/mesh.py


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run. The defaults are those of the flags; None follows the machine or the
    model.

    Make a changed copy with `dataclasses.replace`.
    """

    # model and data
    model_name_or_path: str = AUTO
    dataset: str = AUTO
    image_size: int | None = None  # pixels; None: the model's
    image_column: str | None = None
    label_column: str | None = None
    dataset_config: str | None = None
    allow_external_images: bool = False
    pixel_range: Sequence[float] | None = None  # black and white in images of more than 8 bits
    validation_fraction: float = 0.1
    fold: str | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    skip_bad_images: bool = False
    check_duplicates: bool = False
    data_memory: float | None = None  # GiB
    data_cache: float = 32.0  # GiB
    num_workers: int | None = None
    # optimisation
    batch_size: int = AUTO  # images per data-parallel rank and micro-step
    learning_rate: float = AUTO  # peak, before scaling
    scale_lr: bool = True
    num_epoch: int = AUTO
    weight_decay: float = AUTO
    warmup_ratio: float = AUTO
    max_norm: float = 0.0
    gradient_accumulation_steps: int = 1
    seed: int = 42
    # augmentation and regularisation; off by default
    augment: bool = AUTO
    auto_augment: str | None = None
    label_smoothing: float = 0.0
    layer_decay: float = 1.0
    drop_path: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    class_weights: str = "none"
    freeze: str | None = None  # "backbone", or the number of layers that are not trained, as text
    lora_rank: int = 0
    lora_alpha: float | None = None  # None: the rank
    mix_epochs: int | None = None  # mix the first epochs only; None: all
    keep: str = "best"
    selection_metric: str = "accuracy"  # by which an epoch is the best
    patience: int | None = None  # epochs without a better one after which the training ends
    # parallelism, precision and memory
    plugin: str = AUTO
    preset: str | None = None
    precision: str = AUTO
    tp_size: int = 1
    pp_size: int = 1
    tp_depth: int = 1  # of 2.5d
    num_microbatches: int = AUTO
    zero_stage: int = AUTO
    placement_policy: str = "static"
    offload_optim_frac: float = AUTO
    offload_param_frac: float = 0.0
    optimizer: str = "adamw"
    grad_checkpoint: bool = AUTO
    compile: bool | None = AUTO  # None: if the training is long enough, see decide_compilation
    cuda_graphs: bool = AUTO
    layout: ParallelLayout = ParallelLayout(1)
    # output
    output_path: str = "./output_model"
    resume: str | None = None
    checkpoint_steps: int = 0
    checkpoint_epochs: int = 1
    keep_checkpoints: int = 1
    overwrite_output: bool = False
    tensorboard: bool = False
    report_to: str | None = None  # an experiment tracker, see vit/tracking.py
    push_to_hub: str | None = None
    eval_only: bool = False
    dry_run: bool = False
    # a run by a config file: its values, see vit/config.py
    config: Mapping[str, Any] = AUTO
    config_path: str | None = None
    notes: tuple[str, ...] = ()  # what the user should know, one line each

    @property
    def record(self) -> dict:
        """What must be equal for a resumed run to be the same run; stored in rows and checkpoints."""
        if self.config is not None:
            given = {name: getattr(self, name) for name in READ_SETTINGS if getattr(self, name)}
            return {"dataset": self.dataset} | given | dict(self.config["record"])
        return {name: getattr(self, name) for name in RECORDED_SETTINGS}

    @property
    def peak_learning_rate(self) -> float:
        """After scaling by the data-parallel size."""
        return self.learning_rate * (self.layout.data_parallel_size if self.scale_lr else 1)

    @property
    def trains_a_part(self) -> bool:
        """Whether some parameters keep their values."""
        return self.freeze is not None or self.lora_rank > 0

    @property
    def may_offload(self) -> bool:
        """Whether weights or optimizer states may be in CPU memory."""
        return self.offload_optim_frac > 0 or self.moves_weights

    @property
    def moves_weights(self) -> bool:
        """Whether Gemini may leave weights, not only optimizer states, in CPU memory."""
        return self.offload_param_frac > 0 or self.placement_policy == "auto"

    @property
    def strategy(self) -> str:
        """How the model is trained, for the plan: plugin, precision, and what saves memory."""
        parts = [f"plugin {self.plugin}" if self.config is None else f"{self.config['mode']}", self.precision]
        parts += [f"preset {self.preset}"] if self.preset else []
        parts += [f"depth {self.tp_depth}"] * (self.tp_depth > 1)
        parts += ["gradient checkpointing"] * bool(self.grad_checkpoint)
        parts += ["compiled"] * bool(self.compile) + ["CUDA graphs"] * bool(self.cuda_graphs)
        offloaded = self.offload_optim_frac
        parts += [f"{offloaded:.0%} of optimizer states offloaded"] * (offloaded > 0)
        parts += [f"{self.num_microbatches} micro-batches"] * (self.pp_size > 1)
        return ", ".join(parts)

    @property
    def selected_by(self) -> str:
        """` by loss`, for the text that names the kept epoch; empty where that is usual: by accuracy."""
        is_default = self.keep == "last" or self.selection_metric == "accuracy"
        return "" if is_default else f" by {self.selection_metric}"

    @property
    def title(self) -> str:
        """Of a run's chart."""
        strategy = self.plugin if self.config is None else self.config["mode"]
        model, dataset = PurePath(self.model_name_or_path).name, PurePath(self.dataset).name
        return f"{model} on {dataset}, {strategy} {self.precision}"

    @property
    def card(self) -> dict:
        """The settings that a model card lists."""
        if self.config is None:
            return self.record | {"preset": self.preset}
        return {"model_name_or_path": self.model_name_or_path} | self.record

    @property
    def advice_on_divergence(self) -> str:
        """What could keep the loss finite and is not set yet, by the names that this program has for it."""
        lower, clip = "--learning_rate", "--max_norm 1"
        if self.config is not None:
            lower, clip = "LEARNING_RATE", "clip_grad_norm = 1"
        ways = [f"lower {lower}"] + [f"set {clip}"] * (not self.max_norm)
        return ", or ".join(ways + ["use bf16 or fp32"] * (self.precision == "fp16"))


DEFAULTS = {field.name: field.default for field in fields(Settings)}

# How the images are read
READ_SETTINGS = "image_column label_column dataset_config pixel_range skip_bad_images".split()
# Sizes that depend on the number of processes are not recorded: they are computed again.
RECORDED_SETTINGS = (
    "model_name_or_path dataset image_size plugin precision optimizer tp_size pp_size zero_stage batch_size "
    "gradient_accumulation_steps learning_rate scale_lr num_epoch weight_decay warmup_ratio max_norm augment "
    "auto_augment label_smoothing layer_decay drop_path mixup cutmix ema keep selection_metric class_weights "
    "freeze lora_rank lora_alpha fold seed max_train_samples max_eval_samples validation_fraction"
).split() + READ_SETTINGS

# What the published setting leaves out, with the value that means so.
AUGMENTATION_DEFAULTS = {
    name: DEFAULTS[name]
    for name in "augment auto_augment label_smoothing layer_decay drop_path mixup cutmix ema keep "
    "selection_metric class_weights freeze lora_rank lora_alpha".split()
} | {"augment": False}


def augmentation_flags(settings: Mapping) -> str:
    """The flags that differ from the published setting, as typed: `--augment --mixup 0.2`, or `none`."""
    values = {name: settings.get(name, off) for name, off in AUGMENTATION_DEFAULTS.items()}
    changed = {name: value for name, value in values.items() if value != AUGMENTATION_DEFAULTS[name]}
    return (
        " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changed.items())
        or "none"
    )
