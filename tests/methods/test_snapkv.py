"""SnapKV: what the end of the prompt attends to, smoothed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.doubles import cache_context, grid, join, sound
from tokenprune import prune
from tokenprune.core.layout import TokenLayout
from tokenprune.core.recipe import Recipe
from tokenprune.core.signal import Attention
from tokenprune.core.site import Cache
from tokenprune.errors import RecipeError
from tokenprune.methods.snapkv import SnapKV
from tokenprune.testing.harness import model_of, prompt_of
from tokenprune.testing.tiny import decoder_of

LAYOUT = join(grid(1, 4), sound(3), grid(1, 2))


def context(
    scores: Tensor, stage: SnapKV, layout: TokenLayout = LAYOUT, rows: Tensor | None = None
) -> Any:
    signals = {stage.needs[0]: scores}
    return cache_context(layout, heads=len(scores), rows=rows, signals=signals)


def plain_smooth(scores: list[float], kinds: list[int], kernel: int) -> list[float]:
    """The same as loops: each kind is a row of its own."""
    found = [0.0] * len(scores)
    for kind in set(kinds):
        own = [n for n, one in enumerate(kinds) if one == kind]
        for place, n in enumerate(own):
            near = own[max(0, place - kernel // 2) : place + kernel // 2 + 1]
            found[n] = sum(scores[m] for m in near) / len(near)
    return found


def test_scores_by_hand() -> None:
    """A peak lifts its neighbours, over a gap of text or sound, but no other modality."""
    stage = SnapKV(kernel=3, keep=2)
    scores = torch.tensor([[0.0, 0.0, 0.0, 6.0, 1.0, 0.0, 3.0, 0.0, 0.0]])
    selection = stage.select(context(scores, stage))
    assert selection.scores is not None
    expected = torch.tensor([0, 0, 2, 2, 0.5, 4 / 3, 1.5, 2, 0])
    torch.testing.assert_close(selection.scores[0], expected)
    assert selection.index.tolist() == [[2, 3]]  # of equal ones the first


@pytest.mark.parametrize("kernel", [1, 3, 5, 31])
def test_random_scores_match_loops(kernel: int) -> None:
    generator = torch.Generator().manual_seed(kernel)
    layout = join(grid(2, 3), sound(5), grid(2, 2, 2, video=True), sound(3), grid(1, 4))
    rows = torch.stack(
        [torch.randperm(len(layout), generator=generator)[:17].sort().values for _ in range(3)]
    )
    scores = torch.rand(3, 17, generator=generator)
    stage = SnapKV(kernel=kernel)
    found = stage.score(context(scores, stage, layout, rows))
    expected = [
        plain_smooth(own.tolist(), layout.modality[there].tolist(), kernel)
        for own, there in zip(scores, rows, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_kernel_of_one_changes_nothing() -> None:
    scores = torch.rand(2, len(LAYOUT))
    stage = SnapKV(kernel=1)
    assert torch.equal(stage.score(context(scores, stage)), scores)


def test_constant_scores_stay_constant_and_the_first_are_kept() -> None:
    stage = SnapKV(keep=3)
    selection = stage.select(context(torch.full((2, len(LAYOUT)), 0.25), stage))
    assert selection.index.tolist() == [[0, 1, 2]] * 2


def test_each_item_has_its_own_budget() -> None:
    stage = SnapKV(keep=1, per="item", kernel=1)
    scores = torch.arange(9.0)[None]
    assert stage.select(context(scores, stage)).index.tolist() == [[3, 6, 8]]


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("keep", [1.0, 100])
def test_all_stay(tokens: int, keep: Any) -> None:
    stage = SnapKV(keep=keep)
    index = stage.select(context(torch.rand(2, tokens), stage, grid(1, tokens))).index
    assert index.tolist() == [list(range(tokens))] * 2


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen2_audio", "qwen3_vl"])
@pytest.mark.parametrize("window", [4, 64])
def test_scores_are_those_of_eager_attention(name: str, window: int) -> None:
    """Of a window, and of the whole prompt where it is longer."""
    one = model_of(name, "eager")
    inputs = prompt_of(one)
    recipe = f"snapkv(keep=5 kernel=1 layers=2 window={window})"
    with torch.no_grad():
        weights = one.model(**inputs, output_attentions=True).attentions
        with prune(one.model, recipe) as report:
            one.model(**inputs)
    [decision] = report.calls[0].decisions
    position = report.calls[0].layouts[0].position
    heads = decoder_of(one.model).config.num_key_value_heads
    asked = weights[2][0, :, -window:].mean(dim=1).view(heads, -1, weights[2].shape[-1])
    scores = asked.mean(dim=1)[:, position]
    kept = scores.argsort(dim=-1, descending=True, stable=True)[:, :5]
    assert decision.kept.tolist() == position[kept].sort(dim=-1).values.tolist()


def test_settings() -> None:
    stage = SnapKV(window=32, layers=(0, 2))
    assert stage.site == Cache((0, 2)) and stage.text_dependent
    assert stage.needs == (Attention(queries=32, reduce="mean", heads="mean"),)
    assert SnapKV(window="text").needs[0].queries == "text"
    text = "snapkv(keep=0.25 on=audio layers=1/3 window=text kernel=7)"
    assert str(Recipe.parse(text)) == text


@pytest.mark.parametrize("window", [0, -1, True, 1.5, "all"])
def test_window_fails(window: Any) -> None:
    with pytest.raises(
        RecipeError, match='window must be a number of tokens of at least 1, or "te'
    ):
        SnapKV(window=window)


@pytest.mark.parametrize("kernel", [0, 2, -1, True, 3.0])
def test_kernel_fails(kernel: Any) -> None:
    with pytest.raises(RecipeError, match="kernel must be an odd number of neighbours, got"):
        SnapKV(kernel=kernel)
