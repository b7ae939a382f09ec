"""How far a known network gets on the same images: ResNet-18 in its CIFAR form, random crop and flip, SGD.

    python results/scripts/resnet_18.py FOLDER [EPOCHS]

FOLDER has train/<class>/*.png and validation/<class>/*.png. One cycle of the learning rate. On CIFAR-10's
original images such a training ends near 95 %. What is missing here is what the images have lost.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

BATCH = 512


def load(split: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (N, 3, 32, 32) and labels (N,), on the device"""
    pairs = [
        (np.asarray(Image.open(path)), label)
        for label, folder in enumerate(sorted(split.iterdir()))
        for path in sorted(folder.iterdir())
    ]
    pixels, labels = zip(*pairs, strict=True)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device), torch.tensor(
        labels, device=device
    )


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (
        torch.tensor(v, device=device).view(1, 3, 1, 1)
        for v in ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    )
    return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def crop_and_flip(images: torch.Tensor) -> torch.Tensor:
    count, offsets = len(images), torch.arange(32, device=device)
    down, right = torch.randint(0, 9, (2, count, 1), device=device) + offsets
    right = torch.where(torch.rand(count, 1, device=device) < 0.5, right, right.flip(1))
    picked = F.pad(images, (4, 4, 4, 4))[
        torch.arange(count, device=device)[:, None, None], :, down[:, :, None], right[:, None, :]
    ]
    return picked.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.autocast(device, torch.bfloat16):
        guesses = [model(normalize(part)).argmax(1) for part in images.split(500)]
    return torch.cat(guesses).eq(labels).float().mean().item()


if not sys.argv[1:] or sys.argv[1].startswith("-"):
    sys.exit(__doc__)
device = "cuda" if torch.cuda.is_available() else "cpu"
folder, epochs = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 60
images, labels = load(folder / "train")
held_out = load(folder / "validation")
torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10)
model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
model = model.to(device, memory_format=torch.channels_last)
steps = len(images) // BATCH
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=steps * epochs, pct_start=0.2)
forward = torch.compile(model) if device == "cuda" else model
started = time.time()
for epoch in range(1, epochs + 1):
    model.train()
    for chosen in torch.randperm(len(images), device=device)[: steps * BATCH].split(BATCH):
        with torch.autocast(device, torch.bfloat16):
            logits = forward(crop_and_flip(normalize(images[chosen])))
        F.cross_entropy(logits.float(), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if epoch % 10 == 0 or epoch == epochs:
        print(
            f"epoch {epoch}: accuracy {accuracy(model, *held_out):.4f}, {time.time() - started:.0f} s",
            flush=True,
        )
