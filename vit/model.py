"""A Vision Transformer from a hub name, a local folder or a preset, and its export."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vit.data.transforms import set_processor_size


@dataclass(frozen=True)
class VitPreset:
    """Architecture of a ViT (Dosovitskiy et al., 2021). Sizes in pixels and channels."""

    image_size: int
    patch_size: int
    hidden_size: int
    layers: int
    heads: int
    mlp_size: int

    def config(self, num_labels: int, **overrides):
        """The HuggingFace config; dropout off, as fine-tuning uses it."""
        from transformers import ViTConfig

        return ViTConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.mlp_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=num_labels,
            **overrides,
        )


PRESETS = {
    "vit-demo": VitPreset(64, 8, 96, 4, 4, 192),
    "vit-lite-7-4": VitPreset(32, 4, 256, 7, 4, 512),  # Hassani et al., 2021
    **{
        f"vit-{name}-patch16-{size}": VitPreset(size, 16, *shape)
        for size in (224, 384)
        for name, shape in {
            "tiny": (192, 12, 3, 768),
            "small": (384, 12, 6, 1536),
            "base": (768, 12, 12, 3072),
            "large": (1024, 24, 16, 4096),
        }.items()
    },
}


# model_type of a HuggingFace config: a ViT with a class token, and one whose patches are averaged
# (`mean_pooled`)
FAMILIES = ("vit", "ijepa")


def known_architecture(name: str) -> VitPreset | None:
    """The preset behind a name, with or without its hub owner.

    ``google/vit-base-patch16-224-in21k`` -> ViT-B/16.
    """
    return PRESETS.get(preset_name(name))


def preset_name(name: str) -> str:
    """The key in `PRESETS` that a hub name stands for, if it is there."""
    return name.split("/")[-1].removesuffix("-in21k")


def read_config(folder: Path) -> dict:
    """``config.json`` of a model folder; {} when it is missing or broken."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}


@dataclass
class LoadedModel:
    """A model for training and what the rest must know of it."""

    model: nn.Module
    processor: object  # ViTImageProcessor: size, mean, std, interpolation
    untrained: bool  # the classifier has random weights
    notes: list[str]  # what was changed, one line each


def load_model(name: str, labels: list[str], tp: int = 1, image_size: int | None = None) -> LoadedModel:
    """Build the ViT ``name`` with one logit per entry of ``labels``.

    Args:
        name: hub name, local folder, or a key of `PRESETS` (random initial weights from torch's current
            seed).
        tp: the classifier is padded with unused rows to a multiple of this (tensor parallelism cuts it
            evenly).
        image_size: pixels; position embeddings are interpolated when it differs from the model's.

    Raises:
        ValueError: the folder or hub model is not a ViT, or ``image_size`` is no multiple of the patch size.
    """
    from safetensors import SafetensorError
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageClassification,
        ViTForImageClassification,
        ViTImageProcessor,
    )

    notes = []
    id2label = dict(enumerate(labels))
    label2id = {label: i for i, label in id2label.items()}
    if name in PRESETS and not Path(name).exists():
        size = PRESETS[name].image_size
        model = ViTForImageClassification(
            PRESETS[name].config(len(labels), id2label=id2label, label2id=label2id)
        )
        processor = ViTImageProcessor(
            size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2
        )
        untrained = True
        notes.append(f"{name}: random initial weights")
    else:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"--model_name_or_path {name} is a {config.model_type!r} model; this example trains ViTs"
            )
        trained = [config.id2label[i] for i in range(config.num_labels)]
        try:
            model, loading = AutoModelForImageClassification.from_pretrained(
                name,
                num_labels=len(labels),
                id2label=id2label,
                label2id=label2id,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except SafetensorError as error:
            raise ValueError(
                f"--model_name_or_path {name}: model.safetensors is damaged ({error}): copy it again"
            ) from None
        mismatched = {key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]}
        fresh = set(loading["missing_keys"]) | mismatched
        if strangers := [key for key in fresh if not key.startswith("classifier.")]:
            raise ValueError(
                f"--model_name_or_path {name} lacks {len(strangers)} weights of a ViT, e.g. {strangers[0]}"
            )
        untrained = bool(fresh)
        if fresh:
            notes.append(f"fresh classifier for {len(labels)} labels (the checkpoint's does not fit)")
        elif sorted(trained) == sorted(labels):
            rows = [trained.index(label) for label in labels]  # the data set may have them in another order
            with torch.no_grad():
                model.classifier.weight.copy_(model.classifier.weight[rows].clone())
                model.classifier.bias.copy_(model.classifier.bias[rows].clone())
        else:
            untrained = True
            model.classifier.reset_parameters()
            notes.append(f"fresh classifier: the checkpoint's {len(labels)} labels have other names")
        processor = AutoImageProcessor.from_pretrained(name, use_fast=False)
    if image_size and image_size != model.config.image_size:
        notes.append(f"position embeddings interpolated from {model.config.image_size} to {image_size} px")
        resize_position_embeddings(model, image_size)
        set_processor_size(processor, image_size)
    pad_classifier(model, tp)
    return LoadedModel(model, processor, untrained, notes)


@torch.no_grad()
def resize_position_embeddings(model: nn.Module, image_size: int) -> None:
    """Make the model take ``image_size`` pixels: bicubic interpolation of its position embeddings, in place.

    As in fine-tuning at higher resolution (Dosovitskiy et al., 2021, section 3.2).
    """
    embeddings, patch = model.base_model.embeddings, model.config.patch_size
    if image_size % patch:
        raise ValueError(f"--image_size {image_size} is no multiple of the model's patch size {patch}")
    old = embeddings.position_embeddings  # (1, [1 +] patches, hidden)
    grid = int(old.shape[1] ** 0.5)
    extra = old.shape[1] - grid * grid  # the class token, where there is one
    patches = old[:, extra:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    side = image_size // patch
    patches = nn.functional.interpolate(patches, (side, side), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(1, side * side, -1)
    embeddings.position_embeddings = nn.Parameter(torch.cat([old[:, :extra], patches], dim=1))
    embeddings.patch_embeddings.image_size = (image_size, image_size)
    embeddings.patch_embeddings.num_patches = side * side
    model.config.image_size = image_size


@torch.no_grad()
def pad_classifier(model: nn.Module, multiple: int) -> None:
    """Grow the classifier to a multiple of ``multiple`` rows, in place.

    The added logits take part in nothing.
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


def build_vit(config) -> nn.Module:
    """A classifier with random initial weights from torch's current seed, of the kind that the HuggingFace
    config names.
    """
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_config(config)


def export_model(state: dict[str, torch.Tensor], config, processor, folder: Path) -> None:
    """Write a folder that transformers opens: model.safetensors, config.json, preprocessor_config.json.

    Args:
        state: full state dict; padded classifier rows are trimmed to the config's labels; saved as fp32,
            which
            every device can run.
    """
    model = build_vit(config)
    labels = len(config.id2label)
    state = {name: tensor.float() for name, tensor in state.items()}
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name][:labels]
    model.load_state_dict(state)
    model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
