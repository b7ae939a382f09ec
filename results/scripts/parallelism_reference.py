"""The training of prove_parallelism.py by one process in plain PyTorch, which others are compared with."""

import itertools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from vit.data.cifar10 import read_cifar10
from vit.layout import ParallelLayout
from vit.schedule import BatchPlan

SEED, DECAY, SMOOTHING, MAX_NORM, LABELS = 42, 0.03, 0.1, 1.0, 10  # decay and smoothing: the configs'
IMAGES, HELD_OUT, BATCH = 308, 300, 32  # ten steps an epoch, the last of 20 images and padding
PEAK = 5e-4  # the configs' 2e-3 for batches of 512, times the root of 32 / 512
EPOCHS, PER_EPOCH = 5, math.ceil(IMAGES / BATCH)
WARMUP, SAVED, SHORT, STEPS = PER_EPOCH, 10, 20, EPOCHS * PER_EPOCH  # steps; saved after 10, resumed to 20
COMMON = [f"TOTAL_BATCH_SIZE={BATCH}", f"LEARNING_RATE={PEAK}", "WARMUP_EPOCHS=1"]
COMMON += [f"clip_grad_norm={MAX_NORM}", "DROPOUT=0", "DROP_PATH=0", "INITIAL_WEIGHTS=usual"]
NOISE = 1e-6  # gradients below are rounding noise, of which Adam's first step makes lr times any sign
BOUNDS = {
    "fp32": {"loss_20": 1e-4, "loss_50": 1e-3, "norm_1": 1e-5, "norms": 1e-3}
    | {"weights_1": 1e-6, "evaluation": 1e-5, "resume": 1e-6},
    "bf16": {"loss_20": 0.005, "norm_1": 0.005, "norms": 0.02},
}


def serial_model() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 32, "patch_size": 4, "hidden_size": 256, "intermediate_size": 512}
    sizes |= {"num_hidden_layers": 7, "num_attention_heads": 4, "num_labels": LABELS}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(SEED)
    return ViTForImageClassification(ViTConfig(**sizes, **dropout)).train()


def serial(rank: int, cut: str, precision: str, folder: Path) -> None:
    """What all is measured against: nothing of this project but the order of the images.

    ``precision``: "fp32", "fp64", "bf16" (autocast) or "bf16 weights": the optimizer has them in fp32, from
    the rounded ones on, as Colossal-AI does. A first step below half a bf16 digit then moves no weight.
    """
    dtype = torch.float64 if precision == "fp64" else torch.float32
    computed = torch.bfloat16 if precision == "bf16 weights" else dtype
    train = read_cifar10(cut)[0]["train"]
    pixels, labels = torch.from_numpy(train.cached_pixels).to(dtype) / 255, torch.from_numpy(train.labels)
    pixels -= pixels.mean((0, 2, 3), keepdim=True)
    pixels /= pixels.std((0, 2, 3), keepdim=True, correction=0)
    model = serial_model().to(dtype)
    masters = {name: p.detach().to(computed).to(dtype, copy=True) for name, p in model.named_parameters()}
    model.to(computed)
    groups = [{"params": [], "weight_decay": DECAY}, {"params": [], "weight_decay": 0.0}]
    for name, p in masters.items():
        groups[p.ndim == 1 or name.endswith(("cls_token", "position_embeddings"))]["params"].append(p)
    optimizer = torch.optim.AdamW(groups)
    plan = BatchPlan(IMAGES, BATCH, 1, ParallelLayout(1), SEED)
    order = itertools.chain.from_iterable(map(plan.batches, range(EPOCHS)))
    seen = {"loss": [], "norm": []}
    torch.save(masters, folder / "weights_0.pt")
    for step, batch in enumerate(itertools.islice(order, SHORT if "bf16" in precision else STEPS)):
        batch = [image for _, image in batch if image >= 0]
        cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        for group in groups:
            group["lr"] = PEAK * min((step + 1) / WARMUP, cosine if step >= WARMUP else 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(pixels[batch].to(computed)).logits
        loss = F.cross_entropy(logits.to(dtype), labels[batch], label_smoothing=SMOOTHING)
        model.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            masters[name].grad = p.grad.to(dtype)
        if step == 0:
            torch.save({name: p.grad.clone() for name, p in masters.items()}, folder / "gradients_1.pt")
        seen["norm"].append(torch.nn.utils.clip_grad_norm_(masters.values(), MAX_NORM).item())
        seen["loss"].append(loss.item())
        optimizer.step()
        model.load_state_dict(masters)
        if step == 0:
            torch.save(masters, folder / "weights_1.pt")
    torch.save(masters, folder / "weights_last.pt")
    (folder / "seen.json").write_text(json.dumps(seen))


@torch.no_grad()
def evaluate_export(folder: Path, cut: str) -> dict:
    """Mean loss, accuracy and count over the held-out images of an exported folder, by transformers alone."""
    from transformers import ViTForImageClassification, ViTImageProcessor

    model = ViTForImageClassification.from_pretrained(folder).eval()
    processor = ViTImageProcessor.from_pretrained(folder)
    held, order = read_cifar10(cut)[0]["test"], {"input_data_format": "channels_first"}
    pixels = processor(list(held.cached_pixels), return_tensors="pt", **order)["pixel_values"]
    labels = torch.from_numpy(held.labels)
    logits = torch.cat([model(some).logits for some in pixels.split(50)])
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    loss = F.cross_entropy(logits, labels).item()
    return {"average_loss": loss, "accuracy": accuracy, "images": len(labels)}
