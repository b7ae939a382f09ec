"""Numbers as text, and Markdown tables."""

import re
import unicodedata
from collections.abc import Sequence
from math import inf, isnan
from statistics import mean, stdev


def plural(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def short_float(rate: float) -> str:
    """0.0002 -> 2e-4"""
    mantissa, _, exponent = f"{rate:.6e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def mean_std(values: Sequence[float], form: str) -> str:
    """`0.9774`, or of several runs `0.9774 ± 0.0075` (sample standard deviation)."""
    return format(mean(values), form) + (f" ± {format(stdev(values), form)}" if len(values) > 1 else "")


def ranking_key(row: dict, metric: str = "accuracy") -> tuple[float, float]:
    """Higher is better: accuracy or macro F1, then the lower loss; or the lower loss, then accuracy.

    A loss that is not a number is the worst.
    """
    loss = row["average_loss"]
    low_loss = -inf if isnan(loss) else -loss
    return (low_loss, row["accuracy"]) if metric == "loss" else (row[metric], low_loss)


def escape_markdown(text: str) -> str:
    """Text that a user chose, such as a class name, in one line and without a meaning in Markdown or HTML."""
    visible = (" " if unicodedata.category(char) in ("Cc", "Cs") else char for char in text)
    # an underscore within a word means nothing
    special = r"[\\`*\[\]<>|&~]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(special, r"\\\g<0>", " ".join("".join(visible).split()))


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; columns that hold only numbers are right-aligned.

    Text keeps its Markdown, but for what would end its cell.
    """
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    separator = "|" + "|".join("---:" if number else "---" for number in numeric) + "|"

    def cell(value) -> str:
        return re.sub(r"(?<!\\)\|", r"\\|", " ".join(str(value).split("\n")))

    first, *lines = ("| " + " | ".join(map(cell, row)) + " |" for row in [header, *rows])
    return "\n".join([first, separator, *lines]) + "\n"


def machine_sentences(environments: list[dict]) -> list[str]:
    """One sentence for each combination of hardware and versions, with the dates of its runs."""
    lines = []
    for machine in dict.fromkeys(
        (e["hardware"], e["python"], (*e["versions"].items(),)) for e in environments
    ):
        hardware, python, versions = machine
        dates = " and ".join(sorted({e["date"][:10] for e in environments if e["hardware"] == hardware}))
        libraries = ", ".join(f"{name} {number}" for name, number in versions)
        lines.append(f"{dates} on {hardware}; Python {python}, {libraries}.")
    return lines
