"""Random and uniform tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.methods.doubles import cache_context, candidates, grid, input_context, join, sound
from tokenprune.core.layout import MODALITIES, TokenLayout
from tokenprune.core.site import Cache, Input, Layer
from tokenprune.errors import RecipeError
from tokenprune.methods.baselines import Random, Uniform

LAYOUT = join(grid(2, 3), grid(3, 3, 4, video=True), sound(10))
BUDGETS = [(0.3, "prompt"), (5, "prompt"), (0.5, "item"), (1, "frame"), (2, "second")]


def context(at: str | int, layout: TokenLayout = LAYOUT, layer: int = 0, heads: int = 2) -> Any:
    if at == "cache":
        return cache_context(layout, layer=layer, heads=heads)
    return input_context(layout) if at == "input" else input_context(layout, layer=at)


def plain_count(keep: float, size: int) -> int:
    return min(keep, size) if isinstance(keep, int) else max(1, int(keep * size + 0.5))


@pytest.mark.parametrize("method", [Random, Uniform])
@pytest.mark.parametrize("at", ["input", "cache", 3])
@pytest.mark.parametrize(("keep", "per"), BUDGETS)
def test_baselines_keep_exactly_what_they_say(method: Any, at: Any, keep: Any, per: Any) -> None:
    stage = method(keep=keep, at=at, per=per)
    groups = LAYOUT.groups(per)
    index = stage.select(context(at)).index
    for head in index.view(-1, index.shape[-1]):
        assert (head.diff() > 0).all()
        for group in range(int(groups.max()) + 1):
            size = int((groups == group).sum())
            assert int((groups[head] == group).sum()) == plain_count(keep, size)
    assert stage.budget(candidates(LAYOUT)).total == index.shape[-1]


@pytest.mark.parametrize("method", [Random, Uniform])
@pytest.mark.parametrize("at", ["input", "cache", 3])
@pytest.mark.parametrize("keep", [1.0, 1000])
def test_baselines_keep_all(method: Any, at: Any, keep: Any) -> None:
    stage = method(keep=keep, at=at)
    assert stage.budget(candidates(LAYOUT)).total == len(LAYOUT)
    index = stage.select(context(at)).index
    assert torch.equal(index, torch.arange(len(LAYOUT)).expand_as(index))


@pytest.mark.parametrize("method", [Random, Uniform])
def test_baselines_sites(method: Any) -> None:
    assert method(at="input").site == Input()
    assert method(at="cache").site == Cache()
    assert method(at=0).site == Layer(0)


def test_random_depends_on_seed_and_layer_only() -> None:
    stage = Random(keep=0.5, at="cache")
    first = stage.select(context("cache", layer=1)).index
    torch.rand(10)  # global random state plays no part
    assert torch.equal(first, stage.select(context("cache", layer=1)).index)
    assert not torch.equal(first, stage.select(context("cache", layer=2)).index)
    assert not torch.equal(
        first, Random(at="cache", seed=1).select(context("cache", layer=1)).index
    )
    assert not torch.equal(first[0], first[1])  # heads choose on their own


def test_random_leaves_global_state_alone() -> None:
    before = torch.get_rng_state()
    Random().select(context("input"))
    assert torch.equal(before, torch.get_rng_state())


def test_random_budgets_nest() -> None:
    kept = [set(Random(keep=k).select(context("input")).index.tolist()) for k in (0.1, 0.3, 0.9)]
    assert kept[0] < kept[1] < kept[2]


def test_random_is_unbiased() -> None:
    layout = grid(4, 4)
    times = torch.zeros(16)
    for seed in range(400):
        times[Random(keep=4, seed=seed).select(context("input", layout)).index] += 1
    assert times.sum() == 1600
    assert (times - 100).abs().max() < 45  # five standard deviations


def test_random_after_a_cache_stage_keeps_as_many_in_every_head() -> None:
    layout = grid(1, 4, 3, video=True)
    rows = torch.tensor([[0, 1, 2, 3, 4, 8], [0, 4, 5, 8, 9, 10]])
    stage = Random(keep=0.5, at="cache", per="frame")
    index = stage.select(cache_context(layout, rows=rows)).index
    assert index.shape == (2, stage.budget(candidates(layout, rows[:1])).total)


def test_uniform_is_the_same_in_every_head() -> None:
    index = Uniform(at="cache").select(context("cache", heads=4)).index
    assert (index == index[0]).all()


def test_uniform_spreads_over_each_frame() -> None:
    layout = grid(2, 2, 2, video=True)
    assert Uniform(keep=2, per="frame").select(context("input", layout)).index.tolist() == [
        1, 3, 5, 7
    ]  # fmt: skip


@pytest.mark.parametrize("method", [Random, Uniform])
@pytest.mark.parametrize("at", ["output", -1, True, 1.0])
def test_baselines_at_fails(method: Any, at: Any) -> None:
    with pytest.raises(RecipeError, match='at must be "input", "cache" or a decoder layer, got'):
        method(at=at)


@pytest.mark.parametrize("method", [Random, Uniform])
def test_baselines_fail(method: Any) -> None:
    with pytest.raises(RecipeError, match="write keep=1.0 to keep all"):
        method(keep=1)
    with pytest.raises(RecipeError, match="per must be one of prompt, item, frame, second"):
        method(per="hour")
    with pytest.raises(RecipeError, match="on must name some of image, video, audio, got 'sound'"):
        method(on="sound")
    with pytest.raises(RecipeError, match=r"keep\.audio must be a share in .* got 1.5"):
        method(keep={"audio": 1.5})


@pytest.mark.parametrize("method", [Random, Uniform])
@pytest.mark.parametrize("at", ["input", "cache", 3])
def test_baselines_keep_a_share_of_each_modality(method: Any, at: Any) -> None:
    stage = method(keep={"audio": 0.5, "video": 7}, at=at)
    index = stage.select(context(at)).index
    for head in index.view(-1, index.shape[-1]):
        kinds = LAYOUT.modality[head]
        kept = [int((kinds == MODALITIES[name]).sum()) for name in ("image", "video", "audio")]
        assert kept == [6, 7, 5]  # pictures have no budget: all stay


@pytest.mark.parametrize("method", [Random, Uniform])
def test_baselines_act_on_what_they_are_told(method: Any) -> None:
    assert method().acts_on == set(MODALITIES)
    assert method(on="audio").acts_on == {"audio"}
    assert method(on=("video", "image")).acts_on == {"image", "video"}


def test_random_fails() -> None:
    with pytest.raises(RecipeError, match="seed must be a whole number, got 0.5"):
        Random(seed=0.5)  # type: ignore[arg-type]
