"""DivPrune: tokens that are far from each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.doubles import grid, input_context, join, sound
from tokenprune.core.layout import TokenLayout
from tokenprune.core.recipe import Recipe
from tokenprune.core.signal import Hidden
from tokenprune.core.site import Input
from tokenprune.methods import divprune
from tokenprune.methods.divprune import DivPrune

LAYOUT = join(grid(2, 3), grid(2, 2, 3, video=True), sound(5))


def kept(features: Tensor, layout: TokenLayout | None = None, **settings: Any) -> list[int]:
    layout = grid(1, len(features)) if layout is None else layout
    context = input_context(layout, signals={Hidden(): features})
    return DivPrune(**settings).select(context).index.tolist()


def angles(*degrees: float) -> Tensor:
    """Points on the unit circle."""
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])


def plain(features: Tensor, count: int) -> list[int]:
    """The same as loops over a table of all distances."""
    unit = features.double() / features.double().norm(dim=-1, keepdim=True)
    distance = (1 - unit @ unit.T).tolist()
    every = range(len(features))
    nearest = [min([distance[i][j] for j in every if j != i], default=0.0) for i in every]
    picked = [max(every, key=lambda i: (nearest[i], -i))]
    while len(picked) < count:
        left = [i for i in every if i not in picked]
        picked.append(max(left, key=lambda i: (min(distance[i][j] for j in picked), -i)))
    return sorted(picked)


def test_picks_by_hand() -> None:
    points = angles(0, 10, 35, 90, 100, 170)
    # 170 is 70 degrees from its nearest; then 0 is 170 away; then 90, 80 from 170 (10 is nearer 0).
    assert kept(points, keep=1, per="item") == [5]
    assert kept(points, keep=2) == [0, 5]
    assert kept(points, keep=3) == [0, 3, 5]
    assert kept(points, keep=4) == [0, 2, 3, 5]


def test_only_directions_count() -> None:
    points = angles(0, 10, 35, 90, 100, 170)
    lengths = torch.tensor([1.0, 50.0, 0.01, 3.0, 7.0, 2.0])[:, None]
    assert kept(points * lengths, keep=3) == kept(points, keep=3)


@pytest.mark.parametrize("block", [1, 64, 1 << 22])
@pytest.mark.parametrize("count", [1, 2, 9, 36, 37])
def test_random_features_match_loops(
    count: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divprune, "_BLOCK_ELEMENTS", block)
    features = torch.randn(37, 5, generator=torch.Generator().manual_seed(count))
    assert kept(features, keep=count, per="item") == plain(features, count)


@pytest.mark.parametrize(("keep", "per"), [(0.4, "item"), (2, "frame"), (1, "second")])
def test_groups_are_problems_of_their_own(keep: Any, per: Any) -> None:
    features = torch.randn(len(LAYOUT), 4, generator=torch.Generator().manual_seed(0))
    groups = LAYOUT.groups(per)
    expected = []
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero()[:, 0]
        count = min(keep, len(rows)) if isinstance(keep, int) else round(keep * len(rows) + 1e-9)
        expected += rows[plain(features[rows], count)].tolist()
    assert kept(features, LAYOUT, keep=keep, per=per) == sorted(expected)


def test_a_budget_for_each_modality() -> None:
    features = torch.randn(len(LAYOUT), 4, generator=torch.Generator().manual_seed(1))
    found = kept(features, LAYOUT, keep={"audio": 2, "image": 0.5})
    assert found[:3] == plain(features[:6], 3)
    assert found[3:-2] == list(range(6, 18))
    assert found[-2:] == [18 + n for n in plain(features[18:], 2)]


def test_duplicates_come_last() -> None:
    points = angles(0, 0, 0, 40, 40, 90)
    assert kept(points, keep=3) == [0, 3, 5]
    assert kept(points, keep=4) == [0, 1, 3, 5]


@pytest.mark.parametrize("value", [0.0, 2.5, math.nan, math.inf])
def test_constant_features_keep_the_first(value: float) -> None:
    assert kept(torch.full((6, 3), value), keep=4) == [0, 1, 2, 3]


def test_a_token_of_nan_is_picked_once() -> None:
    points = angles(0, 5, 10, 15)
    points[2] = math.nan
    found = kept(points, keep=3)
    assert 2 in found and len(set(found)) == 3


def test_half_precision_is_compared_in_full() -> None:
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert kept(features, keep=9) == plain(features, 9)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("keep", [1.0, 100])
def test_all_stay(tokens: int, keep: Any) -> None:
    assert kept(torch.randn(tokens, 3), keep=keep) == list(range(tokens))


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_counts_are_exact(tokens: int) -> None:
    for count in {1, max(1, tokens - 1), tokens}:
        found = kept(torch.randn(tokens, 3), keep=count, per="item")
        assert len(set(found)) == count


def test_no_table_of_all_pairs_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divprune, "_BLOCK_ELEMENTS", 1000)
    sizes = []
    times = Tensor.__matmul__

    def watched(one: Tensor, other: Tensor) -> Tensor:
        found = times(one, other)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    kept(torch.randn(200, 4), keep=20)
    assert max(sizes) <= 1000


def test_settings() -> None:
    stage = DivPrune()
    assert stage.keep == 0.098 and stage.site == Input()
    assert stage.needs == () and not stage.text_dependent
    text = "divprune(keep=0.25 on=image per=frame)"
    assert str(Recipe.parse(text)) == text
