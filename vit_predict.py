"""Classify images with a fine-tuned model.

`python vit_predict.py --model ./output_model IMAGE_OR_FOLDER ...`
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from vit.console import exit_with_errors, silence_libraries

silence_libraries()

from vit.hub import is_cached, is_hub_name, reachable
from vit.versions import version_problems


def parse(argv=None) -> argparse.Namespace:
    if problems := version_problems():
        exit_with_errors(*problems)
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, and folders searched for them"
    )
    parser.add_argument(
        "--model",
        default="./output_model",
        help="folder written by vit_train_demo.py or train.py, or a hub name",
    )
    parser.add_argument("--topk", type=int, default=1, help="number of classes per image")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table")
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args(argv)
    for flag in ("topk", "batch_size"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: must be a whole number >= 1")
    return args


def find_images(paths: list[str]) -> list[Path]:
    """The given files, and all images below the given folders."""
    from vit.data import image_files

    found = []
    for path in map(Path, paths):
        found += map(Path, image_files.find_images(path)) if path.is_dir() else [path]
    return found


def predict(model_path: str, images: list[Path], topk: int, batch_size: int):
    """Classify images.

    Yields:
        (path, [(label, probability), ...] most probable first), or (path, error message), in the given order.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from vit.data.pixels import open_image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForImageClassification.from_pretrained(model_path).eval().to(device)
        processor = AutoImageProcessor.from_pretrained(model_path, use_fast=False)
    except (OSError, ValueError, SafetensorError) as error:  # no weights, no classifier, or a damaged file
        exit_with_errors(f"--model {model_path}: {str(error).strip().splitlines()[0]}")
    topk = min(topk, model.config.num_labels)
    for start in range(0, len(images), batch_size):
        opened, results = [], {}
        for path in images[start : start + batch_size]:
            try:
                opened.append((path, open_image(path)))
            except Exception as error:  # PIL raises many types for a damaged file
                results[path] = f"cannot be read: {error}"
        if opened:
            inputs = processor([image for _, image in opened], return_tensors="pt").to(device)
            with torch.inference_mode():
                best = model(**inputs).logits.float().softmax(-1).topk(topk)
            for (path, _), values, indices in zip(opened, best.values.tolist(), best.indices.tolist()):
                results[path] = [(model.config.id2label[i], p) for i, p in zip(indices, values)]
        for path in images[start : start + batch_size]:
            yield path, results[path]


def main(argv=None) -> int:
    args = parse(argv)
    if not (Path(args.model) / "config.json").is_file():
        if not is_hub_name(args.model):
            exit_with_errors(
                f"--model {args.model}: no such model folder (with a config.json; bash run_demo.sh writes "
                "./output_model), and no hub name"
            )
        if not is_cached(args.model, "models") and not reachable():
            exit_with_errors(
                f"--model {args.model}: no such folder, and the HuggingFace hub does not answer; "
                "name a folder that a run wrote"
            )
    images = find_images(args.images)
    if not images:
        exit_with_errors(f"no images under {', '.join(args.images)}")
    rows, bad = [], 0
    for path, result in predict(args.model, images, args.topk, args.batch_size):
        if isinstance(result, str):
            bad += 1
            print(f"{path}: {result}", file=sys.stderr)
        else:
            rows.append((str(path), result))
    if args.format == "json":
        print(
            json.dumps(
                [
                    {"image": p, "predictions": [{"label": n, "probability": q} for n, q in r]}
                    for p, r in rows
                ],
                indent=1,
            )
        )
    elif args.format == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow(["image", "rank", "label", "probability"])
        writer.writerows([p, i + 1, n, f"{q:.6f}"] for p, r in rows for i, (n, q) in enumerate(r))
    else:
        width = max((len(p) for p, _ in rows), default=0)
        for path, result in rows:
            print(
                f"{path:<{width}}  " + "  ".join(f"{name} {probability:.3f}" for name, probability in result)
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
