"""Classify images with a fine-tuned model.

`python vit_predict.py --model ./output_model IMAGE_OR_FOLDER ...`
`python vit_predict.py --model ./output_model --serve`
`python vit_predict.py --model ./output_model --export onnx`

Images in a folder of the name of a class have a true class, and the accuracy is printed.
"""

import argparse
import csv
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from vit.console import exit_with_errors, printable, silence_libraries

silence_libraries()

from vit.files import csv_cell
from vit.hub import is_cached, is_hub_name, reachable
from vit.versions import version_problems

PORT = 8000  # of --serve


def parse(argv=None) -> argparse.Namespace:
    if problems := version_problems():
        exit_with_errors(*problems)
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE_OR_FOLDER", help="image files, and folders searched for them"
    )
    parser.add_argument(
        "--model",
        default="./output_model",
        help="folder written by vit_train_demo.py or train.py, or a hub name",
    )
    parser.add_argument("--topk", type=int, default=1, help="number of classes per image")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument(
        "--pixel_range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="black and white in images of more than 8 bits (default: as in training)",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="divide the logits by a temperature, fitted on the validation images of the run",
    )
    parser.add_argument(
        "--export", choices=("onnx",), help="write the model in another format into its folder, and stop"
    )
    parser.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=PORT,
        metavar="PORT",
        help=f"open a page on this machine to drop images on (PORT {PORT}; 0: a free one)",
    )
    args = parser.parse_args(argv)
    tasks = [f"--{name}" for name in ("export", "serve") if getattr(args, name) is not None]
    if not args.images and not tasks:
        parser.error("the following arguments are required: IMAGE_OR_FOLDER")
    if len(tasks) + bool(args.images) > 1:
        parser.error(f"{' with '.join(tasks)}: takes no images, and stands alone")
    if args.serve is not None and not 0 <= args.serve <= 65535:
        parser.error(f"--serve {args.serve}: must be a port from 0 to 65535")
    for flag in ("topk", "batch_size"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: must be a whole number >= 1")
    if args.pixel_range and not args.pixel_range[0] < args.pixel_range[1]:
        parser.error("--pixel_range {:g} {:g}: black must be below white".format(*args.pixel_range))
    return args


def main(argv=None) -> int:
    args = parse(argv)
    if args.export:
        check_export(args)
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

    from vit.classify import Classifier, named_images, true_class
    from vit.data.dataset import DataError
    from vit.data.image_files import LeftOut

    left_out = LeftOut()
    try:
        images = named_images(args.images, left_out)
    except OSError as error:  # a folder that may not be read
        exit_with_errors(f"{error.filename}: {error.strerror}")
    for line in left_out.lines():
        print(line, file=sys.stderr)
    if args.images and not images:
        exit_with_errors(f"no images under {', '.join(args.images)}")
    try:
        classifier = Classifier(args.model, args.pixel_range)
    except DataError as error:
        exit_with_errors(f"--model {args.model}: {error}")
    if args.calibrate:
        set_temperature(classifier, Path(args.model))
    if args.export:
        return export(classifier, Path(args.model))
    if args.serve is not None:
        return open_page(classifier, args)
    rows, bad, labels = [], 0, set(classifier.labels)
    for result in classifier.predict(images, args.topk, args.batch_size):
        if result.problem:
            bad += 1
            print(printable(f"{result.image.path}: {result.problem}"), file=sys.stderr)
        else:
            rows.append((str(result.image.path), true_class(result.image, labels), result.best))
    {"table": print_table, "json": print_json, "csv": print_csv}[args.format](rows)
    if accuracy := accuracy_text(rows):
        print(accuracy, file=sys.stdout if args.format == "table" else sys.stderr)
    return 1 if bad else 0


def check_export(args: argparse.Namespace) -> None:
    """End the program if there is nowhere to write, or a package is missing, before the model is read."""
    problems = []
    if absent := [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]:
        problems.append(f"--export onnx: {' and '.join(absent)} missing; `pip install {' '.join(absent)}`")
    if is_hub_name(args.model):
        problems.append(f"--export onnx: {args.model} is no folder; download it, and name its folder")
    if problems:
        exit_with_errors(*problems)


def export(classifier, folder: Path) -> int:
    from vit.onnx_export import TOLERANCE, ExportError, export_onnx

    try:
        path, difference = export_onnx(classifier, folder)
    except ExportError as error:
        exit_with_errors(f"--export onnx: {error}", code=1)
    compared = (
        f"onnxruntime and PyTorch differ by {difference:.1g} in a logit at most (allowed: {TOLERANCE:g})"
    )
    print(printable(f"{path}, {path.stat().st_size / 1e6:.1f} MB; on drawn images {compared}"))
    return 0


def open_page(classifier, args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    from vit.serve import ADDRESS, Server, serve

    try:
        server = Server(classifier, Path(args.model).resolve().name, args.serve)
    except OSError as error:
        exit_with_errors(f"--serve {args.serve}: {error.strerror}; name another port, such as --serve 0")
    print(f"http://{ADDRESS}:{server.server_port}/ on this machine only; Ctrl-C ends it", flush=True)
    serve(server)
    print("stopped")
    return 0


def set_temperature(classifier, folder: Path) -> None:
    """Fit the temperature of a run's model, and say what it is on stderr; ends the program if it cannot."""
    from vit.calibration import calibrate
    from vit.data.dataset import DataError

    try:
        classifier.temperature, line = calibrate(folder, classifier.labels)
    except DataError as error:
        exit_with_errors(f"--calibrate: {folder}: {error}")
    print(printable(line), file=sys.stderr)


def accuracy_text(rows: list) -> str:
    """Over the images whose true class is known; empty if there are none."""
    correct = [true == best[0][0] for _, true, best in rows if true is not None]
    if not correct:
        return ""
    right, count = sum(correct), len(correct)
    return f"accuracy {right / count:.4f} ({right} of {count} images in a folder of the name of a class)"


# ---- three formats of the rows (path, true class or None, [(label, probability), ...])


def print_table(rows: list) -> None:
    columns = [[printable(path) for path, _, _ in rows]]
    if any(true is not None for _, true, _ in rows):
        columns.append([printable(f"({true})") if true is not None else "" for _, true, _ in rows])
    named = ["  ".join(f"{label} {probability:.3f}" for label, probability in best) for *_, best in rows]
    columns.append(list(map(printable, named)))
    widths = [max(map(len, column), default=0) for column in columns[:-1]] + [0]
    for cells in zip(*columns):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths)))


def print_json(rows: list) -> None:
    print(
        json.dumps(
            [
                {"image": path}
                | ({} if true is None else {"true_label": true})
                | {"predictions": [{"label": label, "probability": value} for label, value in best]}
                for path, true, best in rows
            ],
            indent=1,
        )
    )


def print_csv(rows: list) -> None:
    writer = csv.writer(sys.stdout)
    labelled = any(true is not None for _, true, _ in rows)
    writer.writerow(["image", "rank", "label", "probability"] + ["true_label"] * labelled)
    for path, true, best in rows:
        for rank, (label, value) in enumerate(best, 1):
            cells = [path, rank, label, f"{value:.6f}"] + [true or ""] * labelled
            writer.writerow(map(csv_cell, cells))


if __name__ == "__main__":
    sys.exit(main())
