"""Reading recorded runs, and the parts of text tables."""

from statistics import mean, stdev


def plural(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; cells as they come, numbers right-aligned by their column."""
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def ranking_key(row: dict) -> tuple[float, float]:
    """Higher is better: accuracy, then the lower loss."""
    return row["accuracy"], -row["average_loss"]


def short_float(rate: float) -> str:
    """0.0002 -> 2e-4"""
    mantissa, _, exponent = f"{rate:.6e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def mean_std(values: list[float], form: str) -> str:
    """`0.9774`, or of several seeds `0.9774 ± 0.0075`."""
    return format(mean(values), form) + (f" ± {format(stdev(values), form)}" if len(values) > 1 else "")


def machine_sentences(environments: list[dict]) -> list[str]:
    """A sentence for each kind of machine and versions: when, on what and with what."""
    lines = []
    for hardware, python, versions in dict.fromkeys(
        (e["hardware"], e["python"], tuple(e["versions"].items())) for e in environments
    ):
        dates = sorted({e["date"][:10] for e in environments if e["hardware"] == hardware})
        lines.append(
            f"{' and '.join(dates)} on {hardware}; Python {python}, "
            f"{', '.join(f'{name} {number}' for name, number in versions)}."
        )
    return lines
