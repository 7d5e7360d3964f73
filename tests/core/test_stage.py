"""The bases that methods are written on, and what a context gives them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.methods.doubles import (
    SHAPE,
    State,
    cache_context,
    candidates,
    grid,
    input_context,
    join,
    sound,
)
from tokenprune.core.budget import Budget, allocate
from tokenprune.core.context import Context
from tokenprune.core.layout import AUDIO, Modality
from tokenprune.core.selection import Selection
from tokenprune.core.selectors import top_per_group
from tokenprune.core.signal import Attention, Hidden, Keys, Values
from tokenprune.core.site import Cache, Input, Layer, Site
from tokenprune.core.stage import Budgeted, Scored, Stage
from tokenprune.errors import RecipeError

LAYOUT = join(grid(2, 3), grid(2, 2, 3, video=True), sound(10))


@dataclass(frozen=True, kw_only=True)
class Highest(Scored, Budgeted):
    """Keeps the highest features, or keys."""

    at: Site = Input()

    name = "highest"

    @property
    def site(self) -> Site:
        return self.at

    def score(self, context: Context) -> Tensor:
        seen = context.keys if isinstance(self.at, Cache) else context.features
        return seen.sum(dim=-1)


@dataclass(frozen=True)
class Bare(Stage):
    """Has nothing but what it must have."""

    name = "bare"
    site = Input()

    def select(self, context: Context) -> Selection:
        return Selection(torch.arange(len(context)))


@pytest.mark.parametrize("per", ["prompt", "item", "frame", "second"])
@pytest.mark.parametrize("keep", [0.3, 2, {"video": 0.5}])
@pytest.mark.parametrize("at", [Input(), Layer(3)])
def test_scored_stages_keep_the_highest_of_each_group(at, keep, per):
    stage = Highest(keep=keep, per=per, at=at)
    features = torch.randn(len(LAYOUT), 4)
    context = input_context(LAYOUT, signals={Hidden(): features})
    selection = stage.select(context)
    budget = allocate(stage.keep, per, candidates(LAYOUT))
    assert torch.equal(selection.index, top_per_group(features.sum(dim=-1), budget))
    assert selection.scores is not None and torch.equal(selection.scores, features.sum(dim=-1))
    assert stage.budget(context).total == len(selection.index)


def test_scored_stages_let_each_head_choose():
    keys = torch.randn(2, len(LAYOUT), 4)
    context = cache_context(LAYOUT, signals={Keys(): keys})
    index = Highest(keep=5, at=Cache()).select(context).index
    for head in range(2):
        assert index[head].tolist() == sorted(keys[head].sum(dim=-1).topk(5).indices.tolist())


def test_a_bare_stage_is_adaptive_and_looks_at_nothing():
    stage = Bare()
    assert stage.needs == () and not stage.text_dependent
    assert stage.acts_on == stage.modalities == {"image", "video", "audio"}
    budget = stage.budget(candidates(LAYOUT))
    assert (budget.least, budget.total, budget.most) == (0, len(LAYOUT), len(LAYOUT))
    assert stage.stages(SHAPE) == (stage,)
    with pytest.raises(NotImplementedError, match="Bare reads queries of its own and names none"):
        stage.queries(candidates(LAYOUT))


def test_stages_act_on_what_they_can_look_at_and_are_told_to():
    class Sees(Highest):
        modalities = frozenset[Modality]({"image", "video"})

    assert Highest().acts_on == {"image", "video", "audio"}
    assert Sees().acts_on == {"image", "video"}
    assert Sees(on="video").acts_on == {"video"}
    assert Sees(on=("audio", "image")).acts_on == {"image"}
    assert Sees(on="audio").acts_on == frozenset()


@pytest.mark.parametrize(
    ("site", "wrong"), [(Layer(28), 28), (Layer(-1), -1), (Cache((2, 30)), 30), (Cache((-1,)), -1)]
)
def test_layers_that_the_model_lacks_fail(site, wrong):
    error = f"highest acts at layer {wrong}, but the model has layers 0 to 27; choose one of these"
    with pytest.raises(RecipeError, match=error):
        Highest(at=site).check(SHAPE)
    for fine in (Input(), Layer(27), Cache(), Cache((0, 27))):
        Highest(at=fine).check(SHAPE)


# -- contexts


def test_contexts_are_candidates_with_signals():
    rows = torch.tensor([1, 7, 20])
    context = input_context(LAYOUT, rows=rows, layer=4)
    assert (len(context), context.layer) == (3, 4)
    assert context.layout is LAYOUT
    assert torch.equal(context.features, context[Hidden()])
    assert context.features[:, 0].tolist() == rows.tolist()
    assert torch.equal(context.tokens.modality, LAYOUT.modality[rows])
    assert context.tokens.modality[-1] == AUDIO
    with pytest.raises(KeyError):  # as nothing of it was collected
        context.keys  # noqa: B018


def test_contexts_of_caches_have_keys_and_values():
    values = torch.randn(2, len(LAYOUT), 2)
    context = cache_context(LAYOUT, signals={Values(): values}, layer=0)
    assert context.layer == 0 and len(context) == len(LAYOUT)
    assert torch.equal(context.values, values)
    assert context.keys.shape == (2, len(LAYOUT), 2)


def test_scores_of_query_heads_are_averaged_for_their_key_value_head():
    attention = torch.rand(6, len(LAYOUT))
    context = cache_context(LAYOUT, attention, heads=2)
    scores = context.by_kv_head(context[Attention()])
    assert scores.shape == (2, 1, len(LAYOUT))
    torch.testing.assert_close(scores[0, 0], attention[:3].mean(dim=0))
    torch.testing.assert_close(scores[1, 0], attention[3:].mean(dim=0))


def test_state_is_made_once_and_shared():
    class Seen(Counter[str]):
        pass

    state: State = {}
    first, later = (input_context(LAYOUT, layer=layer, state=state) for layer in (0, 3))
    first.state(Seen)["layers"] += 1
    assert later.state(Seen) is first.state(Seen)
    assert later.state(Seen) == {"layers": 1} and list(state) == [Seen]
    assert input_context(LAYOUT).state(Seen) == {}


def test_budgets_of_stages_follow_the_candidates():
    stage = Highest(keep=0.5, per="item", on="video")
    rows = torch.arange(6, 18)
    budget: Budget = stage.budget(candidates(LAYOUT, rows))
    assert budget.total == 6 and budget.exact
