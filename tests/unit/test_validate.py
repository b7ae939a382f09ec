"""Single values: bounds, and what the message says that they must be."""

import math

import pytest

from vit.validate import Number, OneOf, fraction, positive

GOOD = [
    (positive(), 1),
    (positive(float), 1e-9),
    (positive(float, high=0.9), 0.9),
    (Number(int, low=0), 0),
    (Number(float, low=0), 3),  # a whole number is a number
    (fraction(), 0),
    (fraction(1), 1.0),
    (Number(int, low=1, optional=True), None),
    (OneOf(("a", "b")), "b"),
]
BAD = [
    (positive(), 0, "must be a whole number >= 1"),
    (positive(), 1.0, "must be a whole number >= 1"),
    (positive(), True, "must be a whole number >= 1"),
    (positive(), "many", "must be a whole number >= 1"),
    (positive(), None, "must be a whole number >= 1"),
    (positive(float), 0, "must be a number > 0"),
    (positive(float), math.nan, "must be a number > 0"),
    (positive(float), math.inf, "must be a number > 0"),
    (positive(float, high=0.9), 0.91, "must be a number > 0 and <= 0.9"),
    (fraction(), 1, "must be a number >= 0 and <= 0.99"),
    (Number(float), "x", "must be a number"),
    (Number(int, low=1, optional=True), 0, "must be a whole number >= 1 or None"),
    (OneOf(("a", "b")), "c", "must be one of a, b"),
]


@pytest.mark.parametrize("check, value", GOOD, ids=str)
def test_value_within_the_bounds_is_no_problem(check, value):
    assert check.problem(value) is None


@pytest.mark.parametrize("check, value, problem", BAD, ids=str)
def test_value_outside_is_told_the_bounds(check, value, problem):
    assert check.problem(value) == problem


@pytest.mark.parametrize(
    "check, text, value",
    [
        (positive(), "8", 8),
        (positive(), "8.0", "8.0"),  # no whole number; `problem` says so
        (positive(float), "1e-4", 1e-4),
        (positive(float), "", ""),
        (OneOf(("a", "b")), "c", "c"),
    ],
)
def test_text_becomes_a_value_where_it_is_one(check, text, value):
    assert check.parse(text) == value
