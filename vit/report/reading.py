"""Recorded runs, read from a folder of run folders or from one runs.jsonl."""

import json
import sys
from pathlib import Path

from vit.console import printable
from vit.files import DamagedRows, read_jsonl
from vit.report.tables import escape_markdown

ENVIRONMENT = ("date", "hardware", "python", "versions", "command")


def read_run(folder: Path) -> dict:
    """A run's folder -> `run_of_rows`, or ``status`` damaged and ``why``."""
    metrics, failure = folder / "metrics.jsonl", folder / "failed.json"
    try:
        rows = read_jsonl(metrics) if metrics.exists() else []
        failed = dict(json.loads(failure.read_text())) if failure.exists() else {}
    except (ValueError, TypeError) as error:
        why = error if isinstance(error, DamagedRows) else f"{failure}: is damaged; remove it"
        return {"status": "damaged", "why": str(why), "settings": {}}
    return run_of_rows(folder.name, rows, failed)


def run_of_rows(name: str, rows: list[dict], failed: dict) -> dict:
    """A run from its rows: ``status`` finished, failed, unfinished or absent, its settings and its epochs.

    Args:
        rows: of metrics.jsonl.
        failed: the content of failed.json, or empty.
    """
    ended = bool(rows) and rows[-1]["kind"] == "end"
    first = rows[0] if rows else failed
    return {
        "name": name,
        "section": "",
        "status": "finished" if ended else "failed" if failed else "unfinished" if rows else "absent",
        "started": bool(rows),
        # the layout counts as a setting: it decides the global batch size
        "settings": first.get("settings", {}) | {"layout": first.get("layout")},
        "environment": {key: first.get(key) for key in ENVIRONMENT} if rows else None,
        "epochs": [row for row in rows if row["kind"] == "epoch"],
        "test": next((row for row in rows if row["kind"] == "test"), None),
        "exit_status": failed.get("exit_status"),
        "last_lines": failed.get("last_lines", []),
    }


def read_runs(folder: Path) -> list[dict]:
    """The runs in ``folder``; damaged ones are named on stderr and left out.

    Two forms are read: run folders, in ``folder`` or one level deeper in a folder for each section, sorted by
    name; and ``folder``/runs.jsonl with the rows of many runs, `"run": "<section>/<run folder>"` in front of
    each, in their order. A run that is in both is read from its folder.
    """
    runs = {(run["section"], run["name"]): run for run in _packed_runs(folder / "runs.jsonl")}
    for section, path in _run_folders(folder):
        run = read_run(path) | {"section": section}
        if run["status"] == "damaged":
            print(printable(f"left out: {run['why']}"), file=sys.stderr)
        elif run["status"] != "absent":
            runs[section, run["name"]] = run
    return list(runs.values())


def _packed_runs(path: Path) -> list[dict]:
    """The runs of a runs.jsonl, in their order; none without the file."""
    rows: dict[str, list[dict]] = {}
    for row in read_jsonl(path) if path.exists() else []:
        if "run" not in row:
            raise DamagedRows(f'{path}: a row names no "run"')
        rows.setdefault(row.pop("run"), []).append(row)
    runs = []
    for place, own in rows.items():
        section, _, name = place.rpartition("/")
        failed = next((row for row in own if row["kind"] == "failed"), {})
        own = [row for row in own if row["kind"] not in ("failed", "sweep")]
        if own or failed:
            runs.append(run_of_rows(name, own, failed) | {"section": section})
    return runs


def _run_folders(folder: Path) -> list[tuple[str, Path]]:
    """(section, run folder) of each run below ``folder``, by name."""
    names = ("metrics.jsonl", "failed.json")
    runs = {path.parent for name in names for path in folder.glob(f"*/{name}")}
    below = {path.parent for name in names for path in folder.glob(f"*/*/{name}")}
    found = [("", run) for run in runs]
    found += [(run.parent.name, run) for run in below if run.parent not in runs]
    return sorted(found, key=lambda place: place[1])


def read_calls(folder: Path) -> dict[str, list[dict]]:
    """section -> the calls of run_finetuning.sh that made its runs: ``variables`` and ``flags``.

    They are rows of sweep.jsonl, or rows of kind "sweep" in runs.jsonl whose ``run`` is the section.
    """
    calls: dict[str, list[dict]] = {}
    for path in [folder / "sweep.jsonl", *sorted(folder.glob("*/sweep.jsonl"))]:
        if path.exists():
            calls["" if path.parent == folder else path.parent.name] = read_jsonl(path)
    packed = folder / "runs.jsonl"
    for row in read_jsonl(packed) if packed.exists() else []:
        if row["kind"] == "sweep":
            calls.setdefault(row["run"], []).append({name: row[name] for name in ("variables", "flags")})
    return calls


def by_section(runs: list[dict]) -> dict[str, list[dict]]:
    """section -> its runs; both keep their order."""
    sections: dict[str, list[dict]] = {}
    for run in runs:
        sections.setdefault(run["section"], []).append(run)
    return sections


def epoch_values(runs: list[dict], name: str) -> list[list[float]]:
    """Of each run, the values of ``name`` after each epoch."""
    return [[row[name] for row in run["epochs"]] for run in runs]


def headed(title: str, section: str) -> str:
    """The heading of a report, or of one of its sections."""
    return f"# {title}: {escape_markdown(section.replace('_', ' '))}" if section else f"# {title}"
