"""How the goldens call the program. What is moved or renamed, this file follows, and no golden changes.

Everything here runs in a process of its own and in the folder where a user would stand.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def silence() -> None:
    """What the programs do before they import a library."""
    from vit.console import silence_libraries

    silence_libraries()


def vit_train_demo(argv: list[str]) -> None:
    import vit_train_demo as program

    sys.argv = ["vit_train_demo.py", *argv]
    program.main()


def train(argv: list[str]) -> None:
    import train as program

    sys.argv = ["train.py", *argv]
    program.main()


def vit_benchmark(argv: list[str]) -> None:
    import vit_benchmark as program

    sys.argv = ["vit_benchmark.py", *argv]
    program.main()


PROGRAMS = {"vit_train_demo.py": vit_train_demo, "train.py": train, "vit_benchmark.py": vit_benchmark}


def report(kind: str, folder: Path) -> None:
    """Tables and charts of a folder of results; ``kind``: sweep, accuracy or benchmark."""
    import report as program

    program.main([kind, str(folder)])


def parallelism_report(folder: Path) -> list:
    """The command that makes results/parallelism's table again, from its rows."""
    return [sys.executable, ROOT / "results" / "scripts" / "prove_parallelism.py", folder, "--report"]


def sweep_records(results: Path) -> tuple[Path, Path]:
    """What a sweep records of its call, and of a run that failed. -> (sweep.jsonl, failed.json)"""
    from args import finetune_settings
    from vit import sweep as program

    words = [
        "--models",
        "vit-demo",
        "--dataset",
        "drawn",
        "--plugins",
        "torch_ddp",
        "--batch_sizes",
        "4",
        "--learning_rates",
        "1e-3",
    ]
    sweep, flags = program.read_arguments([*words, "--results", str(results), "--max_norm", "1"])
    (run,) = program.plan_runs(sweep, flags, finetune_settings)
    run.folder.mkdir(parents=True)
    log = results / "run.log"
    log.write_text("starts\nlaunch: process 0 ended\nerror: made to fail\n")
    program.record_command(sweep, flags)
    program.record_failure(run, 1, log)
    return results / "sweep.jsonl", run.folder / "failed.json"


def import_libraries() -> None:
    """Before a fork: the processes that train shall not import them once more."""
    from vit.distributed import import_libraries

    import_libraries()
