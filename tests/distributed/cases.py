"""The plugins and layouts that the tests train: the one list to add a plugin to.

parallel_cases.py runs them, test_parallel.py and test_resume.py compare them.
"""

from helpers import CLASS_WEIGHTS, LABEL_SMOOTHING, LORA, MAX_NORM

from vit.parallel.plugins import PLUGINS


def zero(stage=1, **changes):
    return dict(plugin="low_level_zero", zero_stage=stage, **changes)


def hybrid(tp=1, pp=1, microbatches=None, **changes):
    return dict(
        plugin="hybrid_parallel", tp=tp, pp=pp, num_microbatches=microbatches or max(1, pp), **changes
    )


def gemini(precision="bf16", **changes):
    return dict(plugin="gemini", precision=precision, **changes)


# name -> settings, on one process and on two
EVERYWHERE = {
    "ddp": dict(),
    "zero1": zero(1),
    "zero2": zero(2),
    "ddp bf16": dict(precision="bf16"),
    "ddp fp16": dict(plugin="torch_ddp_fp16", precision="fp16"),
    "zero1 bf16": zero(1, precision="bf16"),
    "zero1 fp16": zero(1, precision="fp16"),
    "zero2 bf16": zero(2, precision="bf16"),
    "gemini bf16": gemini(),
    "gemini fp16": gemini("fp16"),
    "fsdp": dict(plugin="torch_fsdp"),
    "fsdp bf16": dict(plugin="torch_fsdp", precision="bf16"),
}
LAYOUTS = {
    1: {"hybrid": hybrid(), "hybrid fp16": hybrid(precision="fp16")},
    2: {
        "tp2": hybrid(tp=2),
        "pp2": hybrid(pp=2),
        "pp2 of 4 micro-batches": hybrid(pp=2, microbatches=4),
        "hybrid dp2": hybrid(),
        "tp2 bf16": hybrid(tp=2, precision="bf16"),
        "pp2 fp16": hybrid(pp=2, precision="fp16"),
        "hybrid zero1 bf16": hybrid(zero_stage=1, precision="bf16"),
        "hybrid zero2 fp16": hybrid(zero_stage=2, precision="fp16"),
    },
    4: {
        "ddp": dict(),
        "zero1": zero(1),
        "gemini bf16": gemini(),
        "fsdp": dict(plugin="torch_fsdp"),
        "tp4": hybrid(tp=4),
        "pp4": hybrid(pp=4),
        "tp2 pp2": hybrid(tp=2, pp=2),
        "dp2 tp2": hybrid(tp=2),
        "dp2 pp2": hybrid(pp=2),
        "dp2 tp2 zero1 bf16": hybrid(tp=2, zero_stage=1, precision="bf16"),
        "dp2 pp2 zero1 bf16": hybrid(pp=2, zero_stage=1, precision="bf16"),
    },
}


# whose optimizer's step is patched
PATCHED = {
    1: ("zero1", "zero1 bf16", "zero1 fp16", "zero2 bf16", "hybrid", "hybrid fp16"),
    2: ("zero1", "zero1 bf16", "zero2 bf16", "hybrid dp2", "hybrid zero1 bf16", "tp2 bf16", "pp2 fp16"),
}


# Whether DistributedDataParallel is around the model: where there are gradients to reduce
WRAPPED = {1: {"ddp": False, "hybrid": False}, 2: {"tp2": False, "ddp": True, "hybrid dp2": True}}


def trainings(processes: int) -> dict[str, dict]:
    """Name -> arguments of `train`.

    Each plugin and layout plain, clipped, accumulated over two micro-steps, and by the recipe.
    """
    plain = plain_cases(processes)
    cases = {f"{name}, clipped": case | dict(max_norm=MAX_NORM) for name, case in plain.items()}
    cases |= {f"{name}, accumulated": case | dict(k=2, max_norm=MAX_NORM) for name, case in plain.items()}
    refused = "dp2 pp2 zero1 bf16"  # layer decay there: args.py
    cases |= {
        f"{name}, recipe": case | dict(recipe=True, max_norm=MAX_NORM)
        for name, case in plain.items()
        if name != refused
    }
    if processes < 4:  # four processes share two cores
        cases |= {name: case for name, case in plain.items() if not name.endswith("16") or "gemini" in name}
        for name in ("ddp", "zero1", "gemini bf16", "fsdp", "hybrid", "tp2", "pp2"):
            if name in plain:
                cases[f"{name}, recomputed"] = plain[name] | dict(grad_checkpoint=True)
    return cases


def plain_cases(processes: int) -> dict[str, dict]:
    """The plugins and layouts on so many processes."""
    return (EVERYWHERE | LAYOUTS[processes]) if processes < 4 else LAYOUTS[4]


def options(processes: int) -> dict[str, dict]:
    """Name -> arguments of `train`, for each plugin and layout.

    Class weights accumulated and smoothed; frozen parameters with all of the recipe, and recomputed.
    """
    weighted = dict(k=2, max_norm=MAX_NORM, class_weights=CLASS_WEIGHTS, label_smoothing=LABEL_SMOOTHING)
    plain = plain_cases(processes)
    cases = {f"{name}, weighted": case | weighted for name, case in plain.items()}
    for name, case in plain.items():
        for freeze in freezes(name):
            recomputed = freeze == "1" and processes < 4
            frozen = dict(freeze=freeze, max_norm=MAX_NORM, recipe=True, grad_checkpoint=recomputed)
            cases[f"{name}, frozen {freeze}"] = case | frozen
        if has_lora(case):
            lora = dict(lora_rank=LORA["r"], lora_alpha=LORA["lora_alpha"], recipe=True, k=2)
            cases[f"{name}, lora"] = case | lora
    return cases


def has_lora(case: dict) -> bool:
    """Whether a plugin and layout can train LoRA."""
    return not (
        PLUGINS[case.get("plugin", "torch_ddp")].why_no_lora or max(case.get("tp", 1), case.get("pp", 1)) > 1
    )


def freezes(name: str) -> list[str]:
    """What can be frozen under a plugin and layout: not all that the first pipeline stage trains."""
    if name == "dp2 pp2 zero1 bf16":  # the recipe's layer decay is refused there
        return []
    return [] if "pp4" in name else ["1"] if "pp2" in name else ["backbone", "1"]


EVALUATIONS = {
    1: {"ddp": dict(), "zero1": zero(), "hybrid": hybrid()},
    2: {
        "ddp": dict(),
        "zero1": zero(),
        "fsdp": dict(plugin="torch_fsdp"),
        "tp2": hybrid(tp=2),
        "pp2": hybrid(pp=2),
    },
    4: {
        "ddp": dict(),
        "tp4": hybrid(tp=4),
        "pp4": hybrid(pp=4),
        "tp2 pp2": hybrid(tp=2, pp=2),
        "dp2 pp2": hybrid(pp=2),
    },
}
ALL_OF_THE_RECIPE = "--label_smoothing 0.1 --layer_decay 0.8 --drop_path 0.3 --mixup 0.8 --cutmix 1 --ema 0.8"
# name -> (step of the checkpoint, flags); an epoch has 6 steps of 4 images on one process, 3 of 8 on two
RESUMES = {
    1: {
        "ddp": (6, "--plugin torch_ddp"),
        "ddp mid-epoch": (2, "--plugin torch_ddp"),
        "ddp_fp16": (8, "--plugin torch_ddp_fp16"),
        "recipe": (8, f"--plugin torch_ddp {ALL_OF_THE_RECIPE}"),
        "gemini": (4, "--plugin gemini"),
    },
    2: {
        "ddp": (2, "--plugin torch_ddp"),
        "ddp bf16": (3, "--plugin torch_ddp --precision bf16"),
        "ddp_fp16": (4, "--plugin torch_ddp_fp16"),
        "zero1": (2, "--plugin low_level_zero --precision fp32"),
        "zero1 fp16": (4, "--plugin low_level_zero --precision fp16"),
        "zero2 bf16": (2, "--plugin low_level_zero --precision bf16 --zero_stage 2"),
        "gemini bf16": (2, "--plugin gemini --precision bf16"),
        "gemini fp16": (4, "--plugin gemini --precision fp16"),
        "tp2": (2, "--plugin hybrid_parallel --tp_size 2"),
        "pp2": (4, "--plugin hybrid_parallel --pp_size 2"),
        "pp2 bf16": (2, "--plugin hybrid_parallel --pp_size 2 --precision bf16"),
        "hybrid zero1 fp16": (2, "--plugin hybrid_parallel --precision fp16 --zero_stage 1"),
        "fsdp": (2, "--plugin torch_fsdp --precision fp32"),
        "fsdp bf16": (4, "--plugin torch_fsdp"),
        "fsdp recipe": (4, f"--plugin torch_fsdp --precision fp32 {ALL_OF_THE_RECIPE}"),
        "zero1 recipe": (4, f"--plugin low_level_zero --precision fp32 {ALL_OF_THE_RECIPE}"),
        "gemini recipe": (4, f"--plugin gemini --precision bf16 {ALL_OF_THE_RECIPE}"),
        "pp2 recipe": (4, f"--plugin hybrid_parallel --pp_size 2 {ALL_OF_THE_RECIPE}"),
    },
    4: {"tp2 pp2": (2, "--plugin hybrid_parallel --tp_size 2 --pp_size 2 --precision fp16")},
}

# as RESUMES, of runs that train a part of the weights; their losses are no goldens
PARTLY_TRAINED = {
    1: {"options/frozen ddp": (8, "--plugin torch_ddp --freeze 2")},
    2: {
        "options/lora ddp": (4, "--plugin torch_ddp --lora_rank 4 --lora_alpha 32 --layer_decay 0.8"),
        "options/lora zero1 fp16": (4, "--plugin low_level_zero --precision fp16 --lora_rank 4 --ema 0.8"),
        "options/lora hybrid bf16": (4, "--plugin hybrid_parallel --precision bf16 --lora_rank 2"),
        "options/frozen zero1 fp16": (
            4,
            "--plugin low_level_zero --precision fp16 --freeze backbone --ema 0.8",
        ),
        "options/frozen gemini": (4, "--plugin gemini --precision bf16 --freeze 2 --ema 0.8"),
        "options/frozen pp2 bf16": (4, "--plugin hybrid_parallel --pp_size 2 --precision bf16 --freeze 1"),
        "options/frozen fsdp": (4, "--plugin torch_fsdp --freeze 2"),
    },
    4: {},
}
# runs whose best epoch is the one with the highest macro F1
SELECTIONS = {
    1: {"ddp": "--plugin torch_ddp"},
    2: {
        "ddp": "--plugin torch_ddp",
        "tp2": "--plugin hybrid_parallel --precision fp32 --tp_size 2",
        "pp2": "--plugin hybrid_parallel --precision fp32 --pp_size 2",
    },
    4: {},
}


def names(processes: int) -> list[str]:
    """The plugins and layouts that are trained on so many processes."""
    return list(plain_cases(processes))
