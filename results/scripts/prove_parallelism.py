"""Proves that every form of parallelism trains as one process does: ViT-Lite-7/4 on real images, on the CPU.

    DATA=/path/to/cifar-10 python results/scripts/prove_parallelism.py results/parallelism   # everything
    DATA=... python results/scripts/prove_parallelism.py results/parallelism --only 2d 3d    # some of it
    python results/scripts/prove_parallelism.py results/parallelism --report                 # from the rows

DATA is anything that train.py takes. Two cores need half an hour. Parts:

    cases   what train.py calls (settings, loaders, `boost`, train steps, evaluation, checkpoints, export),
            against HuggingFace's model with torch's AdamW and clipping (parallelism_reference.py)
    runs    train.py itself, started by torchrun, from the images to a folder that vit_predict.py opens
            (parallelism_launched.py)

Writes rows.jsonl (every loss and norm), table.md and losses.png (parallelism_report.py).
"""

import argparse
import itertools
import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator
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
from parallelism_launched import prove_dropout, prove_launched
from parallelism_reference import (
    BOUNDS,
    COMMON,
    EPOCHS,
    HELD_OUT,
    IMAGES,
    LABELS,
    NOISE,
    PER_EPOCH,
    SAVED,
    SEED,
    SHORT,
    STEPS,
    WARMUP,
    evaluate_export,
    serial,
)
from parallelism_report import write_chart, write_table

from args import parse_scratch
from data import build_scratch_loaders
from vit import distributed
from vit.checkpoint import CheckpointFolder, find_checkpoint, load_checkpoint, read_meta
from vit.config_settings import vit_config
from vit.data.cifar10 import CIFAR10_FOLDER, TRAIN_FILES
from vit.data.processor import Normalize
from vit.environment import environment
from vit.files import read_jsonl, write_jsonl
from vit.initial_weights import build_vit
from vit.model import export_model
from vit.parallel import mesh_train
from vit.parallel.boost import boost
from vit.patches.colossalai_legacy import patch_legacy_layers
from vit.schedule import BatchPlan, CosineWithWarmup
from vit.step import TrainStep, evaluate
from vit.system import free_port

torch.set_num_threads(1)

SCHEDULE = [f"NUM_EPOCHS={EPOCHS}", "RANDOM_CROP_PADDING=0", "AUTO_AUGMENT=None"]
PRECISIONS = {"fp32": [], "bf16": ["bf16=True"]}


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
    parallel = {"pipeline": pipeline, "tensor": {"mode": "1d", "size": size}}
    return (f"parallel={parallel}", f"TENSOR_PARALLEL_SIZE={size}")


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
    "2.5d depth 2": Case("2p5d", 8, ("TENSOR_PARALLEL_SIZE=8", "TENSOR_PARALLEL_DEPTH=2")),
    "3d": Case("3d", 8),
}


def write_cut(folder: Path) -> str:
    """Some training images of DATA, `IMAGES` to train and `HELD_OUT` to evaluate, as torchvision's folder."""
    settings = parse_scratch(["--config", CASES["vanilla"].path, "--output_path", str(folder / "none")])
    loaders = build_scratch_loaders(settings, torch.device("cpu")).decode()
    pixels, labels = (
        np.stack(list(loaders.train.images)).reshape(len(loaders.train), -1),
        loaders.train.labels.numpy(),
    )
    chosen = np.random.default_rng(SEED).permutation(len(labels))[: IMAGES + HELD_OUT]
    parts = dict(zip(TRAIN_FILES, np.array_split(chosen[:IMAGES], len(TRAIN_FILES)), strict=True))
    cut = folder / CIFAR10_FOLDER
    cut.mkdir()
    for name, part in (parts | {"test_batch": chosen[IMAGES:]}).items():
        (cut / name).write_bytes(pickle.dumps({"data": pixels[part], "labels": labels[part].tolist()}))
    (cut / "batches.meta").write_bytes(pickle.dumps({"label_names": loaders.label_names}))
    return str(cut)


# ---- this project


class Run:
    """A case as train.py sets it up, on this rank."""

    def __init__(self, case: Case, precision: str, out: Path, *options: str):
        words = ["--config", case.path, "--output_path", str(out), *options, "--set", *SCHEDULE, *COMMON]
        self.settings = parse_scratch([*words, *case.overrides, *PRECISIONS[precision]])
        distributed.init_distributed(SEED)
        self.norms = []
        self.note_norms(torch.nn.utils)
        self.note_norms(mesh_train)
        self.loaders = build_scratch_loaders(self.settings, distributed.device()).decode()
        self.plan = BatchPlan.of(self.settings, IMAGES)
        torch.manual_seed(SEED)
        model = build_vit(vit_config(self.settings.config, self.loaders.label_names))
        self.model_config, self.boosted = model.config, boost(model, self.settings)
        processor = self.loaders.processor
        normalize = Normalize(tuple(processor.image_mean), tuple(processor.image_std))
        self.step = TrainStep.of(self.boosted, self.settings, LABELS, normalize, PER_EPOCH)
        self.checkpoints = CheckpointFolder(out / "checkpoints", keep=1)

    def note_norms(self, module) -> None:
        """Note what the clipping function of ``module`` returns: the norm before clipping."""
        clip = module.clip_grad_norm_

        def clip_and_note(*args, **kwargs):
            norm = clip(*args, **kwargs)
            self.norms.append(float(norm))
            return norm

        module.clip_grad_norm_ = clip_and_note

    def steps(self, first: int, last: int) -> list[float]:
        """The losses of these steps, over all ranks; their norms are added to ``norms``."""
        self.step.model.train()
        order = itertools.chain.from_iterable(map(self.plan.batches, range(EPOCHS)))
        batches = self.loaders.train.batches(itertools.islice(order, first, last))
        rate, losses = CosineWithWarmup(self.settings.peak_learning_rate, STEPS, WARMUP), []
        for number, batch in zip(range(first, last), batches, strict=True):
            images = self.plan.real_images_per_step[number % PER_EPOCH]
            losses.append(distributed.all_reduce_sum(self.step([batch], images, rate(number), number)).item())
            if self.settings.plugin == "hybrid_parallel":  # clips by itself
                self.norms.append(float(self.boosted.optimizer.get_grad_norm()))
        return losses

    def weights(self, path: Path) -> dict | None:
        complete = self.boosted.gather_state_dict(path.parent)
        if complete is not None:
            torch.save(complete, path)
        return complete

    def save(self, step: int) -> None:
        position = {"step": step, "epoch": step // PER_EPOCH, "progress": {"images": 0}, "best_epoch": None}
        made_by = {"processes": self.settings.layout.world_size, "settings": self.settings.record}
        self.checkpoints.save(self.boosted, position | made_by | {"rows": []})


def case_fp32(case: Case, folder: Path) -> dict:
    run = Run(case, "fp32", folder / "run")
    run.weights(folder / "weights_0.pt")
    losses = run.steps(0, 1)
    run.weights(folder / "weights_1.pt")
    losses += run.steps(1, SAVED)
    run.save(SAVED)
    losses += run.steps(SAVED, STEPS)
    complete, held = run.weights(folder / "weights_last.pt"), run.loaders.evaluated
    evaluated = evaluate(run.step, held.batches(run.plan.evaluation_batches(len(held))), len(held))
    if complete is not None:
        export_model(complete, run.model_config, run.loaders.processor, folder / "export")
    return {"layout": str(run.settings.layout), "loss": losses, "norm": run.norms, "evaluation": evaluated}


def case_resumed(case: Case, folder: Path) -> dict:
    run = Run(case, "fp32", folder / "run", "--resume", "auto")
    path = find_checkpoint(run.checkpoints, run.settings, [])
    meta = read_meta(path)
    load_checkpoint(path, run.boosted, meta)
    return {"loss": run.steps(meta["step"], SHORT), "norm": run.norms}


def case_bf16(case: Case, folder: Path) -> dict:
    run = Run(case, "bf16", folder / "run bf16")
    return {"layout": str(run.settings.layout), "loss": run.steps(0, SHORT), "norm": run.norms}


def worker(rank: int, function, case: Case, folder: Path, port: int) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.processes, "MASTER_PORT": port}
    ranks |= {"LOCAL_WORLD_SIZE": case.processes, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    seen = function(case, folder)
    if rank == 0:
        (folder / "seen.json").write_text(json.dumps(seen))
    distributed.destroy_distributed()


def fork(processes: int, function, *args, folder: Path) -> dict:
    """In new processes: Colossal-AI keeps its process groups for good. -> what the first of them saw"""
    mp.start_processes(function, args, nprocs=processes, start_method="fork")
    return json.loads((folder / "seen.json").read_text())


# ---- comparison


def difference(ours: list[float], theirs: list[float]) -> float:
    """Largest absolute difference, of as many as ours are."""
    return max(abs(a - b) for a, b in zip(ours, theirs[: len(ours)], strict=True))


def relative(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours, theirs[: len(ours)], strict=True))


def compare(row: dict, references: dict[str, dict]) -> dict:
    """The row with its deviations from the serial run, and whether all are within the bounds."""
    reference, is_case = "fp32", row["kind"] == "case"
    if is_case and row["precision"] == "bf16":
        reference = "bf16 weights" if CASES[row["case"]].hybrid else "bf16"
    loss, norm, serial_run = row["loss"], row["norm"], references[reference]
    row = row | {"reference": reference, "loss_20": difference(loss[:SHORT], serial_run["loss"])}
    row |= {"norm_1": relative(norm[:1], serial_run["norm"]), "norms": relative(norm, serial_run["norm"])}
    if len(loss) > SHORT:
        row["loss_50"] = difference(loss, serial_run["loss"])
    if not is_case:
        return row
    exact = row["precision"] != "fp32" or row["weights_0"] == 0 and row["accuracy_difference"] == 0
    within = all(row[name] <= bound for name, bound in BOUNDS[row["precision"]].items())
    return row | {"pass": exact and within}


def compare_weights(folder: Path, reference: Path) -> dict:
    """Largest differences of the gathered weights from the serial ones: at first, after step 1, at last."""
    gradients = torch.load(reference / "gradients_1.pt")
    clear = {name: gradient.abs() > NOISE for name, gradient in gradients.items()}
    gaps = {}
    for when in ("0", "1", "last"):
        ours, theirs = (torch.load(where / f"weights_{when}.pt") for where in (folder, reference))
        assert ours.keys() == theirs.keys()
        for name in ("classifier.weight", "classifier.bias"):
            ours[name] = ours[name][:LABELS]  # the rest is padding
        gap = {name: (ours[name] - theirs[name]).abs() for name in theirs}
        gaps[f"weights_{when}"] = max(g.max().item() for g in gap.values())
        if when == "1":
            gaps["weights_1_noise"] = gaps["weights_1"]
            gaps["weights_1"] = max(
                g[clear[name]].max().item() for name, g in gap.items() if clear[name].any()
            )
            shares = [sum(count(c) for c in clear.values()) for count in (torch.sum, torch.numel)]
            gaps["noise_share"] = 1 - int(shares[0]) / shares[1]
    return gaps


def prove(name: str, cut: str, scratch: Path) -> Iterator[dict]:
    """The rows of one case: fp32 and bf16."""
    case, folder = CASES[name], scratch / name
    folder.mkdir()
    about = {"kind": "case", "case": name, "config": Path(case.path).name}
    about |= {"processes": case.processes, "overrides": list(case.overrides)}

    def run(function) -> dict:
        return fork(case.processes, worker, function, case, folder, free_port(), folder=folder)

    started = time.perf_counter()
    seen = run(case_fp32)
    ours, plain, resumed = seen["evaluation"], evaluate_export(folder / "export", cut), run(case_resumed)
    gaps = {key: abs(ours[key] - plain[key]) for key in plain}
    yield (
        about
        | {"precision": "fp32"}
        | environment()
        | seen
        | compare_weights(folder, scratch / "serial fp32")
        | {
            "evaluated": ours,
            "plain_evaluation": plain,
            "evaluation": gaps["average_loss"],
            "accuracy_difference": gaps["accuracy"] + gaps["images"],
            "resume": max(difference(resumed[what], seen[what][SAVED:SHORT]) for what in ("loss", "norm")),
            "seconds": time.perf_counter() - started,
        }
    )
    started = time.perf_counter()
    seen = run(case_bf16)
    seconds = {"seconds": time.perf_counter() - started}
    yield about | {"precision": "bf16"} | environment() | seen | seconds


# ---- all of it

PARTS = {"launched": prove_launched, "dropout": prove_dropout}


def key(row: dict) -> tuple:
    """A new row replaces the old one of the same key; they sort as the tables have them."""
    kind, order = ["serial", "case", "run"].index(row["kind"]), [*CASES, row["case"]]
    return kind, row.get("precision", ""), order.index(row["case"]), row["case"]


def measure(wanted: list[str], scratch: Path) -> Iterator[dict]:
    """The rows of the cases and parts ``wanted``."""
    distributed.import_libraries()
    patch_legacy_layers()
    cut = os.environ["DATA"] = write_cut(scratch)
    if set(wanted) & set(CASES):
        for precision in ("fp32", "bf16", "bf16 weights", "fp64"):
            folder, started = scratch / f"serial {precision}", time.perf_counter()
            folder.mkdir()
            seen = fork(1, serial, cut, precision, folder, folder=folder)
            about = {"kind": "serial", "case": "serial", "precision": precision, "processes": 1}
            yield about | environment() | seen | {"seconds": time.perf_counter() - started}
    for name in wanted:
        yield from PARTS[name](CASES, cut, scratch) if name in PARTS else prove(name, cut, scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parts = "these again; launched, dropout: what torchrun starts"
    parser.add_argument("--only", nargs="+", choices=[*CASES, *PARTS], help=parts)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.folder / "rows.jsonl"
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = {key(row): row for row in read_jsonl(path)} if path.exists() else {}
    if not args.report:
        with tempfile.TemporaryDirectory() as scratch:
            for row in measure(args.only or [*CASES, *PARTS], Path(scratch)):
                rows[key(row)] = row
                write_jsonl(path, [rows[place] for place in sorted(rows)])
                name = f"{row['kind']} {row['case']} {row.get('precision', '')}"
                print(f"{name}: {row['seconds']:.0f} s", flush=True)
    references = {row["precision"]: row for row in rows.values() if row["kind"] == "serial"}
    ordered = [rows[place] for place in sorted(rows)]
    ordered = [compare(row, references) if "loss" in row else row for row in ordered]
    write_jsonl(path, ordered)
    write_table(args.folder / "table.md", ordered)
    write_chart(args.folder / "losses.png", ordered)
    failed = [
        f"{row['case']} {row.get('precision', '')}".rstrip() for row in ordered if not row.get("pass", True)
    ]
    sys.exit(f"not within the bounds: {'; '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
