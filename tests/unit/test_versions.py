"""Releases that do not work end a program in one line, before anything starts."""

import pytest

from vit import versions
from vit.parser import Parser


@pytest.fixture
def install(monkeypatch):
    """Pretend that these releases are installed."""

    def install(needs: str = "torch>=2.1", **found: str | None) -> None:
        known = {"colossalai": "0.5.0", "torch": "2.5.1", "transformers": "4.51.3"} | found
        monkeypatch.setattr(versions, "installed_version", known.get)
        monkeypatch.setattr(versions.importlib.metadata, "requires", lambda _: ["numpy", f"{needs}; extra"])

    return install


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"torch": "2.11.0+cu130", "transformers": "5.17.0", "needs": "torch>=2.4"},
        {"torch": "2.15.0", "transformers": "6.0.0.dev0"},
    ],
)
def test_tested_and_later_releases_are_no_problem(install, found):
    install(**found)
    assert versions.version_problems() == []


@pytest.mark.parametrize(
    "found, problem",
    [
        (
            {"transformers": "4.40.2"},
            "transformers 4.40.2 is too old (4.51 or later is needed, tested to 5.24): pip install",
        ),
        ({"torch": "2.2.0+cpu"}, "torch 2.2.0+cpu is too old (2.5 or later is needed"),
        ({"colossalai": "0.4.9"}, "colossalai 0.4.9 is too old (0.5.0 or later is needed"),
        ({"colossalai": None}, "colossalai is not installed in"),
        (
            {"transformers": "5.24.0", "needs": "torch>=2.6"},
            "transformers 5.24.0 needs torch 2.6 or later, and 2.5.1 is installed",
        ),
    ],
)
def test_what_does_not_work_ends_the_program_in_one_line(install, capsys, found, problem):
    install(**found)
    with pytest.raises(SystemExit) as end:
        Parser("x.py", "").parse([])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"error: {problem}")
