"""Pages, read and shown: a parser, and Chromium where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
WIDTHS = (390, 1280)  # pixels of a telephone, of a desktop
FLAGS = "--headless --no-sandbox --disable-gpu --dump-dom --window-size=1400,900".split()


def shown(address: str, milliseconds: int = 2000) -> str:
    """What a page has become after its scripts ran, as HTML."""
    command = [CHROMIUM, *FLAGS, f"--virtual-time-budget={milliseconds}", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def scroll_widths(page: str, folder: Path) -> dict[int, int]:
    """How wide the content of a page is in a window of each of `WIDTHS`: more means scrolling sideways."""
    frames = [
        f'<iframe style="width:{w}px;height:900px;border:0" srcdoc="{escape(page)}"></iframe>' for w in WIDTHS
    ]
    measure = (
        "onload = () => document.title = [...document.querySelectorAll('iframe')].map("
        "frame => frame.contentDocument.documentElement.scrollWidth).join(' ')"
    )
    (folder / "measured.html").write_text(f"<script>{measure}</script>{''.join(frames)}", encoding="utf-8")
    found = re.search(r"<title>([\d ]+)</title>", shown((folder / "measured.html").as_uri()))
    return dict(zip(WIDTHS, map(int, found[1].split()), strict=True))


class PageParser(HTMLParser):
    """What a page has: ``images`` and ``links`` (their addresses), ``tags`` (how many), ``text``."""

    def __init__(self):
        super().__init__()
        self.images, self.links, self.tags, self.texts, self.hidden = [], [], Counter(), [], False

    @classmethod
    def of(cls, path: Path) -> PageParser:
        page = cls()
        page.feed(path.read_text(encoding="utf-8"))
        return page

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.hidden = tag in ("style", "title")
        self.images += [value for name, value in attributes if name == "src"]
        self.links += [value for name, value in attributes if name == "href"]

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        if not self.hidden:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())
