"""Known sizes of Vision Transformers, by the names that they have on the hub. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VitPreset:
    """Architecture of a ViT (Dosovitskiy et al., 2021). Sizes in pixels and channels."""

    image_size: int
    patch_size: int
    hidden_size: int
    layers: int
    heads: int
    mlp_size: int

    @property
    def parameters(self) -> int:
        """Number of parameters, without the classifier."""
        hidden, patch = self.hidden_size, self.patch_size
        patches = (self.image_size // patch) ** 2
        embeddings = (3 * patch * patch + 1) * hidden + (patches + 2) * hidden
        attention, mlp = 4 * (hidden + 1) * hidden, (2 * hidden + 1) * self.mlp_size + hidden
        return embeddings + self.layers * (attention + mlp + 4 * hidden) + 2 * hidden

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


def mean_pooled_config(config):
    """The config of a ViT of the same sizes that has no class token and classifies the mean of its patches.

    In transformers that is the ViT of I-JEPA (Assran et al., 2023).
    """
    from transformers import IJepaConfig

    return IJepaConfig(
        **{
            name: value
            for name, value in config.to_dict().items()
            if name not in ("model_type", "encoder_stride", "transformers_version")
        }
    )
