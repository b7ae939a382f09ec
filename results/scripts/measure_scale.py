"""Measure how time and memory of vit_train_demo.py grow with the number of images, without a GPU.

    python results/scripts/measure_scale.py FOLDER --images 2000 20000 200000 --forms folder parquet

The images are links to a few drawn photographs of 96 x 72 pixels, in 1,000 classes; in parquet files they are
copies of them, each with a number appended. For each set it starts a dry run, a run on two processes until
its first step, and that run again. It prints one row for each, and appends it to FOLDER/rows.jsonl.

--program names the checkout to measure, to compare two of them.
"""

import argparse
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results" / "scripts")]

from imagenet_shape import draw, encode

CLASSES, PHOTOS, SIDE = 1000, 8, 96
READY = "  ready "  # the line before the first step


def photographs() -> list[bytes]:
    return [encode(draw(i, PHOTOS, i, SIDE), "jpeg") for i in range(PHOTOS)]


def write_folder(root: Path, images: int) -> Path:
    """root/<class>/<n>.jpg: links to photographs."""
    if root.exists():
        return root
    photos = [root.parent / f"photo-{i}.jpg" for i in range(PHOTOS)]
    for photo, content in zip(photos, photographs()):
        photo.write_bytes(content)
    for label in range(CLASSES):
        (root / f"n{label:08d}").mkdir(parents=True)
    for i in range(images):
        os.symlink(photos[i % PHOTOS], root / f"n{i % CLASSES:08d}" / f"n{i % CLASSES:08d}_{i}.jpg")
    return root


def write_parquet(root: Path, images: int) -> Path:
    """root/train-<n>.parquet: bytes of photographs."""
    import pyarrow
    import pyarrow.parquet

    if root.exists():
        return root
    root.mkdir()
    photos = photographs()
    for start in range(0, images, 20_000):
        numbers = range(start, min(images, start + 20_000))
        encoded = [{"bytes": photos[i % PHOTOS] + str(i).encode(), "path": None} for i in numbers]
        table = pyarrow.table({"image": encoded, "label": [i % CLASSES for i in numbers]})
        pyarrow.parquet.write_table(table, root / f"train-{start:08d}.parquet")
    return root


def measure(command: list[str], environment: dict, until: str) -> dict:
    """Start a command; wait until it prints ``until``. -> seconds, and of the processes that train: CPU
    seconds of all, the largest peak of memory that is one process's own, and the peak of all together (MB).

    Memory that several processes map is counted once for all of them, and as nobody's own.
    """
    log = Path(environment["XDG_CACHE_HOME"]).parent / "log.txt"
    started, cpu, own, together = time.perf_counter(), {}, 0, 0
    with open(log, "w") as file:
        program = psutil.Popen(command, stdout=file, stderr=file, env=environment)
        while program.poll() is None and until not in log.read_text():
            time.sleep(0.25)
            shares = []
            for process in [program, *program.children(recursive=True)]:
                with suppress(psutil.Error):  # it has ended
                    if "torch.distributed.run" not in process.cmdline():
                        memory, times = process.memory_full_info(), process.cpu_times()
                        cpu[process.pid] = times.user + times.system
                        own = max(own, memory.uss)
                        shares.append(memory.pss)
            together = max(together, sum(shares))
        seconds = time.perf_counter() - started
        if program.poll() is None:
            for process in [*program.children(recursive=True), program]:
                with suppress(psutil.Error):
                    process.kill()
        program.wait()
    if until not in log.read_text():
        sys.exit(f"{command} failed:\n{log.read_text()}")
    rounded = {
        "seconds": seconds,
        "cpu_seconds": sum(cpu.values()),
        "own_mb": own / 1e6,
        "all_mb": together / 1e6,
    }
    return {name: round(value, 1) for name, value in rounded.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 20_000, 200_000])
    parser.add_argument("--forms", nargs="+", choices=("folder", "parquet"), default=["folder", "parquet"])
    parser.add_argument("--program", type=Path, default=ROOT)
    parser.add_argument("--steps", nargs="+", default=["dry run", "first step", "first step again"])
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "PYTHONUNBUFFERED": "1",
    }
    print("| form | images | step | seconds | CPU seconds | MB of one process | MB of all |\n|" + "---|" * 7)
    for form in args.forms:
        for images in args.images:
            write = {"folder": write_folder, "parquet": write_parquet}[form]
            data = write(folder / f"{form}-{images}", images)
            options = ["--model_name_or_path", "vit-demo", "--dataset", data, "--num_workers", "0"]
            words = [args.program / "vit_train_demo.py", *options, "--output_path", folder / "out"]
            for step in args.steps:
                launch, until = [sys.executable], "dry run: "
                if step == "dry run":
                    command = [*launch, *words, "--dry_run"]
                else:
                    launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
                    command, until = [*launch, *words, "--overwrite_output"], READY
                row = {"program": str(args.program), "form": form, "images": images, "step": step}
                row |= measure(list(map(str, command)), environment, until)
                with open(folder / "rows.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                print("| " + " | ".join(str(value) for value in list(row.values())[1:]) + " |", flush=True)


if __name__ == "__main__":
    main()
