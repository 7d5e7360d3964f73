"""PyramidDrop: fewer tokens from layer to layer."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.methods.doubles import SHAPE, candidates, grid, input_context, join, sound
from tokenprune import prune
from tokenprune.core.recipe import Recipe
from tokenprune.core.signal import Attention
from tokenprune.core.site import Layer
from tokenprune.errors import RecipeError
from tokenprune.methods.pyramiddrop import PyramidDrop, mean_share, solve_ratio
from tokenprune.testing.harness import model_of, prompt_of

LAYOUT = join(grid(4, 4), sound(8))
ATTENTION = Attention(layer=0, queries=1, reduce="mean", heads="mean")


def stages(depth: int = 28, **settings: Any) -> list[Any]:
    return list(PyramidDrop(**settings).stages(replace(SHAPE, layers=depth)))


def test_the_schedule_of_the_paper() -> None:
    assert PyramidDrop().schedule(32) == {8: 0.5, 16: 0.25, 24: 0.125}
    assert [stage.site for stage in stages(32)] == [Layer(8), Layer(16), Layer(24)]
    assert mean_share((0.5, 0.25, 0.125), (8, 16, 24), 32) == 0.46875


@pytest.mark.parametrize("depth", [4, 5, 24, 27, 28, 32, 80])
@pytest.mark.parametrize("keep", [0.35, 0.46875, 0.7, 0.999])
def test_shares_meet_the_mean_and_fall_by_one_ratio(keep: float, depth: int) -> None:
    schedule = PyramidDrop(keep=keep).schedule(depth)
    layers, shares = tuple(schedule), tuple(schedule.values())
    assert mean_share(shares, layers, depth) == pytest.approx(keep)
    assert shares[1] / shares[0] == pytest.approx(shares[0])
    assert shares[2] / shares[1] == pytest.approx(shares[0])
    seen = [1.0] * depth  # what each layer sees, as a loop
    for layer, share in schedule.items():
        seen[layer:] = [share] * (depth - layer)
    assert sum(seen) / depth == pytest.approx(keep)


def test_the_mean_of_the_paper_gives_its_shares() -> None:
    assert solve_ratio(0.46875, (8, 16, 24), 32) == pytest.approx(0.5)
    assert PyramidDrop(keep=0.46875).schedule(28) == pytest.approx(PyramidDrop().schedule(28))


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (5, [1, 2, 3])]
)
def test_shallow_models(depth: int, layers: list[int]) -> None:
    schedule = PyramidDrop(keep=0.4).schedule(depth)
    assert list(schedule) == layers
    assert mean_share(tuple(schedule.values()), layers, depth) == pytest.approx(0.4)


def test_all_stay() -> None:
    assert stages(keep=1.0) == []
    assert stages(layers=(3, 4), shares=(1.0, 1.0)) == []


def test_counts_are_of_the_original_prompt() -> None:
    rows = torch.arange(24)
    context = None
    for stage, count in zip(stages(), (12, 6, 3), strict=True):
        attention = torch.arange(24.0)[rows]
        context = input_context(
            LAYOUT, rows=rows, layer=stage.layer, signals={ATTENTION: attention}
        )
        assert stage.budget(context).total == count and stage.budget(context).exact
        rows = rows[stage.select(context).index]
        assert rows.tolist() == list(range(24 - count, 24))


def test_counts_are_of_each_group_and_of_what_is_acted_on() -> None:
    first, second, _ = stages(per="item")
    assert first.budget(candidates(LAYOUT, layer=7)).counts.tolist() == [8, 4]
    assert second.budget(candidates(LAYOUT, torch.arange(0, 24, 2), layer=14)).counts.tolist() == [
        4,
        2,
    ]
    sounds = torch.arange(16, 24)
    [stage] = stages(layers=3, shares=0.25, on="audio")
    assert stage.budget(candidates(LAYOUT, sounds, layer=3)).counts.tolist() == [2]
    [stage] = stages(layers=3, shares=0.25, on="audio", per="item")
    assert stage.budget(candidates(LAYOUT, sounds, layer=3)).counts.tolist() == [0, 2]


def test_where_fewer_are_left_all_stay() -> None:
    first, _, third = stages(per="item")
    left = torch.tensor([3, 20])  # an item's one token of 16 and 8
    assert first.budget(candidates(LAYOUT, left, layer=7)).counts.tolist() == [1, 1]
    assert third.budget(candidates(LAYOUT, left[:1], layer=21)).counts.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen2_audio"])
def test_the_first_drop_is_that_of_eager_attention(name: str) -> None:
    one = model_of(name, "eager")
    inputs = prompt_of(one)
    with torch.no_grad():
        weights = one.model(**inputs, output_attentions=True).attentions
        with prune(one.model, "pyramiddrop") as report:
            one.model(**inputs)
    first, *others = report.calls[0].decisions
    position = report.calls[0].layouts[0].position
    total = len(position)
    scores = weights[1][0, :, -1].mean(dim=0)[position]  # of five layers, before layer 1
    order = scores.argsort(descending=True, stable=True)
    count = int(total * 0.5 + 0.5)
    assert first.kept.tolist() == position[order[:count]].sort().values.tolist()
    assert [len(one.kept) for one in others] == [int(total / n + 0.5) for n in (4, 8)]


def test_settings() -> None:
    assert PyramidDrop().text_dependent
    assert PyramidDrop(layers=3, shares=0.5).schedule(5) == {3: 0.5}
    assert PyramidDrop(layers=(1, 2, 3, 4)).schedule(5) == {1: 0.5, 2: 0.25, 3: 0.125, 4: 0.0625}
    for text in (
        "pyramiddrop(keep=0.4 layers=2/9 per=item on=video)",
        "pyramiddrop(keep=none layers=2/9 shares=0.5/0.1)",
    ):
        assert str(Recipe.parse(text)) == text


@pytest.mark.parametrize("keep", [0, 0.0, 1, 1.5, -0.1, True, "half"])
def test_keep_fails(keep: Any) -> None:
    with pytest.raises(RecipeError, match=r"keep must be a share in \(0, 1\], got"):
        PyramidDrop(keep=keep)


@pytest.mark.parametrize("layers", [(), (3, 2), (2, 2), -1, (1, 2.0), True])
def test_layers_fail(layers: Any) -> None:
    with pytest.raises(RecipeError, match="layers must be decoder layers that increase, got"):
        PyramidDrop(layers=layers)


@pytest.mark.parametrize("shares", [(0.5, 0.6, 0.1), (0.5, 0.1, 0.0), (1.5, 1, 1), ("a", 1, 1)])
def test_shares_fail(shares: Any) -> None:
    with pytest.raises(RecipeError, match=re.escape("shares must be in (0, 1] and may not grow")):
        PyramidDrop(shares=shares)


def test_as_many_shares_as_layers() -> None:
    with pytest.raises(RecipeError, match="shares must be 2, one for each layer, got 0.5"):
        PyramidDrop(layers=(1, 2), shares=0.5)
    with pytest.raises(RecipeError, match="shares must be 3, one for each layer"):
        PyramidDrop(shares=(0.5, 0.2))


def test_what_cannot_be_met_fails() -> None:
    with pytest.raises(RecipeError, match="keep and shares both say how much is kept"):
        PyramidDrop(keep=0.5, shares=(0.5, 0.2, 0.1))
    with pytest.raises(
        RecipeError, match="until layer 7 of 28, so keep must be above 0.25, got 0.2"
    ):
        PyramidDrop(keep=0.2).stages(SHAPE)
    with pytest.raises(RecipeError, match="acts at layer 28, but the model has layers 0 to 27"):
        PyramidDrop(layers=28).stages(SHAPE)
    with pytest.raises(RecipeError, match="per must be one of prompt, item, frame, second, got"):
        PyramidDrop(per="clip")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="on must name some of"):
        PyramidDrop(on="text")  # type: ignore[arg-type]
