"""Checks of single values, for flags and for names of config files alike."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """A whole number (``kind`` int) or any number (float) within bounds."""

    kind: type
    low: float | None = None
    above: float | None = None
    high: float | None = None
    optional: bool = False  # None is allowed

    def problem(self, value) -> str | None:
        """What the value must be; None if it is that."""
        if self.optional and value is None:
            return None
        kinds = (int, float) if self.kind is float else int
        if isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value):
            outside = (
                self.low is not None and value < self.low,
                self.above is not None and value <= self.above,
                self.high is not None and value > self.high,
            )
            if not any(outside):
                return None
        signs = ((">=", self.low), (">", self.above), ("<=", self.high))
        bounds = " and ".join(f"{sign} {bound}" for sign, bound in signs if bound is not None)
        what = "a whole number" if self.kind is int else "a number"
        return f"must be {what} {bounds}".rstrip() + " or None" * self.optional

    def parse(self, text: str):
        """The number that is written; the text itself if it is none."""
        try:
            return self.kind(text)
        except ValueError:
            return text


@dataclass(frozen=True)
class OneOf:
    """One of some texts."""

    choices: tuple[str, ...]

    def problem(self, value) -> str | None:
        return None if value in self.choices else f"must be one of {', '.join(self.choices)}"

    def parse(self, text: str) -> str:
        return text


def positive(kind: type = int, **bounds) -> Number:
    return Number(kind, low=1, **bounds) if kind is int else Number(kind, above=0, **bounds)


def fraction(high: float = 0.99) -> Number:
    return Number(float, low=0, high=high)
