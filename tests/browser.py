"""Chromium, for the tests of pages."""

import re
import shutil
import subprocess
from html import escape
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
