"""Knorm: short keys stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.doubles import cache_context, candidates, grid, join, sound
from tokenprune.core.layout import TokenLayout
from tokenprune.core.recipe import Recipe
from tokenprune.core.signal import Keys
from tokenprune.core.site import Cache
from tokenprune.errors import RecipeError
from tokenprune.methods.knorm import Knorm

LAYOUT = join(grid(2, 3), grid(2, 2, 3, video=True), sound(5))


def context(keys: Tensor, layout: TokenLayout = LAYOUT, rows: Tensor | None = None) -> Any:
    return cache_context(layout, heads=len(keys), rows=rows, signals={Keys(): keys})


def test_the_shortest_keys_of_each_head_stay() -> None:
    keys = torch.tensor(
        [[[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]], [[1.0, 0.0], [0.0, 5.0], [0.0, 0.0]]]
    )
    selection = Knorm(keep=2).select(context(keys, grid(1, 3)))
    assert selection.index.tolist() == [[1, 2], [0, 2]]
    assert selection.scores is not None
    assert selection.scores.tolist() == [[-5, -1, -2], [-1, -5, 0]]


@pytest.mark.parametrize(("keep", "per"), [(0.4, "prompt"), (2, "item"), (0.5, "frame")])
def test_random_keys_match_a_loop(keep: Any, per: Any) -> None:
    keys = torch.randn(2, len(LAYOUT), 4, generator=torch.Generator().manual_seed(0))
    stage = Knorm(keep=keep, per=per)
    index = stage.select(context(keys)).index
    budget = stage.budget(candidates(LAYOUT, heads=2))
    for head in range(2):
        expected = []
        for group, count in enumerate(
            budget.counts.flatten()[: int(budget.groups.max()) + 1].tolist()
        ):
            rows = [n for n in range(len(LAYOUT)) if budget.groups[head, n] == group]
            rows.sort(key=lambda n: sum(x * x for x in keys[head, n].tolist()))
            expected += rows[:count]
        assert index[head].tolist() == sorted(expected)


def test_ties_go_to_the_lower_index() -> None:
    assert Knorm(keep=2).select(context(torch.ones(2, 4, 3), grid(2, 2))).index.tolist() == [
        [0, 1],
        [0, 1],
    ]


def test_lengths_are_taken_in_full_precision() -> None:
    keys = torch.tensor([[[300.0, 0.0], [200.0, 200.0]]]).half()  # squares overflow in half
    assert Knorm(keep=1, per="item").select(context(keys, grid(1, 2))).index.tolist() == [[1]]


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("keep", [1.0, 100])
def test_all_stay(tokens: int, keep: Any) -> None:
    keys = torch.randn(2, tokens, 3)
    index = Knorm(keep=keep).select(context(keys, grid(1, tokens))).index
    assert index.tolist() == [list(range(tokens))] * 2


def test_heads_of_different_candidates_choose_among_their_own() -> None:
    rows = torch.tensor([[0, 1, 2], [3, 4, 5]])
    keys = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])[..., None]
    assert Knorm(keep=2).select(context(keys, rows=rows)).index.tolist() == [[1, 2], [0, 2]]


def test_a_budget_for_each_modality() -> None:
    stage = Knorm(keep={"audio": 0.4, "image": 1})
    index = stage.select(context(torch.ones(1, len(LAYOUT), 2))).index
    assert index.tolist() == [[0, *range(6, 18), 18, 19]]


def test_settings() -> None:
    assert Knorm().site == Cache() and Knorm(layers=3).site == Cache((3,))
    assert Knorm(layers=(1, 2)).site == Cache((1, 2))
    assert Knorm(on="audio").acts_on == {"audio"}
    assert not Knorm().text_dependent
    text = "knorm(keep=0.25 on=video layers=1/3)"
    assert str(Recipe.parse(text)) == text


@pytest.mark.parametrize("layers", [(), "all", (1.5,), True, (1, None)])
def test_layers_fail(layers: Any) -> None:
    with pytest.raises(RecipeError, match="layers must be decoder layers or none for all, got"):
        Knorm(layers=layers)
