"""An argument parser that reports all bad values together."""

from __future__ import annotations

import argparse

from vit import patches
from vit.console import exit_with_errors
from vit.settings import DEFAULTS
from vit.validate import Number, OneOf
from vit.versions import version_problems


class HelpFormatter(argparse.HelpFormatter):
    """Shows a default that is a value; one that follows from something is named in the help text."""

    def _get_help_string(self, action):
        text = action.help or ""
        shows = action.option_strings and action.default not in (None, False, argparse.SUPPRESS, [])
        return text if "default:" in text or not shows else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse, but bad values are collected in ``problems`` instead of ending the program at the first
    one.
    """

    def __init__(self, prog: str, description: str):
        super().__init__(
            prog=prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False
        )
        self.problems: list[str] = []
        self.section: argparse._ActionsContainer = self  # where `add` puts flags

    def group(self, title: str) -> None:
        """Start a group of flags in --help."""
        self.section = self.add_argument_group(title)

    def add(self, flag: str, kind, help: str, auto: bool = False, **options) -> None:
        """A flag.

        Args:
            kind: a `Number` or `OneOf`, str, or bool for ``--x`` and ``--no-x``.
            auto: the word `auto` stands for the default.
            options: of argparse; the default is that of the field in `Settings`, if there is one.
        """
        options.setdefault("default", DEFAULTS.get(flag.lstrip("-")))
        if kind is bool:
            action = self.section.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            action.help = help  # given above, Python 3.10 adds "(default: False)" to it
            return

        def convert(text: str):
            if auto and text == "auto":
                return None
            if kind is str:
                return text
            value = kind.parse(text)
            if problem := kind.problem(value):
                self.problems.append(f"{flag} {text}: {problem}")
                return None if "nargs" in options else options["default"]
            return value

        if isinstance(kind, OneOf):
            options["metavar"] = "{" + ",".join(kind.choices) + "}"
        elif isinstance(kind, Number):
            options["metavar"] = kind.kind.__name__.upper()
        self.section.add_argument(flag, type=convert, help=help, **options)

    def add_check(self) -> None:
        self.section.add_argument("--check", action="store_true", help="check the settings and stop")

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if problems := version_problems():
            exit_with_errors(*problems)  # nothing else can be checked
        if unknown:
            self.problems.append(f"{' '.join(unknown)}: no such option (see --help)")
        for name in patches.unknown():
            there = ", ".join(patches.PATCHES)
            self.problems.append(f"VIT_DISABLE_PATCHES={name}: no such patch; there are {there}")
        return args
