"""report.html of several runs or cases: table.md as a page, with its charts inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from markdown_it import MarkdownIt
from markupsafe import Markup

from vit.files import write_atomically
from vit.pages import as_data, render


def markdown_html(text: str) -> Markup:
    """Markdown as `escape_markdown` and `markdown_table` write it; HTML in it stays text."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    # a wide table scrolls by itself, not the page
    reader.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    reader.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return Markup(reader.render(text))


def page_address(folder: Path, run: dict) -> str:
    """The relative address of a run's own report.html; empty if there is none."""
    path = Path(run["section"], run["name"], "report.html")
    return quote(path.as_posix()) if (folder / path).is_file() else ""


def write_tables_page(
    folder: Path, title: str, text: str, charts: Sequence[str], numbers: Sequence[tuple], runs: Sequence = ()
) -> None:
    """Write ``folder``/report.html.

    Args:
        text: of table.md.
        charts: names of PNG files in ``folder``.
        numbers: (what, number, note) of the boxes at the top.
        runs: as `read_runs` gives them; each is linked to its own page, if it has one.
    """
    rows = [(run, page_address(folder, run)) for run in runs]
    page = render(
        "tables.html",
        title=title,
        numbers=numbers,
        charts=[(Path(name).stem.replace("_", " "), as_data(folder / name)) for name in charts],
        text=markdown_html(text),
        runs=rows if any(address for _, address in rows) else [],
    )
    write_atomically(folder / "report.html", page)
