"""FastV: the last token's attention to media decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.doubles import SHAPE, grid, input_context, join, sound
from tokenprune import prune
from tokenprune.core.layout import TokenLayout
from tokenprune.core.recipe import Recipe
from tokenprune.core.signal import Attention
from tokenprune.core.site import Layer
from tokenprune.errors import RecipeError
from tokenprune.methods.fastv import FastV
from tokenprune.testing.harness import model_of, prompt_of

LAYOUT = join(grid(1, 4), sound(3))


def context(attention: Tensor, stage: FastV, layout: TokenLayout = LAYOUT) -> Any:
    return input_context(layout, layer=stage.layer, signals={stage.needs[0]: attention})


def test_the_strongest_stay() -> None:
    stage = FastV(keep=3)
    attention = torch.tensor([0.1, 0.3, 0.0, 0.1, 0.2, 0.05, 0.1])
    selection = stage.select(context(attention, stage))
    assert selection.index.tolist() == [0, 1, 4]  # of equal ones the first
    assert selection.scores is attention


def test_each_item_has_its_own_budget() -> None:
    stage = FastV(keep=0.5, per="item")
    attention = torch.tensor([0.3, 0.4, 0.2, 0.1, 0.01, 0.03, 0.02])
    assert stage.select(context(attention, stage)).index.tolist() == [0, 1, 5, 6]


@pytest.mark.parametrize("keep", [1.0, 100])
def test_all_stay(keep: Any) -> None:
    stage = FastV(keep=keep)
    assert stage.select(context(torch.rand(7), stage)).index.tolist() == list(range(7))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen2_audio", "qwen3_vl"])
def test_scores_are_those_of_eager_attention(name: str) -> None:
    """Through grouped heads, M-RoPE and norms of queries and keys."""
    one = model_of(name, "eager")
    inputs = prompt_of(one)
    with torch.no_grad():
        weights = one.model(**inputs, output_attentions=True).attentions
        with prune(one.model, "fastv(keep=5)") as report:
            one.model(**inputs)
    [decision] = report.calls[0].decisions
    position = report.calls[0].layouts[0].position
    scores = weights[1][0, :, -1].mean(dim=0)[position]
    expected = position[scores.argsort(descending=True, stable=True)[:5]].sort().values
    assert decision.kept.tolist() == expected.tolist()


def test_rotation_counts() -> None:
    one = model_of("llava")
    kept = []
    for rotary in (True, False):
        with torch.no_grad(), prune(one.model, FastV(keep=5, rotary=rotary)) as report:
            one.model(**prompt_of(one))
        kept.append(report.calls[0].decisions[0].kept.tolist())
    assert kept[0] != kept[1]


def test_settings() -> None:
    stage = FastV(layer=3, rotary=False)
    assert stage.site == Layer(3) and stage.text_dependent
    signal = Attention(layer=-1, queries=1, rotary=False, reduce="mean", heads="mean")
    assert stage.needs == (signal,)
    text = "fastv(keep=0.25 per=frame layer=3 rotary=false)"
    assert str(Recipe.parse(text)) == text


@pytest.mark.parametrize("layer", [0, -1, True, 1.0, None])
def test_layer_fails(layer: Any) -> None:
    with pytest.raises(RecipeError, match="layer must be a number of decoder layers of at least 1"):
        FastV(layer=layer)


def test_a_layer_that_is_not_there_fails() -> None:
    with pytest.raises(RecipeError, match="fastv acts at layer 28, but the model has layers 0 to"):
        FastV(layer=28).check(SHAPE)


def test_rotary_fails() -> None:
    with pytest.raises(RecipeError, match="rotary must be true or false, got 0.5"):
        FastV(rotary=0.5)  # type: ignore[arg-type]
