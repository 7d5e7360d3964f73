"""Selectors against the plainest loops that are obviously right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.doubles import candidates, grid, join, sound
from tokenprune.core.budget import (
    Budget,
    KeepEach,
    allocate,
    check_budget,
    check_on,
    group_sizes,
    round_share,
)
from tokenprune.core.layout import MODALITIES
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
    budget = allocate(keep, per, candidates(layout))
    assert budget.counts.tolist() == counts
    assert budget.total == budget.least == budget.most == sum(counts)
    assert budget.exact
    assert torch.equal(budget.groups, layout.groups(per))


def test_allocate_for_heads() -> None:
    layout = grid(1, 4, 2, video=True)
    rows = torch.tensor([[0, 1, 2, 4], [0, 1, 3, 7]])
    budget = allocate(0.5, "frame", candidates(layout, rows))
    assert budget.groups.tolist() == [[0, 0, 0, 1]] * 2
    assert budget.counts.tolist() == [[2, 1]] * 2
    assert budget.total == 3


def plain_allocate(keep: Any, groups: list[int], kinds: list[str]) -> int:
    """How many tokens are kept in all, if each modality has a budget of its own or none."""
    total = 0
    for group, kind in set(zip(groups, kinds, strict=True)):
        size = sum(one == (group, kind) for one in zip(groups, kinds, strict=True))
        if kind not in keep:
            total += size
        elif isinstance(keep[kind], int):
            total += min(keep[kind], size)
        else:
            total += count(keep[kind], size)
    return total


MIXED = join(grid(2, 3), grid(2, 2, 3, video=True), sound(10), sound(3))


@pytest.mark.parametrize("per", ["prompt", "item", "frame", "second"])
@pytest.mark.parametrize(
    "keep",
    [
        {"audio": 0.3},
        {"video": 2, "audio": 0.5},
        {"image": 0.1, "video": 0.2, "audio": 1.0},
        {"image": 100},
    ],
)
def test_allocate_to_each_modality(keep: Any, per: Any) -> None:
    names = {code: name for name, code in MODALITIES.items()}
    kinds = [names[code] for code in MIXED.modality.tolist()]
    groups = MIXED.groups(per).tolist()
    budget = allocate(keep, per, candidates(MIXED))
    assert budget.exact and budget.total == plain_allocate(keep, groups, kinds)
    index = uniform_per_group(budget).tolist()
    pairs = list(zip(groups, kinds, strict=True))
    for pair in set(pairs):
        rows = {row for row, one in enumerate(pairs) if one == pair}
        ours = plain_allocate(keep, [0] * len(rows), [pair[1]] * len(rows))
        assert len(rows & set(index)) == ours


def test_allocate_to_each_modality_for_heads() -> None:
    layout = join(grid(1, 4), sound(4))
    rows = torch.tensor([[0, 1, 4, 5, 6, 7], [1, 3, 4, 5, 6, 7]])
    budget = allocate({"audio": 0.5}, "prompt", candidates(layout, rows))
    assert budget.total == 4
    index = uniform_per_group(budget)
    assert index.tolist() == [[0, 1, 3, 5]] * 2


def test_allocate_nothing() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    for keep in (0.5, 7, {"audio": 0.5}):
        for per in ("prompt", "item", "frame", "second"):
            budget = allocate(keep, per, candidates(MIXED, nothing))  # type: ignore[arg-type]
            assert budget.total == 0 and budget.exact
            assert uniform_per_group(budget).tolist() == []
            assert top_per_group(torch.zeros(0), budget).tolist() == []


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 4, 9]), torch.tensor([[1, 2], [2, 5]])])
def test_adaptive_budgets_know_nothing_but_bounds(rows: torch.Tensor | None) -> None:
    of = candidates(MIXED, rows)
    budget = Budget.adaptive(of)
    assert (budget.least, budget.total, budget.most) == (0, len(of), len(of))
    assert not budget.exact
    assert budget.counts.tolist() == [len(of)]
    assert torch.equal(budget.groups, torch.zeros_like(of.rows))
    assert torch.equal(uniform_per_group(budget), torch.arange(len(of)).expand_as(of.rows))


def test_adaptive_budgets_of_nothing_are_exact() -> None:
    budget = Budget.adaptive(candidates(MIXED, torch.zeros(0, dtype=torch.int64)))
    assert budget.exact and budget.total == 0


def test_budgets_with_bounds() -> None:
    groups, counts = torch.tensor([0, 0, 1]), torch.tensor([1, 1])
    assert Budget.of(groups, counts)[2:] == (2, 2, 2)
    budget = Budget.of(groups, counts, least=1, most=3)
    assert budget[2:] == (2, 1, 3) and not budget.exact
    assert Budget.of(groups, counts, least=0)[2:] == (2, 0, 2)


def test_candidates() -> None:
    all_of_them = candidates(MIXED)
    assert all_of_them.tokens is MIXED and len(all_of_them) == len(MIXED)
    assert torch.equal(all_of_them.groups("frame"), MIXED.groups("frame"))
    rows = torch.tensor([0, 7, 20, 30])
    some = candidates(MIXED, rows)
    assert len(some) == 4 and torch.equal(some.tokens.position, MIXED.position[rows])
    # Groups have the numbers that they have in the whole prompt.
    assert some.groups("item").tolist() == [0, 1, 2, 3]
    assert some.groups("prompt").tolist() == [0] * 4
    at_cache = candidates(MIXED, torch.stack([rows, rows + 0]))
    assert len(at_cache) == 4 and torch.equal(at_cache.tokens.position, some.tokens.position)
    assert at_cache.groups("item").tolist() == [[0, 1, 2, 3]] * 2


def test_scores_that_heads_share_follow_the_budget_of_the_first() -> None:
    groups = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]])
    budget = Budget.of(groups, torch.tensor([[2, 1], [1, 2]]))
    assert top_per_group(torch.tensor([1.0, 3.0, 2.0, 4.0]), budget).tolist() == [1, 2, 3]


def test_check_budget_returns_what_hashes() -> None:
    assert check_budget(0.5, "frame") == 0.5
    given = {"audio": 1, "image": 0.5}
    kept = check_budget(given, "prompt")  # type: ignore[arg-type]  # one token of a sound is meant
    assert kept == given and isinstance(kept, KeepEach) and hash(kept)
    assert check_budget(kept, "item") == kept
    for each, error in (
        ({}, "got none"),
        ({"speech": 0.5}, "got 'speech'"),
        ({"audio": 0}, "keep.audio must be a share in .* got 0"),
        ({"audio": True}, "keep.audio must be a share in .* got True"),
        ({"audio": {"image": 0.5}}, "keep.audio must be a share in"),
    ):
        with pytest.raises(RecipeError, match=error):
            check_budget(each, "frame")  # type: ignore[arg-type]


def test_check_on() -> None:
    assert check_on(None) is None
    assert check_on("audio") == check_on(("audio",)) == "audio"
    assert check_on(("audio", "image", "audio")) == ("image", "audio")
    with pytest.raises(RecipeError, match="on must name some of image, video, audio, got none"):
        check_on(())
    with pytest.raises(RecipeError, match="on must name some of image, video, audio, got 'sound'"):
        check_on("sound")  # type: ignore[arg-type]


def test_check_budget_fails() -> None:
    with pytest.raises(RecipeError, match="keep=1 keeps a single token .* write keep=1.0"):
        check_budget(1, "prompt")
    with pytest.raises(RecipeError, match="per must be one of prompt, item, frame, second, got 'd"):
        check_budget(0.5, "day")
    with pytest.raises(RecipeError, match="keep must be a share"):
        check_budget(0, "frame")
    check_budget(1, "frame")
