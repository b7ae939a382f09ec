"""Checks of settings that need no process group. Each returns what is wrong and how to fix it."""

import os
from pathlib import Path

from vit.data.dataset import DataError
from vit.data.sources import find_source
from vit.hub import HUB_NAME, endpoint, is_cached, is_hub_name, reachable
from vit.model import FAMILIES, PRESETS, known_architecture, read_config
from vit.run_folder import RUN_FILES

OFFLINE_HINT = (
    "offline choices: MODEL=a local folder (config.json and weights) or a preset with random weights "
    f"({', '.join(PRESETS)}); DATASET=a local folder of images, parquet or arrow files, or `drawn`"
)


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
    elif not is_hub_name(name):
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
        args.dataset_kind = find_source(args.dataset)
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
    if name not in PRESETS and is_hub_name(name):
        wanted.append(("model", name, "models"))
    if args.dataset_kind == "hub":
        wanted.append(("dataset", args.dataset, "datasets"))
    if not wanted:
        if not vars(args).get("push_to_hub"):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local: no library shall look for updates
        return
    online = os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0", "false")
    if online and reachable():
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    missing = [f"{what} {name}" for what, name, kind in wanted if not is_cached(name, kind)]
    if missing:
        problems.append(
            f"{' and '.join(missing)}: the HuggingFace hub ({endpoint()}) does not answer and "
            f"no copy is cached; {OFFLINE_HINT}"
        )
    else:
        args.notes.append("the HuggingFace hub does not answer: using the cached copies")


def check_push(args, problems: list[str]) -> None:
    """Whether the result can go to the hub is known before hours of training."""
    if not args.push_to_hub or args.eval_only or args.dry_run:
        return
    if not HUB_NAME.fullmatch(args.push_to_hub):
        problems.append(f"--push_to_hub {args.push_to_hub}: must be OWNER/NAME, such as your-name/vit-beans")
    elif not reachable():
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
        removed = [(folder / name).resolve() for name in RUN_FILES if (folder / name).exists()]
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
