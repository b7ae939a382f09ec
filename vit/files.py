"""Files: atomic writes, JSON lines, CSV. A reader, or a killed program, never sees half a file."""

import csv
import io
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

# What a run writes into its output folder, and --overwrite_output removes.
RUN_FILES = (
    "checkpoints tensorboard model.safetensors config.json preprocessor_config.json SHA256SUMS "
    "metrics.jsonl metrics.png README.md predictions.parquet classes.csv confusion.csv "
    "confusion_validation.png confusion_test.png report.html model.onnx wandb report_to.json"
).split()
TRACKED = "report_to.json"  # which run of an experiment tracker it is: vit/tracking.py
RUN_LOCK = ".lock"  # there while a run writes: vit/run_lock.py


def remove_folder(folder: Path) -> None:
    """Rename a folder and remove it, so that no incomplete folder has its name if the program is killed."""
    trash = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # not every network file system can
        os.fsync(handle)
    os.close(handle)


def cache_home() -> Path:
    """The user's cache folder (XDG Base Directory Specification)."""
    # not Path.home(), which fails for a user without a home folder
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary file in the same folder and rename it. It is UTF-8, whatever the locale."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(text.encode("utf-8", "backslashreplace"))  # names of files may have any bytes
    os.replace(partial, path)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line, atomically."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


class DamagedRows(ValueError):
    """A line of a JSON-lines file is no JSON object; the message names file and line."""


def read_jsonl(path: Path) -> list[dict]:
    """Inverse of `write_jsonl`; empty lines are ignored.

    Raises:
        DamagedRows: a line is no JSON object.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise DamagedRows(
                    f"{path}, line {number}: is damaged; remove the line, or the file"
                ) from None
    return rows


def csv_cell(value):
    """The value of a cell; text that a spreadsheet would take for a formula gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")  # the csv module would not quote it, and readers would see a new row
    return f"'{text}" if value.startswith(tuple("=+-@\t\r\n")) else text


def write_csv(path: Path, rows: list[dict], without: tuple[str, ...]) -> None:
    """Write a column for each key of any row, in order of first appearance, except those in ``without``."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in without))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writerow({name: csv_cell(name) for name in columns})
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    write_atomically(path, text.getvalue())
