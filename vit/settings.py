"""The settings of a run: their names, defaults and the values that a plugin allows."""

PLUGIN_PRECISIONS = {  # plugin -> the precisions it can do, its published one first
    "torch_ddp": ("fp32", "bf16"),
    "torch_ddp_fp16": ("fp16",),
    "low_level_zero": ("fp16", "bf16", "fp32"),
    "gemini": ("fp16", "bf16"),
    "hybrid_parallel": ("fp16", "bf16", "fp32"),
    "none": ("fp32", "fp16", "bf16"),  # plain PyTorch, the reference
}


# What the published setting leaves out, with the value that means so.
AUGMENTATION_DEFAULTS = dict(
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


def augmentation_flags(settings: dict) -> str:
    """The recipe's flags as they are typed: `--augment --mixup 0.2`; `none` of the published setting."""
    flags = {name: settings.get(name, off) for name, off in AUGMENTATION_DEFAULTS.items()}
    return (
        " ".join(
            f"--{name}" if value is True else f"--{name} {value}"
            for name, value in flags.items()
            if value != AUGMENTATION_DEFAULTS[name]
        )
        or "none"
    )


# What must be equal for a resumed run to be the same run. Sizes that depend on the number of processes
# are not
# among them: they are worked out again.
RECORDED_SETTINGS = (
    "model_name_or_path",
    "dataset",
    "image_size",
    "plugin",
    "precision",
    "optimizer",
    "tp_size",
    "pp_size",
    "zero_stage",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "scale_lr",
    "num_epoch",
    "weight_decay",
    "warmup_ratio",
    "max_norm",
    "augment",
    "auto_augment",
    "label_smoothing",
    "layer_decay",
    "drop_path",
    "mixup",
    "cutmix",
    "ema",
    "keep",
    "fold",
    "seed",
    "max_train_samples",
    "max_eval_samples",
    "validation_fraction",
    "image_column",
    "label_column",
    "skip_bad_images",
)

MESH_MODES = ("2d", "2.5d", "3d")  # built by vit/parallel/mesh.py; the rest by Booster plugins
