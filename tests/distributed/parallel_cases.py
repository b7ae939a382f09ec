"""Everything that needs a process group, in one launch per process count: the imports cost more than a case.

    torchrun --nproc_per_node N parallel_cases.py FOLDER

FOLDER holds the inputs (conftest.py, `shared`). Rank 0 appends to FOLDER/results_N.jsonl a line when a case
starts and its result when it ends. Cases that have a line already are not run again.
"""

import faulthandler
import json
import sys
import time
import traceback

import torch
import torch.distributed as dist
from cases import (
    EVALUATIONS,
    EVERYWHERE,
    LAYOUTS,
    PARTLY_TRAINED,
    PATCHED,
    RESUMES,
    SELECTIONS,
    WRAPPED,
    options,
    plain_cases,
    trainings,
    zero,
)
from golden import checkpoints
from helpers import MAX_NORM
from parallel_runs import (
    RUN,
    best_first_resumed,
    continued,
    elsewhere,
    entry,
    failing_write,
    golden,
    locked,
    no_room,
    resume,
    terminated,
    terminated_in_test,
)
from parallel_training import (
    FOLDER,
    RANK,
    WORLD,
    as_the_library_steps,
    evaluate,
    has_ddp,
    hooks_of_gemini,
    overflowed,
    reduced_early,
    steady_gemini,
    train,
)

from vit import console, distributed

ONE_EPOCH = ("--num_epoch", 1, "--batch_size", 4)


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
    muon = dict(optimizer="muon", recipe=True, max_norm=MAX_NORM)
    if WORLD == 1:
        cases["options muon"] = (train, muon | dict(save=FOLDER / "muon_saved"))
        cases["options muon fp16"] = (train, muon | EVERYWHERE["ddp fp16"])
    if WORLD == 2:
        cases["options muon"] = (train, muon)
        cases["options muon, loaded"] = (train, muon | dict(load=FOLDER / "muon_saved"))
    if WORLD == 1:
        cases["hooks of gemini"] = (hooks_of_gemini, ())
    if WORLD > 1:
        cases["reduced early"] = (reduced_early, ())
    if WORLD < 4:
        cases["steady gemini"] = (steady_gemini, ())
        for k in (1, 2):
            cases[f"overflowed gemini k{k}"] = (overflowed, dict(k=k, plugin="gemini"))
            cases[f"overflowed zero1 k{k}"] = (overflowed, zero() | dict(k=k))
        for name in PATCHED[WORLD]:
            case = plain_cases(WORLD)[name] | dict(max_norm=MAX_NORM)
            cases[f"library {name}"] = (as_the_library_steps, case)
        for name in WRAPPED[WORLD]:
            cases[f"wrapped {name}"] = (has_ddp, plain_cases(WORLD)[name])
    by_f1 = (*RUN, "--learning_rate", 3e-5, "--no-scale_lr", "--selection_metric", "macro_f1")
    for name, flags in SELECTIONS[WORLD].items():
        words = (f"options/macro_f1_{name}_{WORLD}", *by_f1, *flags.split())
        cases[f"by macro_f1 {name}"] = (entry, words)
    return cases | (on_one_process() if WORLD == 1 else on_two_processes() if WORLD == 2 else {})


def on_one_process() -> dict:
    """Runs of vit_train_demo.py that need no second process."""
    cases: dict = {}
    cases["mixed ddp"] = (train, dict(mixed=True))
    cases["run weighted"] = (entry, ("options/weighted", *ONE_EPOCH, "--class_weights", "balanced"))
    published = ("--plugin", "gemini", "--tp_size", 2, "--pp_size", 2, *ONE_EPOCH)
    cases["published settings"] = (entry, ("published", *published))
    cases["no checkpoints kept"] = (
        entry,
        ("none_kept", *ONE_EPOCH, "--keep_checkpoints", 0, "--tensorboard"),
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
    cases["dry run"] = (lambda: entry("dry", "--dry_run", "--optimizer", "muon", dataset="damaged"), ())
    cases["evaluation only"] = (
        lambda: entry("evaluated", "--eval_only", "--batch_size", 4, model="none_kept"),
        (),
    )
    cases["evaluation of other labels"] = (entry, ("evaluated", "--eval_only"))
    cases["damaged, not in memory"] = (
        lambda: entry("skipped", *ONE_EPOCH, "--skip_bad_images", "--data_memory", 1e-9, dataset="damaged"),
        (),
    )
    return cases


def on_two_processes() -> dict:
    """Runs that are stopped or fail on one of their processes, or go on from another number of them."""
    cases: dict = {}
    for name in ("tp2", "pp2", "hybrid dp2"):
        cases[f"mixed {name}"] = (train, LAYOUTS[2][name] | dict(mixed=True))
    cases["locked"] = (locked, ())
    cases["terminated in the test"] = (terminated_in_test, ())
    cases["terminated"] = (terminated, ("terminated",))
    cases["failing write"] = (failing_write, ())
    cases["no room"] = (no_room, ())
    # a step of all images an epoch, and a signal in the first: there is no later step to notice it in
    cases["terminated in an epoch of one step"] = (terminated, ("one_step", 1, "--batch_size", 16))
    cases["diverging"] = (entry, ("diverging", *ONE_EPOCH, "--plugin", "torch_ddp", "--learning_rate", 1e30))
    other = ("--resume", FOLDER / "gemini_1_straight")
    cases["gemini on other processes"] = (entry, ("refused", *RUN, "--plugin", "gemini", *other))
    other = ("--resume", FOLDER / "ddp_2_straight", "--seed", 1, "--weight_decay", 0.1)
    other = (*other, "--selection_metric", "loss")
    cases["other settings"] = (entry, ("refused", *RUN, "--plugin", "torch_ddp", *other))
    cases["run on other processes"] = (continued, ())
    cases["best epoch elsewhere"] = (elsewhere, ())
    return cases


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
