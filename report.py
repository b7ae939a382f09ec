"""Builds tables and charts from recorded runs.

    python report.py benchmark FOLDER     table.md, table.csv and charts from FOLDER/rows.jsonl
    python report.py sweep FOLDER         the same from FOLDER/*/metrics.jsonl, the runs of run_finetuning.sh
    python report.py accuracy FOLDER      table.md and a chart from FOLDER/*/metrics.jsonl, the runs of
                                          run_accuracy.sh

The rows of many runs may also be in one FOLDER/runs.jsonl, and runs may be in sections, FOLDER/SECTION/RUN:
see vit.report.reading.read_runs. Without arguments: `sweep ./finetuning_results`, where run_finetuning.sh
writes.
"""

import sys
from pathlib import Path

from vit.console import exit_with_errors
from vit.files import DamagedRows
from vit.report.accuracy import accuracy_report
from vit.report.benchmark import benchmark_report
from vit.report.sweep import sweep_report

REPORTS = {"benchmark": benchmark_report, "sweep": sweep_report, "accuracy": accuracy_report}


def main(argv: list[str]) -> None:
    argv = argv or ["sweep", "./finetuning_results"]
    if len(argv) != 2 or argv[0] not in REPORTS:
        exit_with_errors(f"usage: python report.py {{{','.join(REPORTS)}}} FOLDER")
    try:
        REPORTS[argv[0]](Path(argv[1]))
    except DamagedRows as error:
        exit_with_errors(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
