"""Rows that no other test writes: of the benchmark, in each status, and of a sweep.

python tests/golden/rows.py FOLDER      prints {kind of row: row} as JSON
"""

import json
import os
import sys
from pathlib import Path

import programs
from forks import in_fork

MEASURED = "--plugin none --batch_size 2 --num_labels 4 --warmup_steps 1 --windows 1 --window_steps 1"
CASES = {  # status -> (command line, name of the error of torch that is made to happen, exit status)
    "ok": (MEASURED, None, 0),
    "failed": (MEASURED, "RuntimeError", 1),
    "out of memory": (MEASURED, "OutOfMemoryError", 1),
    "impossible": ("--plugin hybrid_parallel --tp_size 2 --batch_size 2", None, 0),
}


def benchmark_row(root: Path, status: str) -> dict:
    import torch

    line, error, expected = CASES[status]
    results = root / f"{status.replace(' ', '_')}.jsonl"
    errors = {"RuntimeError": RuntimeError, "OutOfMemoryError": torch.cuda.OutOfMemoryError}

    def run() -> None:
        if error:

            def backward(*_, **__):
                raise errors[error]("made to fail")

            torch.autograd.backward = backward
        programs.vit_benchmark([*line.split(), "--results", str(results)])

    ended = in_fork(run, root / "out.txt", root / "err.txt")
    assert ended == expected, (status, ended, (root / "err.txt").read_text())
    (row,) = map(json.loads, results.read_text().splitlines())
    assert row["status"] == status, row
    return row


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    os.chdir(root)
    programs.silence()
    programs.import_libraries()
    rows = {f"case of vit_benchmark.py, {status}": benchmark_row(root, status) for status in CASES}
    sweep, failed = programs.sweep_records(Path("sweep"))
    rows |= {"sweep.jsonl": json.loads(sweep.read_text()), "failed.json": json.loads(failed.read_text())}
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
