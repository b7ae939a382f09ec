"""Proves that every form of parallelism trains as one process does, with ViT-Lite-7/4 on real images, on
the CPU.

    DATA=/path/to/cifar-10 python results/scripts/prove_parallelism.py results/parallelism            # everything
    DATA=... python results/scripts/prove_parallelism.py results/parallelism --only 2d 3d             # some cases again
    python results/scripts/prove_parallelism.py results/parallelism --report                          # tables and chart from the rows

DATA is anything that train.py takes. Two cores need half an hour. Parts:

    cases   train.py's own `parse` and `build`, Engine's steps and evaluation, checkpoints and export, against
            HuggingFace's model with torch's AdamW and clipping, written out in `serial`
    runs    train.py itself, started by torchrun, from the images to a folder that vit_predict.py opens

Writes rows.jsonl (every loss and norm), table.md and losses.png.
"""

import argparse
import io
import itertools
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # its helper process does not survive a fork

from vit.console import silence_libraries

silence_libraries()

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from vit.engine import Engine

from args import parse_scratch
from data import build_scratch_loaders, load_scratch_dataset
from train import build_boosted
from vit.checkpoint import CheckpointFolder, gather_weights, resume_run
from vit.config import load_config
from vit.data.cifar10 import CIFAR10_FOLDER, TRAIN_FILES, read_cifar10
from vit.data.loaders import eval_batches
from vit.distributed import all_reduce_sum, destroy_distributed, device, import_libraries, init_distributed
from vit.files import read_jsonl, write_atomically, write_jsonl
from vit.layout import ParallelLayout
from vit.model import export_model
from vit.parallel import mesh
from vit.patches.colossalai_legacy import patch_legacy_layers
from vit.report.charts import new_figure, save_figure
from vit.report.tables import markdown_table
from vit.run_folder import environment
from vit.schedule import BatchPlan, cosine_with_warmup
from vit.step import Normalize

torch.set_num_threads(1)

SEED, DECAY, SMOOTHING, MAX_NORM = 42, 0.03, 0.1, 1.0  # decay and smoothing: the configs'
IMAGES, HELD_OUT, BATCH = 308, 300, 32  # ten steps an epoch, the last of 20 images and padding
PEAK = 5e-4  # the configs' 2e-3 for batches of 512, times the root of 32 / 512
EPOCHS, WARMUP_EPOCHS = 5, 1
PER_EPOCH = math.ceil(IMAGES / BATCH)
STEPS, SHORT = EPOCHS * PER_EPOCH, 20  # the short bounds hold over the first 20
SAVED = 10  # resumed from here to step 20
SETTINGS = [
    f"TOTAL_BATCH_SIZE={BATCH}",
    f"LEARNING_RATE={PEAK}",
    f"NUM_EPOCHS={EPOCHS}",
    f"WARMUP_EPOCHS={WARMUP_EPOCHS}",
    f"clip_grad_norm={MAX_NORM}",
    "RANDOM_CROP_PADDING=0",
    "AUTO_AUGMENT=None",
    "DROPOUT=0",
]
PRECISIONS = {"fp32": [], "bf16": ["bf16=True"]}

NOISE = 1e-6  # gradients below are rounding noise, of which Adam's first step makes lr times any sign
BOUNDS = {
    "fp32": {
        "loss_20": 1e-4,
        "loss_50": 1e-3,
        "norm_1": 1e-5,
        "norms": 1e-3,
        "weights_1": 1e-6,
        "evaluation": 1e-5,
        "resume": 1e-6,
    },
    "bf16": {"loss_20": 0.005, "norm_1": 0.005, "norms": 0.02},
}


@dataclass(frozen=True)
class Case:
    config: str  # configs/cifar10/vit_lite_7_4_<config>.py
    processes: int
    overrides: tuple[str, ...] = ()

    @property
    def hybrid(self) -> bool:
        """Whether train.py takes Colossal-AI's hybrid_parallel, which keeps bf16 weights beside fp32 ones."""
        return self.config == "1d" or any("pipeline" in word for word in self.overrides)

    @property
    def path(self) -> str:
        return str(ROOT / "configs" / "cifar10" / f"vit_lite_7_4_{self.config}.py")


def _one_d(size: int, pipeline: int = 1) -> tuple[str, ...]:
    return (
        f"parallel={{'pipeline': {pipeline}, 'tensor': {{'mode': '1d', 'size': {size}}}}}",
        f"TENSOR_PARALLEL_SIZE={size}",
    )


DEPTH_2 = ("TENSOR_PARALLEL_SIZE=8", "TENSOR_PARALLEL_DEPTH=2")
CASES = {
    "vanilla": Case("vanilla", 1),
    "dp 4": Case("vanilla", 4),
    "pipeline 2": Case("vanilla", 2, ("parallel={'pipeline': 2}",)),
    "1d of 2": Case("1d", 2, _one_d(2)),
    "1d of 4": Case("1d", 4),
    "1d of 2 x dp 2": Case("1d", 4, _one_d(2)),
    "1d of 4 x dp 2": Case("1d", 8),
    "1d of 2 x pipeline 2": Case("1d", 4, _one_d(2, 2)),
    "1d of 2 x pipeline 2 x dp 2": Case("1d", 8, _one_d(2, 2)),
    "2d": Case("2d", 4),
    "2d x dp 2": Case("2d", 8),
    "2.5d": Case("2p5d", 4),
    "2.5d x dp 2": Case("2p5d", 8),
    "2.5d depth 2": Case("2p5d", 8, DEPTH_2),
    "3d": Case("3d", 8),
}


def write_cut(source: str, folder: Path) -> Path:
    """Some of the training images of ``source``, as torchvision's folder.

    `IMAGES` to train and `HELD_OUT` to evaluate.
    """
    images = load_scratch_dataset(source, load_config(CASES["vanilla"].path)[0])
    chosen = np.random.default_rng(SEED).permutation(len(images.train.labels))[: IMAGES + HELD_OUT]
    parts = dict(zip(TRAIN_FILES, np.array_split(chosen[:IMAGES], len(TRAIN_FILES)))) | {
        "test_batch": chosen[IMAGES:]
    }
    cut = folder / CIFAR10_FOLDER
    cut.mkdir()
    for name, part in parts.items():
        pixels = np.stack([images.train.resized[i] for i in part]).reshape(len(part), -1)
        (cut / name).write_bytes(pickle.dumps({"data": pixels, "labels": images.train.labels[part].tolist()}))
    (cut / "batches.meta").write_bytes(pickle.dumps({"label_names": list(images.label_names)}))
    return cut


# ---------------------------------------------------------------------------------------------- one
# process, plainly


def serial(rank: int, cut: str, precision: str, folder: Path) -> None:
    """What all is measured against: nothing of this project but the order of the images.

    ``precision``: "fp32", "fp64", "bf16" (autocast) or "bf16 weights": the optimizer has them in fp32, from
    the rounded
    ones on, as Colossal-AI does. A first step below half a bf16 digit then moves no weight.
    """
    from transformers import ViTConfig, ViTForImageClassification

    dtype = torch.float64 if precision == "fp64" else torch.float32
    computed = torch.bfloat16 if precision == "bf16 weights" else dtype
    images = read_cifar10(cut)
    pixels = torch.from_numpy(np.stack(images.train.resized)).to(dtype) / 255
    labels = torch.from_numpy(images.train.labels)
    pixels = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std(
        (0, 2, 3), keepdim=True, correction=0
    )
    torch.manual_seed(SEED)
    model = (
        ViTForImageClassification(
            ViTConfig(
                image_size=32,
                patch_size=4,
                hidden_size=256,
                num_hidden_layers=7,
                num_attention_heads=4,
                intermediate_size=512,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                num_labels=10,
            )
        )
        .to(dtype)
        .train()
    )
    masters = {name: p.detach().to(computed).to(dtype, copy=True) for name, p in model.named_parameters()}
    model.to(computed)
    matrices = [
        p
        for name, p in masters.items()
        if p.ndim > 1 and not name.endswith(("cls_token", "position_embeddings"))
    ]
    rest = [
        p for name, p in masters.items() if p.ndim == 1 or name.endswith(("cls_token", "position_embeddings"))
    ]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    )
    order = BatchPlan(IMAGES, BATCH, 1, ParallelLayout(1), SEED)
    dealt = [
        [image for _, image in batch if image >= 0]
        for epoch in range(EPOCHS)
        for batch in order.batches(epoch)
    ]
    seen, warmup = {"loss": [], "norm": []}, WARMUP_EPOCHS * PER_EPOCH
    torch.save(masters, folder / "weights_0.pt")
    for step, batch in enumerate(dealt[: SHORT if "bf16" in precision else STEPS]):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min((step + 1) / warmup, cosine if step >= warmup else 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(pixels[batch].to(computed)).logits
        loss = F.cross_entropy(logits.to(dtype), labels[batch], label_smoothing=SMOOTHING)
        model.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            masters[name].grad = p.grad.to(dtype)
        if step == 0:
            torch.save({name: p.grad.clone() for name, p in masters.items()}, folder / "gradients_1.pt")
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), MAX_NORM)
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
        seen["loss"].append(loss.item())
        seen["norm"].append(norm.item())
        if step == 0:
            torch.save(masters, folder / "weights_1.pt")
    torch.save(masters, folder / "weights_last.pt")
    (folder / "seen.json").write_text(json.dumps(seen))


def judge(folder: Path, cut: str) -> dict:
    """Mean loss, accuracy and count over the held-out images of an exported folder, by transformers alone."""
    from transformers import ViTForImageClassification, ViTImageProcessor

    model, processor = (
        ViTForImageClassification.from_pretrained(folder).eval(),
        ViTImageProcessor.from_pretrained(folder),
    )
    held = read_cifar10(cut).test
    pixels = processor(list(held.resized), return_tensors="pt", input_data_format="channels_first")[
        "pixel_values"
    ]
    labels = torch.from_numpy(held.labels)
    with torch.no_grad():
        logits = torch.cat([model(some).logits for some in pixels.split(50)])
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    return {
        "average_loss": F.cross_entropy(logits, labels).item(),
        "accuracy": accuracy,
        "images": len(labels),
    }


# ---------------------------------------------------------------------------------------------- the product


class Run:
    """A case as train.py sets it up, on this process."""

    def __init__(self, case: Case, precision: str, out: Path, *options: str):
        words = ["--config", case.path, "--output_path", str(out), *options]
        self.args = parse_scratch([*words, "--set", *SETTINGS, *case.overrides, *PRECISIONS[precision]])
        init_distributed(SEED)
        self.norms = []
        self._watch_norms()
        self.images = build_scratch_loaders(self.args.dataset, self.args.values, device())
        self.boosted, self.config = build_boosted(self.args, self.images.label_names)
        self.engine = Engine(
            self.boosted, 10, Normalize(*self.images.normal), self.args.values["LABEL_SMOOTHING"]
        )
        self.layout = self.args.layout
        self.schedule = BatchPlan(IMAGES, BATCH // self.layout.dp, 1, self.layout, SEED)

    def _watch_norms(self) -> None:
        """Note what the clipping functions return: the norm before clipping."""

        def watched(clip):
            def clip_and_note(*args, **kwargs):
                norm = clip(*args, **kwargs)
                self.norms.append(float(norm))
                return norm

            return clip_and_note

        torch.nn.utils.clip_grad_norm_ = watched(torch.nn.utils.clip_grad_norm_)
        mesh.clip_grad_norm_ = watched(mesh.clip_grad_norm_)

    def steps(self, first: int, last: int) -> list[float]:
        """The losses of these steps, over all processes; their norms are added to ``norms``."""
        self.engine.model.train()
        losses = []
        order = itertools.chain.from_iterable(self.schedule.batches(epoch) for epoch in range(EPOCHS))
        batches = self.images.train.batches(itertools.islice(order, first, last))
        for step, batch in zip(range(first, last), batches, strict=True):
            lr = cosine_with_warmup(step, STEPS, WARMUP_EPOCHS * PER_EPOCH, self.args.learning_rate)
            share = self.engine.train_step([batch], self.schedule.images_per_step[step % PER_EPOCH], lr)
            losses.append(all_reduce_sum(share).item())
            if self.args.plugin == "hybrid_parallel":  # clips by itself
                self.norms.append(float(self.boosted.optimizer.get_grad_norm()))
        return losses

    def weights(self, path: Path) -> dict | None:
        whole = gather_weights(self.boosted, path.parent)
        if whole is not None:
            torch.save(whole, path)
        return whole

    def evaluate(self) -> dict:
        held = self.images.evaluated
        return self.engine.evaluate(
            held.batches(eval_batches(len(held), self.schedule.rows, self.layout)), len(held)
        )

    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(Path(self.args.output_path) / "checkpoints", keep=1)


def case_fp32(case: Case, folder: Path) -> dict:
    run = Run(case, "fp32", folder / "run")
    run.weights(folder / "weights_0.pt")
    losses = run.steps(0, 1)
    run.weights(folder / "weights_1.pt")
    losses += run.steps(1, SAVED)
    run.checkpoints().save(
        run.boosted,
        dict(
            step=SAVED,
            epoch=SAVED // PER_EPOCH,
            progress={"images": 0},
            rows=[],
            best_epoch=None,
            processes=run.layout.world,
            settings=run.args.settings,
        ),
    )
    losses += run.steps(SAVED, STEPS)
    whole, evaluated = run.weights(folder / "weights_last.pt"), run.evaluate()
    if whole is not None:
        export_model(whole, run.config, run.images.processor, folder / "export")
    return {"layout": str(run.layout), "loss": losses, "norm": run.norms, "evaluation": evaluated}


def case_resumed(case: Case, folder: Path) -> dict:
    run = Run(case, "fp32", folder / "run", "--resume", "auto")
    _, meta = resume_run(run.checkpoints(), run.args, run.boosted)
    return {"loss": run.steps(meta["step"], SHORT), "norm": run.norms}


def case_bf16(case: Case, folder: Path) -> dict:
    run = Run(case, "bf16", folder / "run bf16")
    return {"layout": str(run.layout), "loss": run.steps(0, SHORT), "norm": run.norms}


def worker(rank: int, function, name: str, cut: str, folder: Path, port: int) -> None:
    case = CASES[name]
    os.environ.update(
        DATA=cut, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ.update(WORLD_SIZE=str(case.processes), LOCAL_WORLD_SIZE=str(case.processes))
    seen = function(case, folder)
    if rank == 0:
        (folder / "seen.json").write_text(json.dumps(seen))
    destroy_distributed()


def fork(processes: int, function, *args, folder: Path) -> dict:
    """In new processes: the library keeps its process groups for good. -> what the first of them saw"""
    mp.start_processes(function, args, nprocs=processes, start_method="fork")
    return json.loads((folder / "seen.json").read_text())


def in_processes(function, name: str, cut: str, folder: Path) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return fork(CASES[name].processes, worker, function, name, cut, folder, port, folder=folder)


# ---------------------------------------------------------------------------------------------- comparison


def difference(ours: list[float], theirs: list[float]) -> float:
    """Largest absolute difference, of as many as ours are."""
    return max(abs(a - b) for a, b in zip(ours, theirs[: len(ours)], strict=True))


def relative(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours, theirs[: len(ours)], strict=True))


def compare(row: dict, references: dict[str, dict]) -> dict:
    """The row with the deviations of its losses and norms from the serial run's, and whether all are within
    the bounds.
    """
    reference = "fp32"
    if row["kind"] == "case" and row["precision"] == "bf16":
        reference = "bf16 weights" if CASES[row["case"]].hybrid else "bf16"
    serial = references[reference]
    row = row | {"reference": reference, "loss_20": difference(row["loss"][:SHORT], serial["loss"])}
    row |= {
        "norm_1": relative(row["norm"][:1], serial["norm"]),
        "norms": relative(row["norm"], serial["norm"]),
    }
    if len(row["loss"]) > SHORT:
        row["loss_50"] = difference(row["loss"], serial["loss"])
    return row | {"pass": passes(row)} if row["kind"] == "case" else row


def compare_weights(folder: Path, reference: Path) -> dict:
    """Largest differences of the gathered weights from the serial ones.

    At the start, after step 1, at the end.
    """
    labels = 10  # the rest is padding
    gaps = {}
    clear = {
        name: gradient.abs() > NOISE for name, gradient in torch.load(reference / "gradients_1.pt").items()
    }
    for when in ("0", "1", "last"):
        ours, theirs = (torch.load(where / f"weights_{when}.pt") for where in (folder, reference))
        assert ours.keys() == theirs.keys()
        both = {
            name: (ours[name][:labels] if name.startswith("classifier") else ours[name], theirs[name])
            for name in theirs
        }
        gap = {name: (a - b).abs() for name, (a, b) in both.items()}
        gaps[f"weights_{when}"] = max(g.max().item() for g in gap.values())
        if when == "1":
            gaps["weights_1_noise"] = gaps["weights_1"]
            gaps["weights_1"] = max(
                g[clear[name]].max().item() for name, g in gap.items() if clear[name].any()
            )
            gaps["noise_share"] = 1 - sum(c.sum().item() for c in clear.values()) / sum(
                c.numel() for c in clear.values()
            )
    return gaps


def passes(row: dict) -> bool:
    bounds = BOUNDS[row["precision"]]
    exact = row["precision"] != "fp32" or row["weights_0"] == 0 and row["accuracy_difference"] == 0
    return exact and all(row[name] <= bound for name, bound in bounds.items())


def prove(name: str, cut: str, scratch: Path) -> Iterator[dict]:
    """The rows of one case: fp32 and bf16."""
    case, folder = CASES[name], scratch / name
    folder.mkdir()
    about = {
        "kind": "case",
        "case": name,
        "config": Path(case.path).name,
        "processes": case.processes,
        "overrides": list(case.overrides),
    }

    started = time.perf_counter()
    seen = in_processes(case_fp32, name, cut, folder)
    ours, plain = seen["evaluation"], judge(folder / "export", cut)
    resumed = in_processes(case_resumed, name, cut, folder)
    yield (
        about
        | {"precision": "fp32"}
        | environment()
        | seen
        | compare_weights(folder, scratch / "serial fp32")
        | {
            "evaluated": ours,
            "plain_evaluation": plain,
            "evaluation": abs(ours["average_loss"] - plain["average_loss"]),
            "accuracy_difference": abs(ours["accuracy"] - plain["accuracy"])
            + abs(ours["images"] - plain["images"]),
            "resume": max(difference(resumed[what], seen[what][SAVED:SHORT]) for what in ("loss", "norm")),
            "seconds": time.perf_counter() - started,
        }
    )

    started = time.perf_counter()
    seen = in_processes(case_bf16, name, cut, folder)
    yield (about | {"precision": "bf16"} | environment() | seen | {"seconds": time.perf_counter() - started})


# ---------------------------------------------------------------------------------------------- train.py,
# launched

LAUNCHED = ("vanilla", "3d", "2.5d depth 2", "2d x dp 2", "1d of 2 x pipeline 2")
ONE_EPOCH = [
    word for word in SETTINGS if not word.startswith(("NUM_EPOCHS", "RANDOM_CROP", "AUTO_AUGMENT"))
] + ["NUM_EPOCHS=1"]  # augmented
DROPPED, DROPOUT = ("2d", "1d of 2"), ["DROPOUT=0.1"]


def launch(
    name: str, cut: str, out: Path, *options: str, overrides: list[str] = (), stop: bool = False
) -> tuple[int, str]:
    """One run of train.py by torchrun, sent SIGTERM in its epoch if ``stop``.

    -> (exit status, what it said)
    """
    case = CASES[name]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={case.processes}",
            str(ROOT / "train.py"),
            "--config",
            case.path,
            "--output_path",
            str(out),
            *options,
            "--set",
            *ONE_EPOCH,
            *case.overrides,
            *overrides,
        ],
        env=os.environ | {"DATA": cut},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    for line in process.stdout:
        said += line
        if stop and "ready" in line:
            process.send_signal(signal.SIGTERM)
    return process.wait(), said


def predicted_accuracy(model: Path, cut: str, folder: Path) -> float:
    """Accuracy of vit_predict.py over the held-out images as files."""
    from PIL import Image

    import vit_predict

    held = read_cifar10(cut)
    folder.mkdir(exist_ok=True)
    for i, pixels in enumerate(held.test.resized):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{i:04d}.png")
    said = io.StringIO()
    with redirect_stdout(said):
        vit_predict.main(["--model", str(model), "--format", "json", str(folder)])
    guesses = [image["predictions"][0]["label"] for image in json.loads(said.getvalue())]
    return float(
        np.mean(
            [guess == held.label_names[label] for guess, label in zip(guesses, held.test.labels, strict=True)]
        )
    )


def launched_row(name: str, label: str, cut: str, scratch: Path, *options: str, **how) -> dict:
    out, started = scratch / "runs" / label, time.perf_counter()
    status, said = launch(name, cut, out, *options, **how)
    row = {
        "kind": "run",
        "case": label,
        "processes": CASES[name].processes,
        **environment(),
        "status": status,
    }
    if status == 0:
        epoch = next(row for row in read_jsonl(out / "metrics.jsonl") if row["kind"] == "epoch")
        row |= {key: epoch[key] for key in ("train_loss", "average_loss", "accuracy", "images")}
        row["predicted_accuracy"] = predicted_accuracy(out, cut, scratch / "held out")
    else:
        print(said, file=sys.stderr)
    return row | {"seconds": time.perf_counter() - started}


def prove_launched(cut: str, scratch: Path) -> Iterator[dict]:
    """train.py from the images to the exported folder: every form ends as vanilla does."""
    vanilla = None
    for name in LAUNCHED:
        row = launched_row(name, name, cut, scratch)
        vanilla = vanilla or row
        yield judged(row, vanilla, 1e-4)


def prove_dropout(cut: str, scratch: Path) -> Iterator[dict]:
    """The same seed gives the same run again, also when stopped within its epoch and resumed."""
    for name in DROPPED:
        first = launched_row(name, f"{name}, dropout 0.1", cut, scratch, overrides=DROPOUT)
        yield judged(first, first, 0)
        label = f"{name}, dropout 0.1, stopped and resumed"
        _, said = launch(name, cut, scratch / "runs" / label, overrides=DROPOUT, stop=True)
        row = launched_row(name, label, cut, scratch, "--resume", "auto", overrides=DROPOUT)
        yield judged(row | {"stopped": "checkpoint saved" in said}, first, 0)


def judged(row: dict, reference: dict, bound: float) -> dict:
    """The row, with its distance from the run that it must equal."""
    if row["status"] or reference["status"]:
        return row | {"pass": False}
    gap = max(abs(row[key] - reference[key]) for key in ("train_loss", "average_loss"))
    same = (
        gap <= bound
        and row["predicted_accuracy"] == row["accuracy"]
        and row["images"] == HELD_OUT
        and row.get("stopped", True)
    )
    return row | {"reference": reference["case"], "bound": bound, "difference": gap, "pass": same}


# ---------------------------------------------------------------------------------------------- what is
# written


def number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def verdict(row: dict) -> str:
    return {True: "pass", False: "**fail**", None: "to compare"}[row.get("pass")]


def deviations(rows: list[dict], precisions: tuple[str, ...], columns: dict[str, str]) -> str:
    """A table of the cases in the first precision, and the serial runs in the others to compare."""
    bounds = BOUNDS[precisions[0]]
    lines = [["bound", "", *[number(bounds.get(name)) for name in columns.values()], "", ""]]
    for wanted in (("case", precisions[0]), *[("serial", precision) for precision in precisions[1:]]):
        for row in rows:
            if (row["kind"], row.get("precision")) == wanted:
                case = row["case"] if row["kind"] == "case" else f"one process, {row['precision']}"
                cells = [number(row.get(name)) for name in columns.values()]
                lines.append([case, row["processes"], *cells, f"{row['seconds']:.0f}", verdict(row)])
    return markdown_table(["case", "processes", *columns, "seconds", ""], lines)


def launches(rows: list[dict]) -> str:
    header = [
        "run",
        "processes",
        "exit status",
        "train loss",
        "held-out loss",
        "accuracy",
        "by vit_predict.py",
        "difference",
        "bound",
        "seconds",
        "",
    ]
    lines = []
    for row in rows:
        if row["kind"] == "run":
            losses = [f"{row[name]:.6f}" if name in row else "" for name in ("train_loss", "average_loss")]
            accuracies = [
                f"{row[name]:.4f}" if name in row else "" for name in ("accuracy", "predicted_accuracy")
            ]
            gap = [number(row.get("difference")), number(row.get("bound"))]
            lines.append(
                [
                    row["case"],
                    row["processes"],
                    row["status"],
                    *losses,
                    *accuracies,
                    *gap,
                    f"{row['seconds']:.0f}",
                    verdict(row),
                ]
            )
    return markdown_table(header, lines)


def write_table(folder: Path, rows: list[dict]) -> None:
    fp32 = {
        f"loss, {SHORT} steps": "loss_20",
        f"loss, {STEPS} steps": "loss_50",
        "gradient norm, step 1": "norm_1",
        "gradient norm": "norms",
        "weights, step 1": "weights_1",
        "small gradients": "weights_1_noise",
        "weights, end": "weights_last",
        "evaluation": "evaluation",
        "resume": "resume",
    }
    bf16 = {f"loss, {SHORT} steps": "loss_20", "gradient norm, step 1": "norm_1", "gradient norm": "norms"}
    clear = 100 * (1 - next(row["noise_share"] for row in rows if "noise_share" in row))
    warmup = WARMUP_EPOCHS * PER_EPOCH
    about = rows[-1]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = f"""# Every form of parallelism against one process

```
DATA=/path/to/cifar-10 python results/scripts/prove_parallelism.py results/parallelism
```

ViT-Lite-7/4 from the same weights on the same {IMAGES} training images of CIFAR-10: {STEPS} steps of {BATCH} images ({PER_EPOCH} an epoch, the last of
{IMAGES % BATCH}), learning rate {PEAK:g} after {warmup} steps of warm-up, label smoothing {SMOOTHING}, gradients clipped to norm {MAX_NORM:g}, weight decay {DECAY}, no dropout,
no augmentation; on a CPU, over gloo. The serial run is HuggingFace's model with torch's AdamW and `clip_grad_norm_` on one process,
written out in the script. The others go through `train.parse`, `train.build`, `Engine`, `checkpoint` and `model.export` with the
config files. Losses and gradient norms of every step are in `rows.jsonl`.

![losses](losses.png)

## fp32

{deviations(rows, ("fp32", "fp64"), fp32)}
Largest differences from the serial run: losses and weights absolute, gradient norms (before clipping) relative. The last line is how
far rounding alone takes the serial run.

- **Weights.** Gathered before step 1 they are the serial ones bit for bit. *Weights, step 1* is over those whose gradient is above
  {NOISE:g} ({clear:.1f} % of them). Adam's first step is the learning rate ({PEAK / warmup:.0e}) times the sign of the gradient, and where a
  gradient is rounding noise (a key's bias has no other) so is its sign: *small gradients* is over all weights, and may reach twice that.
- **Evaluation.** `Engine.evaluate` over {HELD_OUT} held-out images, padded to whole batches, after the last step, against transformers
  alone on the exported folder: the mean loss. Accuracy and count are equal.
- **Resume.** Saved after step {SAVED}, built anew in new processes, loaded, and on to step {SHORT}: losses and norms against the run that went on.

## bf16

{deviations(rows, ("bf16", "bf16", "bf16 weights"), bf16)}
{SHORT} steps against a serial run of the same precision: bf16 autocast, but for 1d and pipeline (Colossal-AI's hybrid_parallel) bf16 weights
with fp32 master weights. The last two lines are those serial runs against the one in fp32: hybrid_parallel rounds the weights that it starts
from, so that its first small steps change little, and it is further from fp32 than autocast.

## train.py, started by torchrun

{launches(rows)}
One epoch of the same images with the configs' augmentation, from the images to the exported folder, which vit_predict.py opens: its
accuracy over the {HELD_OUT} images as PNG files must be the run's own. *Difference* is that of the losses: from vanilla, and with dropout from
the first run of its kind (the same seed again, stopped by SIGTERM within the epoch, and resumed).

{about["date"]}; {about["hardware"]}; Python {about["python"]}; {versions}
"""
    write_atomically(folder / "table.md", text)


def write_chart(folder: Path, rows: list[dict]) -> None:
    serial = next(row for row in rows if row["kind"] == "serial" and row["precision"] == "fp32")
    cases = [row for row in rows if row["kind"] == "case" and row["precision"] == "fp32"]
    steps = range(1, STEPS + 1)
    figure, (losses, gaps) = new_figure(12, 4.8, columns=2)
    losses.plot(steps, serial["loss"], color="0.8", linewidth=6, label="one process, plain")
    for i, row in enumerate(cases):
        look = {"color": f"C{i % 10}", "linewidth": 1, "linestyle": "-" if i < 10 else "--"}
        losses.plot(steps, row["loss"], **look)
        # a difference of 0 has no place on a log axis
        gaps.plot(
            steps,
            [max(abs(a - b), 1e-8) for a, b in zip(row["loss"], serial["loss"])],
            label=row["case"],
            **look,
        )
    for last, bound in ((SHORT, BOUNDS["fp32"]["loss_20"]), (STEPS, BOUNDS["fp32"]["loss_50"])):
        gaps.plot([1, last], [bound, bound], color="0.3", linestyle=":")
        gaps.annotate("bound", (1, bound), xytext=(0, 3), textcoords="offset points", fontsize=8, color="0.3")
    losses.set(xlabel="step", ylabel="loss", title=f"{len(cases)} layouts over the serial run, fp32")
    gaps.set(
        xlabel="step",
        ylabel="difference of the loss from the serial run",
        yscale="log",
        ylim=(7e-9, 3e-3),
        title="0 is drawn at 1e-8",
    )
    losses.legend(frameon=False)
    gaps.legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    save_figure(figure, folder / "losses.png")


# ---------------------------------------------------------------------------------------------- all of it


PARTS = {"launched": prove_launched, "dropout": prove_dropout}


def key(row: dict) -> tuple:
    """A new row replaces the old one of the same key; they sort as the tables have them."""
    order = [*CASES, row["case"]]
    return (
        ["serial", "case", "run"].index(row["kind"]),
        row.get("precision", ""),
        order.index(row["case"]),
        row["case"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*CASES, *PARTS],
        help="these anew; launched, dropout: what torchrun starts",
    )
    parser.add_argument("--report", action="store_true", help="nothing anew")
    args = parser.parse_args()
    wanted = [] if args.report else args.only or [*CASES, *PARTS]
    path = args.folder / "rows.jsonl"
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = {key(row): row for row in read_jsonl(path)} if path.exists() else {}

    def keep(row: dict) -> None:
        rows[key(row)] = row
        write_jsonl(path, [rows[place] for place in sorted(rows)])
        print(f"{row['kind']} {row['case']} {row.get('precision', '')}: {row['seconds']:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        if wanted:
            import_libraries()
            patch_legacy_layers()
            cut = str(write_cut(os.environ["DATA"], scratch))
        if set(wanted) & set(CASES):
            for precision in ("fp32", "bf16", "bf16 weights", "fp64"):
                folder, started = scratch / f"serial {precision}", time.perf_counter()
                folder.mkdir()
                seen = fork(1, serial, cut, precision, folder, folder=folder)
                about = {"kind": "serial", "case": "serial", "precision": precision, "processes": 1}
                keep(about | environment() | seen | {"seconds": time.perf_counter() - started})
        for name in wanted:
            for row in PARTS[name](cut, scratch) if name in PARTS else prove(name, cut, scratch):
                keep(row)
    references = {row["precision"]: row for row in rows.values() if row["kind"] == "serial"}
    ordered = [
        compare(rows[place], references) if "loss" in rows[place] else rows[place] for place in sorted(rows)
    ]
    write_jsonl(path, ordered)
    write_table(args.folder, ordered)
    write_chart(args.folder, ordered)
    failed = [
        f"{row['case']} {row.get('precision', '')}".rstrip() for row in ordered if not row.get("pass", True)
    ]
    sys.exit(f"not within the bounds: {'; '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
