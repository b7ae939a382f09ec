"""The same ViT as other libraries train it, for `run_benchmark.sh --peers`: timm's, and transformers' own.

A plain PyTorch loop around an unchanged model: autocast, fused AdamW, DistributedDataParallel. With
``--compile`` the whole model is compiled, as their users do it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vit.distributed import device
from vit.parallel.plain import PlainModel, PlainOptimizer
from vit.presets import known_architecture
from vit.settings import Settings


def peer_config(settings: Settings, num_labels: int):
    """The HuggingFace config of the preset that ``settings`` name, at their image size."""
    preset = known_architecture(settings.model_name_or_path)
    return preset.config(num_labels, **({"image_size": settings.image_size} if settings.image_size else {}))


def build_timm(config, grad_checkpoint: bool) -> nn.Module:
    """timm's VisionTransformer: images (N, 3, H, W) -> logits (N, C)."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=config.num_labels,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
    )
    model.set_grad_checkpointing(grad_checkpoint)
    return model


def build_transformers(config, grad_checkpoint: bool) -> nn.Module:
    """transformers' ViTForImageClassification without this project's patches, returning logits alone."""
    from transformers import ViTForImageClassification

    model = ViTForImageClassification(config)
    if grad_checkpoint:
        model.gradient_checkpointing_enable()
    return Logits(model)


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels).logits


BUILDERS = {"timm": build_timm, "transformers": build_transformers}


class PeerStep:
    """One train step of a peer, called as `vit.step.TrainStep` is.

    Args:
        normalize: turns a uint8 batch into the model's input; part of the step, as in ours.
    """

    graph = None

    def __init__(self, settings: Settings, num_labels: int, normalize):
        model = BUILDERS[settings.plugin](peer_config(settings, num_labels), settings.grad_checkpoint)
        model.to(device())
        if settings.compile:
            model.compile()
        self.normalize, self.parallel_size = normalize, settings.layout.world_size
        self.model = PlainModel(model, settings.precision, parallel=self.parallel_size > 1)
        adamw = torch.optim.AdamW(
            model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.optimizer = PlainOptimizer(adamw, fp16=settings.precision == "fp16")
        self.max_norm = settings.max_norm

    def __call__(self, batches: list[dict], images: int, learning_rate: float) -> torch.Tensor:
        """Train on the one batch of ``batches``. -> this rank's share of the mean loss, on the device"""
        (batch,) = batches
        logits = self.model(self.normalize(batch["pixel_values"].to(device(), non_blocking=True)))
        loss = F.cross_entropy(logits.float(), batch["labels"].to(device(), non_blocking=True))
        self.optimizer.backward(loss)
        if self.max_norm:
            self.optimizer.clip_grad_by_norm(self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach() / self.parallel_size
