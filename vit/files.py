"""Files: written so that a reader, or a kill, never sees half of one; rows as JSON lines."""

import csv
import io
import json
import os
import shutil
from pathlib import Path


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a kill halfway leaves nothing that looks complete."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def cache_home() -> Path:
    """The user's folder of caches (XDG Base Directory Specification)."""
    return Path(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    )  # Path.home() fails for a user without one


def write_atomically(path: Path, text: str) -> None:
    """Write beside and rename: a reader, or a kill, never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


class DamagedRows(ValueError):
    """A file of rows that is none; the message says where."""


def read_jsonl(path: Path) -> list[dict]:
    """Inverse of `write_rows`.

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


def write_csv(path: Path, rows: list[dict], without: tuple[str, ...]) -> None:
    """A column for each name that any row has, in the order in which they come."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in without))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
