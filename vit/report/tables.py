"""Reading recorded runs, and the parts of text tables."""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

from vit.files import DamagedRows, read_jsonl


def plural(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; cells as they come, numbers right-aligned by their column."""
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def ranking_key(row: dict) -> tuple[float, float]:
    """Higher is better: accuracy, then the lower loss."""
    return row["accuracy"], -row["average_loss"]


def short_float(rate: float) -> str:
    """0.0002 -> 2e-4"""
    mantissa, _, exponent = f"{rate:.6e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def read_run(folder: Path) -> dict:
    """A run's folder.

    ``status`` finished, failed, unfinished, absent or damaged, its settings and its epochs.
    """
    metrics, failure = folder / "metrics.jsonl", folder / "failed.json"
    try:
        rows = read_jsonl(metrics) if metrics.exists() else []
        failed = dict(json.loads(failure.read_text())) if failure.exists() else {}
    except DamagedRows as error:
        return {"status": "damaged", "why": str(error), "settings": {}}
    except (ValueError, TypeError):
        return {"status": "damaged", "why": f"{failure}: is damaged; remove it", "settings": {}}
    ended = bool(rows) and rows[-1]["kind"] == "end"
    first = rows[0] if rows else failed
    return {
        "name": folder.name,
        "status": "finished" if ended else "failed" if failed else "unfinished" if rows else "absent",
        "started": bool(rows),
        # the layout is one: it decides the global batch
        "settings": first.get("settings", {}) | {"layout": first.get("layout")},
        "environment": {
            name: first.get(name) for name in ("date", "hardware", "python", "versions", "command")
        }
        if rows
        else None,
        "epochs": [row for row in rows if row["kind"] == "epoch"],
        "test": next((row for row in rows if row["kind"] == "test"), None),
        "exit_status": failed.get("exit_status"),
        "last_lines": failed.get("last_lines", []),
    }


def read_runs(folder: Path) -> list[dict]:
    """`read_run` of every folder below, by name; names the damaged ones, which are left out."""
    runs = [read_run(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    for run in runs:
        if run["status"] == "damaged":
            print(f"left out: {run['why']}", file=sys.stderr)
    return [run for run in runs if run["status"] not in ("absent", "damaged")]


def mean_std(values: list[float], form: str) -> str:
    """`0.9774`, or of several seeds `0.9774 ± 0.0075`."""
    return format(mean(values), form) + (f" ± {format(stdev(values), form)}" if len(values) > 1 else "")


def machine_sentences(environments: list[dict]) -> list[str]:
    """A sentence for each kind of machine and versions: when, on what and with what."""
    lines = []
    for hardware, python, versions in dict.fromkeys(
        (e["hardware"], e["python"], tuple(e["versions"].items())) for e in environments
    ):
        dates = sorted({e["date"][:10] for e in environments if e["hardware"] == hardware})
        lines.append(
            f"{' and '.join(dates)} on {hardware}; Python {python}, "
            f"{', '.join(f'{name} {number}' for name, number in versions)}."
        )
    return lines
