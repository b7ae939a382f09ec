"""Recorded runs, read from a folder of run folders or from one runs.jsonl."""

import json
import sys
from pathlib import Path

from vit.files import DamagedRows, read_jsonl


def read_run(folder: Path) -> dict:
    """A run's folder -> `run_of_rows`, or ``status`` damaged and ``why``."""
    metrics, failure = folder / "metrics.jsonl", folder / "failed.json"
    try:
        rows = read_jsonl(metrics) if metrics.exists() else []
        failed = dict(json.loads(failure.read_text())) if failure.exists() else {}
    except DamagedRows as error:
        return {"status": "damaged", "why": str(error), "settings": {}}
    except (ValueError, TypeError):
        return {"status": "damaged", "why": f"{failure}: is damaged; remove it", "settings": {}}
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
    """The runs in ``folder``; damaged ones are named and left out.

    Two forms are read. Run folders below ``folder``, or one level deeper, in a folder for each section: by
    name. And
    ``folder``/runs.jsonl with the rows of many runs, `"run": "<section>/<run folder>"` in front of each: as
    they
    come. A run that is in both is read from its folder.
    """
    runs = {(run["section"], run["name"]): run for run in _packed_runs(folder / "runs.jsonl")}
    for section, path in _run_folders(folder):
        run = read_run(path) | {"section": section}
        if run["status"] == "damaged":
            print(f"left out: {run['why']}", file=sys.stderr)
        elif run["status"] != "absent":
            runs[section, run["name"]] = run
    return list(runs.values())


def _packed_runs(path: Path) -> list[dict]:
    """The runs of a runs.jsonl, in the order in which they come; none without the file."""
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
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []:
        if (path / "metrics.jsonl").exists() or (path / "failed.json").exists():
            found.append(("", path))
        else:
            below = {
                file.parent for name in ("metrics.jsonl", "failed.json") for file in path.glob(f"*/{name}")
            }
            found += [(path.name, run) for run in sorted(below)]
    return found


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
    """section -> its runs, in the order in which sections come."""
    sections: dict[str, list[dict]] = {}
    for run in runs:
        sections.setdefault(run["section"], []).append(run)
    return sections


def headed(title: str, section: str) -> str:
    """The heading of a report, or of one of its sections."""
    return f"# {title}: {section.replace('_', ' ')}" if section else f"# {title}"
