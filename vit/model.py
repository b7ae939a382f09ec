"""A Vision Transformer from a hub name, a local folder or a preset, and its export."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vit.checksums import SUMS, SUMS_HINT, sums_problem, write_sums
from vit.data.dataset import DataError
from vit.data.processor import load_processor, set_processor_size
from vit.hub import lacks_safetensors, weights_options
from vit.initial_weights import build_vit, draw_classifier, empty_vit
from vit.layout import freeze_problem
from vit.model_folder import class_names, usable_config
from vit.modules import layer_number, load_weights, order_parameters
from vit.presets import PRESETS
from vit.versions import pickles_refused


@dataclass
class LoadedModel:
    """A model to train, with its image processor."""

    model: nn.Module
    processor: object  # transformers' image processor: size, mean, std, interpolation
    new_classifier: bool  # the classifier has random weights
    notes: list[str]  # what was changed, one line each


def load_model(name: str, labels: list[str], image_size: int | None = None) -> LoadedModel:
    """Build the ViT ``name`` with one logit per entry of ``labels``.

    Args:
        name: hub name, local folder, or a key of `PRESETS` (random initial weights from torch's current
            seed).
        labels: class names. The classifier of a checkpoint with the same names is kept, in this order.
        image_size: pixels; position embeddings are interpolated if it differs from the model's; None: that.

    Raises:
        DataError: the model is no ViT, is damaged, or ``image_size`` is no multiple of its patch size.
    """
    label_maps = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if name in PRESETS and not Path(name).exists():
        loaded = _random_model(name, len(labels), label_maps)
    else:
        try:
            loaded = _pretrained_model(name, labels, label_maps)
        except DataError as error:
            raise DataError(f"--model_name_or_path {name}: {error}") from None
    model = loaded.model
    if image_size and image_size != model.config.image_size:
        loaded.notes.append(
            f"position embeddings interpolated from {model.config.image_size} to {image_size} px"
        )
        resize_position_embeddings(model, image_size)
        set_processor_size(loaded.processor, image_size)
    return loaded


def _random_model(name: str, labels: int, label_maps: dict) -> LoadedModel:
    from transformers import ViTImageProcessor

    size = PRESETS[name].image_size
    model = build_vit(PRESETS[name].config(labels, **label_maps))
    processor = ViTImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2
    )
    return LoadedModel(model, processor, True, [f"{name}: random initial weights"])


def _pretrained_model(name: str, labels: list[str], label_maps: dict) -> LoadedModel:
    from transformers import CONFIG_MAPPING, PretrainedConfig

    if problem := sums_problem(Path(name)):
        raise DataError(f"{problem}: {SUMS_HINT}")
    given, _ = PretrainedConfig.get_config_dict(name)
    sizes, trained = usable_config(given), class_names(given)
    try:
        config = CONFIG_MAPPING[sizes["model_type"]].from_dict(sizes | label_maps)
    except Exception as error:  # transformers 5 has types of its own for a wrong value
        reason = str(error).strip().replace("\n", " ")
        raise DataError(f"its config.json cannot be used: {reason}") from None
    random_state = torch.get_rng_state()
    model, replaced = _read_weights(name, config)
    torch.set_rng_state(random_state)
    draw_classifier(model, new=bool(replaced))
    notes = []
    if replaced:
        outputs = "none" if replaced == "missing" else len(trained) if trained else "another number"
        notes.append(f"new classifier with {len(labels)} outputs (checkpoint has {outputs})")
    elif trained is None:
        model.classifier.reset_parameters()
        notes.append("new classifier: config.json does not number the checkpoint's classes from 0 (id2label)")
    elif sorted(trained) == sorted(labels):
        order = [trained.index(label) for label in labels]  # the data set may order its classes differently
        with torch.no_grad():
            model.classifier.weight.copy_(model.classifier.weight[order].clone())
            model.classifier.bias.copy_(model.classifier.bias[order].clone())
    else:
        model.classifier.reset_parameters()
        notes.append(f"new classifier: the checkpoint's {len(labels)} labels have other names")
    processor, changes = load_processor(name, config.image_size)
    return LoadedModel(model, processor, bool(notes), notes + changes)


def _read_weights(name: str, config) -> tuple[nn.Module, str]:
    """The model in fp32, and why its classifier is new: "missing", "mismatched" or "".

    Raises:
        DataError: the files are damaged, or not of this config.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageClassification

    options = {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
    options |= weights_options()
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(name, **options)
    except SafetensorError as error:
        raise DataError(f"model.safetensors is damaged ({error}): copy it again") from None
    except OSError as error:
        if lacks_safetensors(error):
            raise DataError(pickles_refused()) from None
        raise
    mismatched = {key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]}
    lacks = set(loading["missing_keys"])
    for keys, problem in (
        (lacks, "lacks {} weights of a ViT"),
        (mismatched, "has {} weights of other sizes"),
    ):
        if wrong := sorted(key for key in keys if not key.startswith("classifier.")):
            raise DataError(f"{problem.format(len(wrong))}, e.g. {wrong[0]}")
    if extra := [key for key in loading["unexpected_keys"] if layer_number(f".{key}") is not None]:
        raise DataError(f"has {len(extra)} weights that config.json does not describe, e.g. {min(extra)}")
    replaced = "mismatched" if mismatched else "missing" if lacks else ""
    # in fp32, whatever the file has: transformers 5 keeps its precision
    return order_parameters(model.float()), replaced


@torch.no_grad()
def resize_position_embeddings(model: nn.Module, image_size: int) -> None:
    """Make the model take ``image_size`` pixels: bicubic interpolation of its position embeddings, in place.

    As for fine-tuning at higher resolution in Dosovitskiy et al., 2021, section 3.2.

    Raises:
        DataError: ``image_size`` is no multiple of the patch size.
    """
    embeddings, patch = model.base_model.embeddings, model.config.patch_size
    if image_size % patch:
        raise DataError(f"--image_size {image_size} is no multiple of the model's patch size {patch}")
    old = embeddings.position_embeddings  # (1, [1 +] patches, hidden)
    grid = int(old.shape[1] ** 0.5)
    extra = old.shape[1] - grid * grid  # the class token, where there is one
    patches = old[:, extra:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    side = image_size // patch
    patches = nn.functional.interpolate(patches, (side, side), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(1, side * side, -1)
    embeddings.position_embeddings = nn.Parameter(torch.cat([old[:, :extra], patches], dim=1))
    embeddings.image_size = embeddings.patch_embeddings.image_size = (image_size, image_size)
    embeddings.patch_embeddings.num_patches = side * side
    model.config.image_size = image_size


@torch.no_grad()
def pad_classifier(model: nn.Module, multiple: int) -> None:
    """Pad the classifier with zero rows to a multiple of ``multiple``, in place.

    `TrainStep` and `evaluate` ignore the added logits, and `export_model` removes the rows.
    """
    old = model.classifier
    padding = -old.out_features % multiple
    if padding:
        model.classifier = nn.Linear(old.in_features, old.out_features + padding)
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
        model.classifier.weight[: old.out_features] = old.weight
        model.classifier.bias[: old.out_features] = old.bias
        model.num_labels = old.out_features + padding


def freeze_parameters(model: nn.Module, freeze: str | None, stages: int = 1) -> None:
    """Let some parameters keep their values, in place: they get no gradient and no optimizer state.

    Args:
        freeze: "backbone": all but the classifier (a linear probe). A number N, as text: the embeddings and
            the first N layers. None: nothing.
        stages: of a pipeline.

    Raises:
        DataError: the model has fewer layers, or the first stage would have nothing to train.
    """
    if problem := freeze_problem(freeze, stages, model.config.num_hidden_layers):
        raise DataError(problem)
    for name, param in model.named_parameters():
        if freeze == "backbone":
            param.requires_grad_(name.startswith("classifier."))
        elif freeze is not None:
            layer = layer_number(name)
            frozen = ".embeddings." in name if layer is None else layer < int(freeze)
            param.requires_grad_(not frozen)


def export_model(state: dict[str, torch.Tensor], config, processor, folder: Path) -> None:
    """Write a folder that transformers opens: model.safetensors, config.json, preprocessor_config.json.

    Each file replaces an earlier one when all are written; SHA256SUMS, the last, says which belong together.

    Args:
        state: full state dict, in any precision; saved in fp32, which every device supports. Padded rows of
            the classifier are removed.
        config: HuggingFace config of the model.
        processor: image processor of transformers.
    """
    model = empty_vit(config)
    labels = len(config.id2label)
    state = {name: tensor.float() for name, tensor in state.items()}
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name][:labels]
    load_weights(model, state)
    partial = folder / ".export.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, safe_serialization=True)
        processor.save_pretrained(partial)
        written = sorted(path.name for path in partial.iterdir())
        write_sums(partial, written)
        for name in written:
            shutil.copymode(partial / SUMS, partial / name)  # safetensors makes files for its user alone
        for name in (*written, SUMS):
            os.replace(partial / name, folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
