"""Form of the code: length of lines, files and functions, and words that are not the field's."""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest
from helpers import ROOT

# The last line of the list of names that this repository uses; a reader looks for the field's terms instead.
BANNED = (
    "mend, strangers, anew, unasked, thing, for nothing, chatter, at hand, goes on, wants, leaves behind, "
    "told, tell apart"
).split(", ")
MAX_LINE, MAX_FILE, MAX_FUNCTION = 110, 350, 60


def tracked(*suffixes: str) -> list[Path]:
    """Files of the repository without results/, which are records of earlier versions."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in done.stdout.splitlines() if name.endswith(suffixes)]
    return [ROOT / name for name in names if not name.startswith("results/") and (ROOT / name).exists()]


def texts(path: Path) -> list[tuple[int, str]]:
    """(line, text) of comments, docstrings and strings; of a shell script all lines."""
    source = path.read_text()
    if path.suffix == ".sh":
        return list(enumerate(source.splitlines(), 1))
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in kinds]


def places(found: list[tuple[Path, int, str]]) -> str:
    return "\n".join(f"{path.relative_to(ROOT)}:{line}: {text}" for path, line, text in found)


def test_lines_have_at_most_110_columns():
    found = [
        (path, number, f"{len(line)} columns")
        for path in tracked(".py", ".sh")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > MAX_LINE and not re.search(r"https?://", line)
    ]
    assert not found, places(found)


def test_no_line_is_excluded_from_formatting():
    mark = "fmt: " + "skip"
    found = [
        (path, number, line.strip())
        for path in tracked(".py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if mark in line
    ]
    assert not found, places(found)


def test_texts_use_the_words_of_the_field():
    words = "|".join(BANNED).replace(" ", r"\s+")
    banned = re.compile(rf"\b({words})\b", re.IGNORECASE)
    found = [
        (path, line, word)
        for path in tracked(".py", ".sh")
        if path != Path(__file__) and (ROOT / "tests/golden") not in path.parents
        for line, text in texts(path)
        for word in banned.findall(text)
    ]
    assert not found, places(found)


def programs_and_package() -> list[Path]:
    return [path for path in tracked(".py") if path.parent == ROOT or ROOT / "vit" in path.parents]


def test_files_are_short():
    lengths = [(path, len(path.read_text().splitlines())) for path in programs_and_package()]
    found = [(path, length, "lines") for path, length in lengths if length > MAX_FILE]
    assert not found, places(found)


def defines_flags(name: str) -> bool:
    """Whether a function is a list of command-line flags, which may be long."""
    return name.endswith("_parser") or bool(re.fullmatch(r"add_\w*flags", name))


def test_functions_are_short():
    found = []
    for path in programs_and_package():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not defines_flags(node.name):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION:
                    found.append((path, node.lineno, f"{node.name} has {length} lines"))
    assert not found, places(found)
