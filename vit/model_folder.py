"""What the files of a model say: config, weights and preprocessing. No torch.

Everything here raises a `DataError` of one line for what transformers or this project cannot use. The checks
read a local folder by it before a launch; `load_model` reads models of the hub by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vit import hub
from vit.data.dataset import DataError
from vit.presets import FAMILIES
from vit.versions import pickles_are_safe, pickles_refused

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PREPROCESSING = "preprocessor_config.json"
# (the name's start, number) of a parameter of a layer; releases of transformers name the list differently
LAYER = re.compile(r"(.*?)(?:encoder\.layer|layers)\.(\d+)\.")


def read_model_folder(folder: Path) -> dict:
    """The config of a local model folder, after a look at its weights and its preprocessing.

    Raises:
        DataError: something is missing, damaged, or nothing that this project can train.
    """
    given = hub.read_config(folder)
    if not given:
        fix = "name the folder that a run or save_pretrained wrote"
        raise DataError(f"the folder has no readable config.json; {fix}")
    config = usable_config(given)
    check_weights(folder, config)
    if (folder / PREPROCESSING).exists():
        check_preprocessing(_read_json(folder / PREPROCESSING))
    return config


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path.name} is not readable ({error}): copy it again") from None


# ---- config.json


def usable_config(given: dict) -> dict:
    """A config.json with sizes in whole pixels, without class names and without the precision of the file.

    Raises:
        DataError: it is of no ViT, of images that are not square or not RGB, or of quantized weights.
    """
    kind = given.get("model_type")
    if kind is None:
        raise DataError('config.json has no model_type; add "model_type": "vit" if it is a ViT')
    if kind not in FAMILIES:
        examples = "google/vit-base-patch16-224 or a preset"
        raise DataError(f"is a {kind!r} model; this example trains ViTs, such as {examples}")
    if "quantization_config" in given:
        raise DataError("has quantized weights, which cannot be trained; name the model that they come from")
    if (channels := given.get("num_channels", 3)) != 3:
        raise DataError(f"takes images of {channels} channels; this example trains on RGB")
    dropped = ("id2label", "label2id", "num_labels", "torch_dtype", "dtype")
    config = {name: value for name, value in given.items() if name not in dropped}
    for name in ("image_size", "patch_size"):
        if name in config:
            config[name] = _side(config[name], name)
    # what the config leaves out has transformers' default
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12} | config
    width, heads, layers = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_hidden_layers"]
    if not all(isinstance(value, int) and value > 0 for value in (width, heads, layers)) or width % heads:
        text = f"hidden_size {width}, num_attention_heads {heads} and num_hidden_layers {layers}"
        raise DataError(f"config.json has {text}, which is no ViT; copy it again")
    return config


def _side(value: Any, name: str) -> int:
    """224 of 224, [224] and [224, 224]."""
    sides = value if isinstance(value, list) and value else [value]
    side = sides[0]
    if not isinstance(side, int) or side < 1 or any(other != side for other in sides):
        raise DataError(f"config.json has {name} {value}; this example trains on square images and patches")
    return side


def class_names(given: dict) -> list[str] | None:
    """The names of the classifier's outputs, in their order; None if config.json does not number them from 0.

    Args:
        given: config.json as it is.
    """
    names = given.get("id2label")
    if names is None:
        return [f"LABEL_{i}" for i in range(given.get("num_labels", 2))]
    if isinstance(names, list):
        return [str(name) for name in names]
    try:
        numbered = {int(number): str(name) for number, name in dict(names).items()}
    except (TypeError, ValueError):
        return None
    return [numbered[i] for i in range(len(numbered))] if set(numbered) == set(range(len(numbered))) else None


# ---- weights


def check_weights(folder: Path, config: dict) -> None:
    """Whether the files of the weights are there and whole, and hold the layers of ``config``.

    Reads names and sizes in safetensors files, no weights. Pickled files are not opened.
    """
    if (folder / WEIGHTS).exists():
        files = [WEIGHTS]
    elif (folder / INDEX).exists():
        files = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
    elif any((folder / name).exists() for name in PICKLED):
        if not pickles_are_safe():
            raise DataError(pickles_refused())
        return
    else:
        raise DataError(f"has a config.json, but no weights beside it ({WEIGHTS}); copy them there")
    shapes = {name: shape for file in files for name, shape in _shapes_in(folder / file).items()}
    check_layers(shapes, config)
    check_embeddings(shapes, config)


def _shapes_in(path: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise DataError(f"has no {path.name}, which {INDEX} lists: copy it there")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as start:
            if start.read(30).startswith(b"version https://git-lfs"):
                raise DataError(f"{path.name} is a pointer of Git LFS: run `git lfs pull` there") from None
        raise DataError(f"{path.name} is damaged ({error}): copy it again") from None


def check_layers(names: Iterable[str], config: dict) -> None:
    """Whether parameters of these names are those of ``config``. Transformers ignores others.

    Args:
        names: as in the files, with or without the name of the model's base in front (`vit.`).
    """
    found = [match.groups() for name in names if (match := LAYER.match(name))]
    prefixes, numbers = {prefix for prefix, _ in found}, {int(number) for _, number in found}
    layers = config.get("num_hidden_layers", 12)
    if not found:
        raise DataError("its files hold no weights of a ViT; copy those of the model that config.json is of")
    if strange := prefixes - {"", f"{config['model_type']}."}:
        raise DataError(f"its weights have names in `{min(strange)}`; save the model without its wrapper")
    if numbers != set(range(layers)):
        fix = "copy both from the same model"
        raise DataError(f"has weights of {len(numbers)} layers, and config.json is of {layers}; {fix}")


def check_embeddings(shapes: dict[str, list[int]], config: dict) -> None:
    """Whether the embeddings in the files have the sizes of ``config``."""
    width, patch = config.get("hidden_size", 768), config.get("patch_size", 16)
    image = config.get("image_size", 224)
    tokens = (image // patch) ** 2
    expected = {  # with and without a class token
        "embeddings.position_embeddings": ([1, tokens, width], [1, tokens + 1, width]),
        "embeddings.patch_embeddings.projection.weight": ([width, 3, patch, patch],),
    }
    for name, shape in shapes.items():
        for end, possible in expected.items():
            if name.endswith(end) and shape not in possible:
                sizes = f"hidden_size {width}, image_size {image} and patch_size {patch}"
                raise DataError(f"has {name} of size {shape}, which does not fit config.json: {sizes}")


# ---- preprocessor_config.json


def given_sides(size: Any) -> dict[str, int]:
    """A processor's size in any form, as a dict. Transformers 5 adds the sides that are not given, as None.

    224 and [224, 224] become {"height": 224, "width": 224}.
    """
    if isinstance(size, int):
        size = [size, size]
    if isinstance(size, (list, tuple)):
        size = dict(zip(("height", "width"), size))
    try:
        sides = {side: pixels for side, pixels in dict(size).items() if pixels is not None}
    except (TypeError, ValueError):
        sides = {"size": size}
    if not all(isinstance(pixels, int) for pixels in sides.values()):
        raise DataError(f"its preprocessing has sizes that are no numbers ({sides}); correct {PREPROCESSING}")
    return sides


def check_preprocessing(given: dict) -> None:
    """Whether training here can do what an image processor of transformers does, as far as ``given`` tells.

    What is not given has a default of the processor's class, which is usable.
    """
    resized = given_sides(given.get("size") or {}) if given.get("do_resize", True) else {}
    crops = given.get("do_center_crop")
    cropped = given_sides(given.get("crop_size") or {}) if crops else {}
    # with `shortest_edge` alone, images keep their proportions until they are cropped
    ends_square = _is_square(resized) or (set(resized) == {"shortest_edge"} and crops is not False)
    fits = not resized or not cropped or min(cropped.values()) <= min(resized.values())
    if (resized and not ends_square) or (cropped and not _is_square(cropped)) or not fits:
        sizes = f"size {resized}" + f" and crop_size {cropped}" * bool(cropped)
        problem = f"its preprocessing, {sizes}, is neither a resize to a square nor a square crop"
        raise DataError(f"{problem}; correct it in {PREPROCESSING}")
    if crops and given.get("do_resize") is False:
        raise DataError(f"its preprocessing crops images of any size; set do_resize in {PREPROCESSING}")
    if given.get("do_rescale", True) and not given.get("rescale_factor", 1):
        raise DataError(f"its preprocessing multiplies by rescale_factor 0; correct it in {PREPROCESSING}")
    for name in ("image_mean", "image_std") if given.get("do_normalize", True) else ():
        values = per_channel(given.get(name) or 0.5)
        if len(values) != 3 or (name == "image_std" and 0 in values):
            fix = f"set three numbers in {PREPROCESSING}"
            raise DataError(f"its preprocessing has {name} {list(values)}; {fix}")


def _is_square(sides: dict[str, int]) -> bool:
    return set(sides) == {"height", "width"} and sides["height"] == sides["width"]


def per_channel(values: float | Iterable[float]) -> tuple[float, ...]:
    """A mean or standard deviation of each channel, given as one number for all or as three."""
    return (float(values),) * 3 if isinstance(values, (int, float)) else tuple(values)
