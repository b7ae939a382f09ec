"""An image-classification set in the hub's format, of the shape of lewtun/dog_food, from a folder of images.

    python results/scripts/make_images.py SOURCE OUT --classes bird dog frog

SOURCE/<class>/ holds images (here: CIFAR-10's). OUT/data gets train-00000-of-00002.parquet, -00001-, and
test-00000-of-00001.parquet with the columns `image` and `label`; class names are in the features, as on the
hub. 2,100 training and 900 test images of three classes, unbalanced (3 : 2 : 1), between 64 and 300 pixels a
side, grey, palette, RGBA and CMYK among them, JPEG and PNG.
"""

import argparse
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

SIZES = {"train": 2100, "test": 900}
SHARES = (3, 2, 1)
FORMS = (("RGB", "JPEG"), ("RGB", "PNG"), ("L", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"))
CHANCES = (0.75, 0.05, 0.05, 0.05, 0.05, 0.05)


def encode(path: Path, rng: np.random.Generator) -> bytes:
    """The image at a random size, mode and file format."""
    with Image.open(path) as image:
        size = tuple(int(side) for side in rng.integers(64, 300) * rng.uniform(0.8, 1.25, 2))
        mode, form = FORMS[rng.choice(len(FORMS), p=CHANCES)]
        file = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, form)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", nargs=3, required=True)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    rng = np.random.default_rng(args.seed)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted(args.classes))}
    )
    left = {
        name: list(rng.permutation(sorted(p for p in (args.source / name).iterdir() if p.is_file())))
        for name in args.classes
    }
    (args.out / "data").mkdir(parents=True, exist_ok=True)
    for split, count in SIZES.items():
        rows = []
        for name, share in zip(args.classes, SHARES, strict=True):
            label = features["label"].str2int(name)
            rows += [(left[name].pop(), label) for _ in range(count * share // sum(SHARES))]
        rng.shuffle(rows)
        encoded = [
            {"image": {"bytes": encode(Path(path), rng), "path": None}, "label": int(label)}
            for path, label in rows
        ]
        pieces = 1 + (split == "train")
        for i in range(pieces):
            piece = datasets.Dataset.from_list(encoded[i::pieces], features=features)
            piece.to_parquet(args.out / "data" / f"{split}-{i:05d}-of-{pieces:05d}.parquet")
        print(f"{split}: {len(rows)} images")


if __name__ == "__main__":
    main()
