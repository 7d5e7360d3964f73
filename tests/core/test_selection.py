"""Counts, budgets, and what a decision may look like."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.core.selection import Merge, Selection, check_keep, count
from tokenprune.errors import RecipeError


@pytest.mark.parametrize(
    ("share", "total", "kept"),
    [
        (0.5, 5, 3),  # half up, not half to even
        (0.1, 4, 1),  # at least one
        (0.7, 45, 32),  # 0.7 * 45 is 31.499999999999996
        (0.4 + 0.2, 5, 3),  # 0.6000000000000001
        (1.0, 7, 7),
        (0.5, 0, 0),
        (0.5, 1, 1),
    ],
)
def test_count_rounds_half_up(share: float, total: int, kept: int) -> None:
    assert count(share, total) == kept


@given(st.integers(1, 1000), st.integers(1, 20000))
def test_count_is_exact_for_decimal_shares(thousandths: int, total: int) -> None:
    exact = math.floor(Fraction(thousandths, 1000) * total + Fraction(1, 2))
    assert count(thousandths / 1000, total) == max(1, exact)


@pytest.mark.parametrize("keep", [0.001, 1.0, 1, 400])
def test_check_keep(keep: float | int) -> None:
    check_keep(keep)


@pytest.mark.parametrize("keep", [0.0, 1.5, -0.1, 0, -3, math.nan, True, "half", None])
def test_check_keep_fails(keep: float) -> None:
    with pytest.raises(RecipeError, match=r"keep must be a share in \(0, 1\] or a count >= 1, got"):
        check_keep(keep)


def test_selection_fails() -> None:
    with pytest.raises(ValueError, match=r"must be integers \[K\] or \[H, K\], got \(3,\)"):
        Selection(torch.zeros(3))
    with pytest.raises(ValueError, match=r"got \(1, 1, 1\)"):
        Selection(torch.zeros(1, 1, 1, dtype=torch.int64))


def test_merge_fails() -> None:
    index = torch.arange(3)
    with pytest.raises(ValueError, match=r"must all be \[M\]"):
        Merge(index, index, torch.ones(2))


def test_selection_prints_shapes_only() -> None:
    assert repr(Selection(torch.arange(3))) == "Selection(index=(3,), merge=False)"
