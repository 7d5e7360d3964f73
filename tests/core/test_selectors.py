"""Selectors against the plainest loops that are obviously right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.doubles import grid, join
from tokenprune.core.budget import (
    Budget,
    allocate,
    check_budget,
    group_sizes,
    round_share,
)
from tokenprune.core.selection import count
from tokenprune.core.selectors import top, top_per_group, uniform_per_group
from tokenprune.errors import RecipeError

light = settings(max_examples=60, deadline=None)
# Few distinct values, so that ties are common.
values = st.sampled_from([0.0, -0.0, 0.5, 1.0, -2.0, math.inf, -math.inf])


@st.composite
def tables(draw: Any, heads: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores `[N]` or `[H, N]`, groups `[N]` that may be empty, counts `[G]`."""
    n = draw(st.integers(1, 30))
    number = draw(st.integers(1, 5))
    row = st.lists(values, min_size=n, max_size=n)
    scores = torch.tensor(
        draw(row) if heads is None else draw(st.lists(row, min_size=heads, max_size=heads))
    )
    groups = torch.tensor(draw(st.lists(st.integers(0, number - 1), min_size=n, max_size=n)))
    sizes = group_sizes(groups, number)
    counts = torch.tensor([draw(st.integers(0, size)) for size in sizes.tolist()])
    return scores, groups, counts


def plain_top(scores: list[float], rows: list[int], keep: int) -> list[int]:
    return sorted(sorted(rows, key=lambda row: (-scores[row], row))[:keep])


def plain_top_per_group(scores: list[float], groups: list[int], counts: list[int]) -> list[int]:
    kept = []
    for group, keep in enumerate(counts):
        rows = [row for row, its_group in enumerate(groups) if its_group == group]
        kept += plain_top(scores, rows, keep)
    return sorted(kept)


@light
@given(tables(), st.data())
def test_top_is_exact_and_breaks_ties_low(table: Any, data: Any) -> None:
    scores = table[0]
    keep = data.draw(st.integers(0, len(scores)))
    assert top(scores, keep).tolist() == plain_top(scores.tolist(), range(len(scores)), keep)  # type: ignore[arg-type]


@light
@given(tables())
def test_top_per_group(table: Any) -> None:
    scores, groups, counts = table
    index = top_per_group(scores, Budget.of(groups, counts))
    assert index.tolist() == plain_top_per_group(scores.tolist(), groups.tolist(), counts.tolist())


@light
@given(tables(heads=3))
def test_top_per_group_of_heads_that_share_groups(table: Any) -> None:
    scores, groups, counts = table
    index = top_per_group(scores, Budget.of(groups, counts))
    for head in range(3):
        assert torch.equal(index[head], top_per_group(scores[head], Budget.of(groups, counts)))


@light
@given(tables(heads=3), st.data())
def test_top_per_group_of_heads_with_groups_of_their_own(table: Any, data: Any) -> None:
    scores, groups, counts = table
    orders = [data.draw(st.permutations(range(len(groups)))) for _ in range(3)]
    per_head = groups[torch.tensor(orders)]  # sizes are the same, places are not
    index = top_per_group(scores, Budget.of(per_head, counts.expand(3, -1)))
    for head in range(3):
        alone = top_per_group(scores[head], Budget.of(per_head[head], counts))
        assert torch.equal(index[head], alone)


def test_top_per_group_keeps_as_many_in_every_head() -> None:
    groups = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]])
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 4.0, 3.0, 2.0]])
    # Head 1 has no second token of group 0: its next strongest one takes the place.
    budget = Budget.of(groups, torch.tensor([[2, 1], [1, 1]]))
    assert top_per_group(scores, budget).tolist() == [[0, 1, 3], [0, 1, 2]]
    # And here one too many of group 1: the weakest of those it would have kept goes.
    budget = Budget.of(groups, torch.tensor([[1, 1], [1, 2]]))
    assert top_per_group(scores, budget).tolist() == [[0, 3], [1, 2]]


def test_nan_ranks_last() -> None:
    scores = torch.tensor([torch.nan, -5.0, 1.0, torch.nan])
    assert top(scores, 2).tolist() == [1, 2]
    assert top(scores, 3).tolist() == [0, 1, 2]


@light
@given(tables())
def test_larger_budgets_keep_supersets(table: Any) -> None:
    scores, groups, counts = table
    few = top_per_group(scores, Budget.of(groups, counts // 2))
    assert set(few.tolist()) <= set(top_per_group(scores, Budget.of(groups, counts)).tolist())


@light
@given(tables())
def test_uniform_per_group(table: Any) -> None:
    _, groups, counts = table
    expected = []
    for group, keep in enumerate(counts.tolist()):
        rows = [row for row, its_group in enumerate(groups.tolist()) if its_group == group]
        expected += [rows[(2 * i + 1) * len(rows) // (2 * keep)] for i in range(keep)]
    assert uniform_per_group(Budget.of(groups, counts)).tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("n", "k", "kept"), [(8, 4, [1, 3, 5, 7]), (10, 1, [5]), (9, 3, [1, 4, 7]), (3, 3, [0, 1, 2])]
)
def test_uniform_is_centred(n: int, k: int, kept: list[int]) -> None:
    budget = Budget.of(torch.zeros(n, dtype=torch.int64), torch.tensor([k]))
    assert uniform_per_group(budget).tolist() == kept


@light
@given(st.floats(0.001, 1.0), st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_round_share_is_count(share: float, sizes: list[int]) -> None:
    expected = [count(share, size) for size in sizes]
    assert round_share(share, torch.tensor(sizes)).tolist() == expected
    shares = torch.full((len(sizes),), share, dtype=torch.float64)
    assert round_share(shares, torch.tensor(sizes)).tolist() == expected


@pytest.mark.parametrize(
    ("keep", "per", "counts"),
    [
        (0.5, "prompt", [9]),
        (7, "prompt", [7]),
        (99, "prompt", [18]),
        (0.5, "item", [3, 6]),
        (2, "frame", [2, 2, 2, 2]),
        (5, "frame", [5, 4, 4, 4]),
        (0.3, "second", [2, 1, 1, 1]),
    ],
)
def test_allocate(keep: float, per: Any, counts: list[int]) -> None:
    layout = join(grid(2, 3), grid(2, 2, 3, video=True))
    budget = allocate(keep, per, layout)
    assert budget.counts.tolist() == counts
    assert budget.total == sum(counts)
    assert torch.equal(budget.groups, layout.groups(per))


def test_allocate_for_heads() -> None:
    layout = grid(1, 4, 2, video=True)
    rows = torch.tensor([[0, 1, 2, 4], [0, 1, 3, 7]])
    budget = allocate(0.5, "frame", layout, rows)
    assert budget.groups.tolist() == [[0, 0, 0, 1]] * 2
    assert budget.counts.tolist() == [[2, 1]] * 2
    assert budget.total == 3


def test_check_budget_fails() -> None:
    with pytest.raises(RecipeError, match="keep=1 keeps a single token .* write keep=1.0"):
        check_budget(1, "prompt")
    with pytest.raises(RecipeError, match="per must be one of prompt, item, frame, second, got 'd"):
        check_budget(0.5, "day")
    with pytest.raises(RecipeError, match="keep must be a share"):
        check_budget(0, "frame")
    check_budget(1, "frame")
