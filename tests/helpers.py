"""Tiny images and a tiny ViT, for the tests and for the processes that they launch."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CLASSES = ("blue", "green", "red")
COUNTS = {"train": 22, "validation": 13, "test": 7}  # odd: no batch size and no process count divides them


def write_image(path: Path, label: int, seed: int) -> None:
    """A noisy picture of one colour, easy to learn; every one of another, odd size."""
    rng = np.random.default_rng([label, seed])
    height, width = rng.integers(17, 30, 2)
    pixels = rng.integers(0, 120, (height, width, 3))
    pixels[..., 2 - label] += 80
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_folder(root: Path, counts: dict[str, int], classes=CLASSES) -> Path:
    """``root/<split>/<class>/<n>.png``, classes in turn."""
    for split, count in counts.items():
        for i in range(count):
            label = i % len(classes)
            write_image(root / split / classes[label] / f"{i:03d}.png", label, len(split) * 1000 + i)
    return root


def tiny_vit(labels: int = 3, **overrides):
    """4 layers of 4 heads, 16 px: enough for tp 4 and pp 4; random weights from torch's current seed."""
    from transformers import ViTConfig

    from vit.initial_weights import build_vit

    sizes = dict(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
    )
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return build_vit(ViTConfig(**(sizes | dropout | dict(num_labels=labels) | overrides)))


def save_tiny_vit(folder: Path, labels: int = 5, size: int = 16, **overrides) -> Path:
    """A model folder as the hub holds them; by default with other classes than the images."""
    from transformers import ViTImageProcessor

    torch.manual_seed(3)
    tiny_vit(labels, image_size=size, **overrides).save_pretrained(folder)
    ViTImageProcessor(
        size={"height": size, "width": size},
        image_mean=[0.5, 0.4, 0.6],
        image_std=[0.2, 0.3, 0.25],
        resample=2,
    ).save_pretrained(folder)
    return folder


def flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def settings(*argv):
    """The settings of vit_train_demo.py as resolved on this machine, unchecked."""
    from args import finetune_parser, resolve_finetune
    from vit.system import this_machine

    parser = finetune_parser()
    args = parser.parse([str(word) for word in argv])
    assert not parser.problems
    return resolve_finetune(args, this_machine())


# ---- images through data.py, as 16 px without a model


def load_images(folder, *flags):
    """The data set of a folder, split; nothing is decoded."""
    from data import load_dataset

    return load_dataset(settings("--dataset", folder, *flags))


def decode_images(images, *flags, crop=None, size: int = 16):
    """-> (the data set, decoded as far as --data_memory allows, and the bytes kept)"""
    from vit.data.decode import plan_decoding
    from vit.data.transforms import Resize

    decoding = plan_decoding(images, Resize(size), crop, settings(*flags))
    return decoding.run(), decoding.kept_bytes


def pixels_of(split, size: int = 16) -> dict:
    """What training without augmentation sees of every image, in order."""
    from vit.data.loaders import BatchDataset
    from vit.data.transforms import Resize

    return BatchDataset(split, Resize(size)).__getitems__([(0, i) for i in range(len(split))])


# ---- the training that every plugin repeats: 22 images, 8 a step: two epochs of two whole steps and one of 6
LEARNING_RATES = [4e-4, 8e-4, 2e-3, 1.6e-3, 1e-3, 3e-4]  # per step, to see that each is used
WEIGHT_DECAY = 0.5
# of the recipe: far enough from none to be seen in six steps
LAYER_DECAY, EMA, LABEL_SMOOTHING = 0.6, 0.7, 0.2
LORA = dict(r=4, lora_alpha=64.0)
CLASS_WEIGHTS = [0.5, 1.0, 2.5]
MAX_NORM = 2.4  # between the gradient norms of this training: some steps are clipped, some are not


def in_memory_images(count: int, seed: int = 1):
    """Noise of 16 px with random labels of 3 classes."""
    from vit.data.dataset import Split

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8).numpy()
    labels = torch.randint(0, 3, (count,), generator=generator).numpy()
    return Split("train", None, labels, cached_pixels=list(pixels))


def check_vit_s_16(vit) -> None:
    """The config of ViT-S/16 for ImageNet-1k."""
    sizes = ("image_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_labels")
    assert tuple(getattr(vit, name) for name in sizes) == (224, 384, 12, 1536, 1000)


def run_interpreted(program: Path | str, *arguments: str) -> None:
    """Run a program whose Triton kernels are interpreted on the CPU; it fails where one is wrong."""
    import pytest  # not where this module's other functions run: on a GPU's machine

    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("the interpreter of Triton 3.1 is wrong for masked loads, that of 3.2 was not tried")
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def small_chunks(**others):
    """Context in which Gemini cuts also a tiny model into several chunks; otherwise it keeps one, whole.

    ``others``: more options of the plugin.
    """
    import colossalai.booster.plugin as library

    plugin = library.GeminiPlugin

    def with_small_chunks(**options):
        return plugin(**options | dict(min_chunk_size_m=0, search_range_m=0) | others)

    return mock.patch.object(library, "GeminiPlugin", with_small_chunks)
