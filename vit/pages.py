"""HTML pages that need no other file, from the templates in vit/templates/."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values) -> str:
    """A page; every value is escaped."""
    loader = FileSystemLoader(TEMPLATES)
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(template).render(values)


def as_data(path: Path) -> str:
    """A PNG file as a data address, so that the page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
