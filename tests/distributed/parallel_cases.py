"""Everything that needs a process group, in one launch per process count: the imports cost more than a case.

    torchrun --nproc_per_node N parallel_cases.py FOLDER

FOLDER holds the inputs (conftest.py, `shared`). Rank 0 appends to FOLDER/results_N.jsonl a line when a case
starts
and its result when it ends. Cases that have a line already are not run again.
"""

import contextlib
import faulthandler
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import helpers
import torch
import torch.distributed as dist
from cases import EVALUATIONS, LAYOUTS, PARTLY_TRAINED, RESUMES, SELECTIONS, options, trainings, zero
from colossalai.tensor.d_tensor.api import layout_converter
from forks import exit_status, fork
from golden import checkpoints
from helpers import EMA, LABEL_SMOOTHING, LAYER_DECAY, LEARNING_RATES, WEIGHT_DECAY, in_memory_images

import vit_train_demo
from data import load_dataset
from vit import console, disk, distributed
from vit.checkpoint import CheckpointFolder, load_checkpoint, read_meta
from vit.data.decode import plan_decoding
from vit.data.loaders import BatchDataset
from vit.data.processor import Normalize
from vit.data.transforms import Resize
from vit.distributed import all_gather_objects, all_reduce_sum
from vit.layout import ParallelLayout
from vit.model import freeze_parameters, load_model, pad_classifier
from vit.modules import load_weights, with_first_names
from vit.parallel.boost import boost
from vit.run_lock import RunLock
from vit.schedule import BatchPlan
from vit.settings import Settings
from vit.step import Mixup, TrainStep
from vit.step import evaluate as evaluate_step

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(sys.argv[1])

EPOCHS, GLOBAL_BATCH = 2, 8  # of the training described in helpers.py
BASE = dict(
    plugin="torch_ddp",
    precision="fp32",
    zero_stage=0,
    offload_optim_frac=0.0,
    num_microbatches=1,
    grad_checkpoint=False,
    weight_decay=WEIGHT_DECAY,
    learning_rate=1e-3,
    seed=0,
)
RECIPE = dict(layer_decay=LAYER_DECAY, ema=EMA, label_smoothing=LABEL_SMOOTHING)


def build(model, tp=1, pp=1, recipe=False, class_weights=None, **changes) -> tuple[TrainStep, Settings]:
    """A model under a plugin. ``recipe``: layer decay, weight average, label smoothing."""
    # Colossal-AI remembers how to gather a tensor by its shape alone; these processes had other groups before
    layout_converter.cached_solution.clear()
    layout = ParallelLayout(WORLD, tp, pp, RANK)
    options = BASE | (RECIPE if recipe else {}) | changes
    settings = Settings(layout=layout, tp_size=tp, pp_size=pp, **options)
    normalize = Normalize((0.5,) * 3, (0.5,) * 3)
    freeze_parameters(model, settings.freeze)
    boosted = boost(model, settings)
    step = TrainStep(boosted, 3, normalize, settings.label_smoothing, class_weights=class_weights)
    return step, settings


def initial_model():
    torch.manual_seed(0)
    return helpers.tiny_vit(3)


def meta_of(step: int, epoch: int) -> dict:
    progress = dict(loss_sum=0.0, images=0, steps=0, seconds=0.0)
    meta = dict(step=step, epoch=epoch, progress=progress, best_epoch=None, processes=WORLD)
    return meta | dict(rows=[], settings={})


def train(tp=1, pp=1, k=1, save=None, load=None, mixed=False, **changes) -> dict:
    """Losses of every step and of an evaluation after each epoch.

    save, load: a folder of checkpoints, written to or read after the first epoch.
    mixed: with MixUp and CutMix.
    """
    step, settings = build(initial_model(), tp, pp, gradient_accumulation_steps=k, **changes)
    layout = settings.layout
    if mixed:
        step.mixup = Mixup(0.8, 1.0, 3, seed=7, group=layout.data_parallel_rank)
    plan = BatchPlan(22, GLOBAL_BATCH // layout.data_parallel_size // k, k, layout, seed=5)
    images = BatchDataset(in_memory_images(22), Resize(16))
    held_out = BatchDataset(in_memory_images(13, seed=2), Resize(16))
    losses, evaluations = [], []
    for epoch in range(EPOCHS):
        if load and epoch == 0:
            path = checkpoint_of(load, plan.steps_per_epoch)
            load_checkpoint(path, step.boosted, read_meta(path))
            continue
        step.model.train()
        order = plan.batches(epoch)
        for i, count in enumerate(plan.real_images_per_step):
            batches = [images.__getitems__(next(order)) for _ in range(plan.micro_batches_per_step)]
            number = epoch * plan.steps_per_epoch + i
            share = step(batches, count, LEARNING_RATES[number], number)
            losses.append(all_reduce_sum(share.double()).item())
        batches = map(held_out.__getitems__, plan.evaluation_batches(13))
        evaluations.append(evaluate_step(step, batches, 13))
        if save and epoch == 0:
            CheckpointFolder(save, 1).save(step.boosted, meta_of(plan.steps_per_epoch, epoch=1))
    result = {"losses": losses, "evaluations": evaluations}
    if step.boosted.ema:
        state = step.boosted.gather_state_dict(FOLDER)
        result["exported"] = exported_loss(state, step, tp, held_out) if state else None
    if settings.trains_a_part:  # with an average, too
        result["unchanged"] = unchanged(state) if state else None
        states = step.boosted.optimizer.optim.state_dict()["state"].values()
        moments = torch.tensor(sum(state["exp_avg"].numel() for state in states))
        result["moments"] = all_reduce_sum(moments).item()
    return result


def unchanged(state: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are those of the initial model, to the last bit."""
    initial = with_first_names(initial_model().state_dict())
    return [name for name, tensor in state.items() if torch.equal(tensor, initial[name])]


def exported_loss(state: dict, step: TrainStep, tp: int, held_out) -> float:
    """Of the weights that an export has, in a model of their own."""
    model = initial_model().eval()
    pad_classifier(model, tp)
    load_weights(model, {name: tensor.float() for name, tensor in state.items()})
    batch = held_out.__getitems__([(0, i) for i in range(13)])
    with torch.no_grad():
        logits = model(pixel_values=step.normalize(batch["pixel_values"])).logits[:, :3]
    return torch.nn.functional.cross_entropy(logits, batch["labels"]).item()


def evaluate(tp=1, pp=1, **changes) -> dict:
    """The validation folder, read as a run does, by a model whose true logits are far below the padding."""
    settings = helpers.settings("--dataset", FOLDER / "images")
    dataset = load_dataset(settings)
    loaded = load_model(str(FOLDER / "model"), dataset.label_names)
    labels = len(dataset.label_names)
    torch.manual_seed(9)
    with torch.no_grad():
        loaded.model.classifier.weight[:labels] = torch.randn(labels, 32) * 0.5
        loaded.model.classifier.bias[:labels] = -100
    resize = Resize(16, int(loaded.processor.resample))
    dataset = plan_decoding(dataset, resize, None, settings).run()
    step, settings = build(loaded.model, tp, pp, **changes)
    step.normalize = Normalize(tuple(loaded.processor.image_mean), tuple(loaded.processor.image_std))
    batches, count = BatchDataset(dataset.validation, resize), len(dataset.validation)
    order = BatchPlan(count, 4, 1, settings.layout, seed=0).evaluation_batches(count)
    result = evaluate_step(step, map(batches.__getitems__, order), count)
    try:
        evaluate_step(step, map(batches.__getitems__, order), count + 1)
    except RuntimeError as error:
        result["wrong_count"] = str(error)
    return result


# ---------------------------------------------------------------------------------------------- whole runs


def entry(output: str, *argv, dataset="images", model="model") -> dict:
    """vit_train_demo.py's main in these processes, as if started again; the process group stays."""
    words = [
        "--model_name_or_path",
        FOLDER / model,
        "--dataset",
        FOLDER / dataset,
        "--output_path",
        FOLDER / output,
    ]
    out, err, code = io.StringIO(), io.StringIO(), 0
    torch.manual_seed(int(time.time()))  # nothing may depend on the state before the run
    sys.argv = ["vit_train_demo.py", *map(str, [*words, "--num_workers", 0, *argv])]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            vit_train_demo.main()
        except SystemExit as end:
            code = end.code
    dist.barrier()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


RUN = ("--batch_size", 4, "--num_epoch", 2, "--learning_rate", 1e-3, "--augment", "--max_norm", 2)


def checkpoint_of(folder: Path, step: int) -> Path:
    """The checkpoint after ``step`` steps; the later one if the epoch's evaluation made two of it."""
    metas = [(path, json.loads(path.read_text())) for path in folder.glob("*/meta.json")]
    found = [(meta.get("epoch", 0), path.parent) for path, meta in metas if meta["step"] == step]
    return max(found)[1]


def start_from(name: str, checkpoint_folders: list[Path]) -> None:
    """Make the output folder of an interrupted run, with these checkpoints."""
    if RANK == 0:
        for path in checkpoint_folders:
            shutil.copytree(path, FOLDER / name / "checkpoints" / path.name)
    dist.barrier()


def resume(name: str, step: int, *argv) -> dict:
    """A run without a stop, and one that continues after its checkpoint of ``step``."""
    straight = entry(f"{name}_straight", *RUN, "--checkpoint_steps", 2, "--keep_checkpoints", 99, *argv)
    folder = FOLDER / f"{name}_straight" / "checkpoints"
    last = checkpoint_of(folder, step)
    start_from(f"{name}_resumed", [path for path in sorted(folder.iterdir()) if path.name <= last.name])
    return {"straight": straight, "resumed": entry(f"{name}_resumed", *RUN, "--resume", "auto", *argv)}


def golden(name: str, step: int, *flags) -> dict:
    """A run that continues after a golden checkpoint; while recording, the run that makes it before."""
    os.chdir(FOLDER)  # its settings name folders from here
    run = (*RUN, "--dataset", "images", *flags)
    result = {}
    if checkpoints.RECORD:
        every = ("--checkpoint_steps", 2, "--keep_checkpoints", 99)
        result["straight"] = entry(f"golden_{name}_straight", *run, *every)
        if RANK == 0:
            checkpoints.keep(name, checkpoint_of(FOLDER / f"golden_{name}_straight" / "checkpoints", step))
        dist.barrier()
    start_from(f"golden_{name}", list((checkpoints.FOLDER / name).iterdir()))
    return result | {"resumed": entry(f"golden_{name}", *run, "--resume", "auto")}


def terminated(name: str, at: int = 5, *flags) -> dict:
    """SIGTERM reaches one process in its step ``at``; --resume auto continues."""
    run = (*RUN, *flags)
    straight = entry(f"{name}_straight", *run)
    original, steps = TrainStep.__call__, []

    def train_step(self, *args):
        steps.append(0)
        if len(steps) == at and RANK == WORLD - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    TrainStep.__call__ = train_step
    try:
        stopped = entry(name, *run)
    finally:
        TrainStep.__call__ = original
    files = sorted(p.name for p in (FOLDER / name).iterdir()) if (FOLDER / name).exists() else []
    return {
        "straight": straight,
        "stopped": stopped,
        "files": files,
        "resumed": entry(name, *run, "--resume", "auto"),
    }


def terminated_in_test() -> dict:
    """SIGTERM reaches one process before the test split is evaluated; --resume auto continues."""
    from vit.trainer import Trainer  # not above: `main` replaces functions that it imports

    original = Trainer.finish

    def finish(self):
        if RANK == WORLD - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with mock.patch.object(Trainer, "finish", finish):
        stopped = entry("in_test", *RUN)
    return {"stopped": stopped, "resumed": entry("in_test", *RUN, "--resume", "auto")}


def locked() -> dict:
    """Another run takes the output folder after the settings of this one were checked."""

    def hold() -> None:
        lock = RunLock(FOLDER / "locked")
        lock._try_for_a_second()
        (FOLDER / "locked.ready").touch()
        time.sleep(60)

    child = fork(hold, FOLDER / "locked.log") if RANK == 0 else 0
    while not (FOLDER / "locked.ready").exists():
        time.sleep(0.02)
    with mock.patch("vit.output_checks.other_run", lambda folder: None):
        result = entry("locked", *RUN)
    files = sorted(path.name for path in (FOLDER / "locked").iterdir())
    if child:
        os.kill(child, signal.SIGKILL)
        exit_status(child)
    return result | {"codes": all_gather_objects(result["code"]), "holder": child, "files": files}


def failing_write() -> dict:
    """The disk of the last process fills up during the second save: an error of all of them, and the first
    checkpoint is whole.
    """
    step, _ = build(initial_model())
    folder = CheckpointFolder(FOLDER / "failing_write", 1)
    folder.save(step.boosted, meta_of(1, epoch=1))
    whole = torch.save

    def full_disk(state, file):
        file.write(b"half")
        if RANK == WORLD - 1:
            raise OSError(28, "No space left on device")
        whole(state, file)

    torch.save = full_disk
    try:
        folder.save(step.boosted, meta_of(2, epoch=2))
        error = None
    except OSError as caught:
        error = str(caught)
    finally:
        torch.save = whole
    found = read_meta(folder.complete()[-1])["step"]
    left = sorted(path.name for path in folder.root.iterdir())
    dist.barrier()
    folder.save(step.boosted, meta_of(2, epoch=2))
    return {
        "error": error,
        "found": found,
        "found_after": read_meta(folder.complete()[-1])["step"],
        "left": left,
    }


def no_room() -> dict:
    """There is no room for the second checkpoint of a run; when there is, the run continues."""
    run = (*RUN, "--plugin", "low_level_zero", "--precision", "fp32")
    straight = entry("no_room/straight", *run)
    free, asked = disk.free_bytes, []

    def free_bytes(folder):
        asked.append(folder)
        return 1000.0 if len(asked) > 2 else free(folder)  # after the check before the launch and a save

    disk.free_bytes = free_bytes
    try:
        full = entry("no_room/full", *run)
    finally:
        disk.free_bytes = free
    left = sorted(path.name for path in (FOLDER / "no_room/full/checkpoints").iterdir())
    dist.barrier()
    resumed = entry("no_room/full", *run, "--resume", "auto")
    return {"straight": straight, "full": full, "left": left, "resumed": resumed}


# ---------------------------------------------------------------------------------------------- the list


def all_cases() -> dict:
    cases = {f"train {name}": (train, case) for name, case in trainings(WORLD).items()}
    cases |= {f"options {name}": (train, case) for name, case in options(WORLD).items()}
    cases |= {f"evaluate {name}": (evaluate, case) for name, case in EVALUATIONS[WORLD].items()}
    for name, (step, flags) in (RESUMES[WORLD] | PARTLY_TRAINED[WORLD]).items():
        words = (f"{name}_{WORLD}".replace(" ", "_"), step, *flags.split())
        cases[f"resume {name}"] = (lambda *a: resume(*a), words)
    for name, (step, flags) in checkpoints.CASES.get(WORLD, {}).items():
        cases[f"golden {name}"] = (golden, (name, step, *flags.split()))
    # another number of processes: the same global batch, so the same losses
    for name, case in {"ddp": {}, "zero1": zero(), "zero2 bf16": zero(2, precision="bf16")}.items():
        cases[f"save {name}"] = (train, case | dict(save=FOLDER / f"{name}_{WORLD}_saved"))
        if WORLD > 1:
            cases[f"load {name}"] = (train, case | dict(load=FOLDER / f"{name}_{WORLD // 2}_saved"))
    one_epoch = ("--num_epoch", 1, "--batch_size", 4)
    by_f1 = (*RUN, "--learning_rate", 3e-5, "--no-scale_lr", "--selection_metric", "macro_f1")
    for name, flags in SELECTIONS[WORLD].items():
        words = (f"options/macro_f1_{name}_{WORLD}", *by_f1, *flags.split())
        cases[f"by macro_f1 {name}"] = (entry, words)
    if WORLD == 1:
        cases["mixed ddp"] = (train, dict(mixed=True))
        cases["run weighted"] = (entry, ("options/weighted", *one_epoch, "--class_weights", "balanced"))
        published = ("--plugin", "gemini", "--tp_size", 2, "--pp_size", 2, *one_epoch)
        cases["published settings"] = (entry, ("published", *published))
        cases["no checkpoints kept"] = (
            entry,
            ("none_kept", *one_epoch, "--keep_checkpoints", 0, "--tensorboard"),
        )
        # warm-up to a rate that destroys what the first epochs learned
        growing = (
            "--num_epoch",
            3,
            "--batch_size",
            4,
            "--learning_rate",
            3,
            "--warmup_ratio",
            1,
            "--keep_checkpoints",
            9,
        )
        cases["best first"] = (entry, ("best_first", *growing))
        cases["pruned"] = (entry, ("pruned", *growing[:-1], 1))
        cases["last kept"] = (entry, ("last_kept", *growing[:-1], 1, "--keep", "last"))
        cases["best first, resumed"] = (best_first_resumed, growing)
        # an unreadable image would be found if one were decoded
        cases["dry run"] = (lambda: entry("dry", "--dry_run", dataset="damaged"), ())
        cases["evaluation only"] = (
            lambda: entry("evaluated", "--eval_only", "--batch_size", 4, model="none_kept"),
            (),
        )
        cases["evaluation of other labels"] = (entry, ("evaluated", "--eval_only"))
        cases["damaged, not in memory"] = (
            lambda: entry(
                "skipped", *one_epoch, "--skip_bad_images", "--data_memory", 1e-9, dataset="damaged"
            ),
            (),
        )
    if WORLD == 2:
        for name in ("tp2", "pp2", "hybrid dp2"):
            cases[f"mixed {name}"] = (train, LAYOUTS[2][name] | dict(mixed=True))
        cases["locked"] = (locked, ())
        cases["terminated in the test"] = (terminated_in_test, ())
        cases["terminated"] = (terminated, ("terminated",))
        cases["failing write"] = (failing_write, ())
        cases["no room"] = (no_room, ())
        # a step of all images an epoch, and a signal in the first: there is no later step to notice it in
        cases["terminated in an epoch of one step"] = (terminated, ("one_step", 1, "--batch_size", 16))
        cases["diverging"] = (
            entry,
            ("diverging", *one_epoch, "--plugin", "torch_ddp", "--learning_rate", 1e30),
        )
        other = ("--resume", FOLDER / "gemini_1_straight")
        cases["gemini on other processes"] = (entry, ("refused", *RUN, "--plugin", "gemini", *other))
        other = ("--resume", FOLDER / "ddp_2_straight", "--seed", 1, "--weight_decay", 0.1)
        other = (*other, "--selection_metric", "loss")
        cases["other settings"] = (entry, ("refused", *RUN, "--plugin", "torch_ddp", *other))
        cases["run on other processes"] = (continued, ())
        cases["best epoch elsewhere"] = (elsewhere, ())
    return cases


def best_first_resumed(*flags) -> dict:
    """The run "best first" continues in its second epoch, after the first one was the best."""
    folder = FOLDER / "best_first" / "checkpoints"
    last = checkpoint_of(folder, 12)
    start_from("best_first_resumed", [path for path in sorted(folder.iterdir()) if path.name <= last.name])
    return entry("best_first_resumed", *flags, "--resume", "auto")


def elsewhere() -> dict:
    """A run continues in a new folder from another's checkpoint, whose best epoch is not in the new one."""
    flags = ("--num_epoch", 3, "--batch_size", 4, "--learning_rate", 3, "--warmup_ratio", 1)
    path = checkpoint_of(FOLDER / "best_first" / "checkpoints", 12)
    return entry("elsewhere", *flags, "--resume", path)


def continued() -> dict:
    """The run "best first", stopped after its first epoch on one process, continues with two."""
    if RANK == 0:
        shutil.copytree(FOLDER / "best_first", FOLDER / "continued")
        for step in (12, 18):
            shutil.rmtree(checkpoint_of(FOLDER / "continued" / "checkpoints", step))
    dist.barrier()
    flags = (
        "--num_epoch",
        3,
        "--batch_size",
        4,
        "--learning_rate",
        3,
        "--warmup_ratio",
        1,
        "--keep_checkpoints",
        9,
    )
    result = entry("continued", *flags, "--resume", "auto")
    newest = CheckpointFolder(FOLDER / "continued" / "checkpoints", 9).complete()[-1]
    result["newest"] = read_meta(newest)["epoch"]
    return result


def join_again(seed: int) -> None:
    """In place of init_distributed: wait for the others, which have checked their settings then."""
    dist.barrier()
    torch.manual_seed(seed)


def main() -> None:
    torch.set_num_threads(1)
    console.SECONDS_FOR_RANK0 = 0.0  # the processes stay after an error
    distributed.init_distributed(0)
    leave = distributed.destroy_distributed
    distributed.init_distributed = join_again
    distributed.destroy_distributed = lambda: None
    path = FOLDER / f"results_{WORLD}.jsonl"
    done = {json.loads(line)["case"] for line in path.read_text().splitlines()} if path.exists() else set()
    dist.barrier()  # all have read it
    for name, (function, arguments) in all_cases().items():
        if name in done:
            continue
        if RANK == 0:
            with open(path, "a") as file:
                file.write(json.dumps({"case": name}) + "\n")
        started = time.perf_counter()
        faulthandler.dump_traceback_later(
            120, exit=True, file=sys.__stderr__
        )  # a case takes seconds: processes that wait for each other
        try:
            result = function(**arguments) if isinstance(arguments, dict) else function(*arguments)
        except BaseException:
            with open(path, "a") as file:
                file.write(
                    json.dumps({"case": name, "error": f"process {RANK}: {traceback.format_exc()}"}) + "\n"
                )
            raise
        faulthandler.cancel_dump_traceback_later()
        if RANK == 0:
            with open(path, "a") as file:
                line = {"case": name, "result": result, "seconds": time.perf_counter() - started}
                file.write(json.dumps(line) + "\n")
    leave()


if __name__ == "__main__":
    main()
