"""`prune` itself: what it refuses, what it undoes, and what it remembers."""

from __future__ import annotations

import functools
import gc
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenprune import Recipe, Selection, TokenPruneError, prune
from tokenprune.adapters.base import adapter_for
from tokenprune.core.budget import Budget
from tokenprune.core.site import (
    Cache,
    Input,
    Layer,
    Site,
)
from tokenprune.core.stage import Stage
from tokenprune.engine.cache import CACHE_NAME
from tokenprune.errors import RecipeError, UnsupportedModelError
from tokenprune.methods.baselines import Random, Uniform
from tokenprune.methods.vflowopt import VFlowOpt
from tokenprune.testing.tiny import Tiny, build, decoder_of

ALL_SITES = "vflowopt(keep=0.5) + random(keep=0.5 at=3) + plphp(keep=0.5)"


@cache
def model_of(name: str) -> Tiny:
    return build(name)


def generate(tiny: Tiny, tokens: int = 3, **more: Any) -> torch.Tensor:
    inputs = {**tiny.inputs(), **more}
    return tiny.model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, suppress_tokens=tiny.suppress
    )


def traces(tiny: Tiny) -> dict[str, Any]:
    """What a patch changes while it is on."""
    modules = dict(tiny.model.named_modules())
    return {
        "hooks": {
            name: (len(one._forward_hooks), len(one._forward_pre_hooks))
            for name, one in modules.items()
        },
        "attributes": {name: sorted(vars(one)) for name, one in modules.items()},
        "attention": {
            name: one.config._attn_implementation
            for name, one in modules.items()
            if hasattr(one, "config")
        },
        "registries": (sorted(ALL_ATTENTION_FUNCTIONS), sorted(ALL_MASK_ATTENTION_FUNCTIONS)),
    }


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen2_audio"])
def test_all_is_undone(name):
    tiny = model_of(name)
    recipe = ALL_SITES if name != "qwen2_audio" else "random(at=3) + plphp"
    generate(tiny)  # what any run leaves behind
    before, expected = traces(tiny), generate(tiny)
    with prune(tiny.model, recipe):
        assert traces(tiny) != before
        generate(tiny)
    assert traces(tiny) == before
    assert torch.equal(generate(tiny), expected)


def test_all_is_undone_after_an_error():
    tiny = model_of("llava")
    generate(tiny)
    before = traces(tiny)
    with pytest.raises(KeyError), prune(tiny.model, ALL_SITES):
        generate(tiny)
        raise KeyError
    assert traces(tiny) == before
    with prune(tiny.model, ALL_SITES):
        generate(tiny)


def test_all_is_undone_after_an_error_on_the_way_in():
    tiny = build("llava")  # one of its own: what is left behind would fail other tests
    before = traces(tiny)

    def fail(*args, **kwargs):
        raise KeyError

    layer = decoder_of(tiny.model).layers[-1]
    layer.register_forward_hook = fail
    with pytest.raises(KeyError), prune(tiny.model, ALL_SITES):
        pass
    del layer.register_forward_hook
    assert traces(tiny) == before
    with prune(tiny.model, ALL_SITES):
        generate(tiny)


def test_decorations_of_others_stay():
    tiny = model_of("llava")
    base = tiny.model.model
    calls = []
    original = base.get_image_features

    @functools.wraps(original)
    def watched(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    base.get_image_features = watched
    try:
        with prune(tiny.model, "random"):
            generate(tiny)
        assert base.get_image_features is watched and calls == [1]
    finally:
        del base.get_image_features


def test_a_model_is_pruned_once_at_a_time():
    tiny = model_of("llava")
    with prune(tiny.model, "random(keep=0.5)") as report:
        with pytest.raises(UnsupportedModelError, match="put all methods into one recipe"):
            with prune(tiny.model, "uniform"):
                pass
        generate(tiny)  # the outer one still works
    assert report.media_tokens.after == 16
    with prune(tiny.model, "uniform(keep=0.25)") as report:
        generate(tiny)
    assert report.media_tokens.after == 8


def test_models_do_not_know_of_each_other():
    first, second = model_of("llava"), model_of("qwen2_vl")
    plain = generate(second)
    with prune(first.model, "random(keep=0.5)") as one:
        assert torch.equal(generate(second), plain)
        with prune(second.model, "random(keep=0.25)") as other:
            generate(first)
            generate(second)
        assert torch.equal(generate(second), plain)
        generate(first)
    assert len(one.calls) == 2 and len(other.calls) == 1
    assert one.recipe == "random(keep=0.5)" and other.recipe == "random(keep=0.25)"


def test_methods_recipes_and_texts_may_be_mixed():
    tiny = model_of("llava")
    with prune(tiny.model, Random(keep=0.5), Recipe("uniform(at=2)"), "plphp") as report:
        pass
    assert report.recipe == str(Recipe(Random(keep=0.5), Uniform(at=2), "plphp"))
    with prune(tiny.model, VFlowOpt(keep=0.5)) as report:
        generate(tiny)
    assert report.media_tokens.after == 16


@pytest.mark.parametrize("positions", ["bad", "", None, 3])
def test_unknown_positions_fail(positions):
    with pytest.raises(RecipeError, match="must be 'original' or 'compact', got"):
        with prune(model_of("llava").model, "random", positions=positions):
            pass


def test_compact_positions_of_three_dimensions_fail():
    before = traces(model_of("qwen2_vl"))
    with pytest.raises(RecipeError, match="qwen2_vl counts time, row and column; use"):
        with prune(model_of("qwen2_vl").model, "random", positions="compact"):
            pass
    assert traces(model_of("qwen2_vl")) == before


def test_other_models_fail():
    with pytest.raises(UnsupportedModelError, match="no adapter for model_type None; known: "):
        with prune(torch.nn.Linear(2, 2), "random"):
            pass


@pytest.mark.parametrize(
    "name, recipe, error",
    [
        ("llava", "random(at=5)", "layers 0 to 4"),
        ("qwen2_audio", "vflowopt(keep=0.5)", "qwen2_audio has only audio tokens"),
        ("llava", "random(on=audio)", "random prunes audio tokens, but llava has only image"),
        ("qwen2_audio", "plphp(on=image/video)", "plphp prunes image and video tokens, but qwen2_"),
        ("llava", "vflowopt(keep=0.5 on=audio)", "vflowopt prunes no tokens, but llava has only"),
        ("llava", 3, "made of methods, recipes and texts, got 3"),
    ],
)
def test_recipes_that_do_not_fit_fail_and_leave_the_model_alone(name, recipe, error):
    tiny = model_of(name)
    before = traces(tiny)
    with pytest.raises(TokenPruneError, match=error):
        with prune(tiny.model, recipe):
            pass
    assert traces(tiny) == before


def test_a_method_may_stand_in_a_recipe_twice():
    tiny = model_of("llava")
    with prune(tiny.model, VFlowOpt(keep=0.6, t=2.0), VFlowOpt(keep=0.5)) as report:
        generate(tiny)
    first, *more = report.last.decisions
    with prune(tiny.model, VFlowOpt(keep=0.6, t=2.0)) as alone:
        generate(tiny)
    assert torch.equal(first.kept, alone.last.decisions[0].kept)
    # The second looks at its own map, of what the first has left.
    assert {one.step for one in more} == {0, 1}
    second = next(one for one in more if one.step == 1)
    assert second.candidates == len(first.kept) > len(second.kept)


def test_entropy_of_a_model_that_shows_no_pixels_fails(monkeypatch):
    tiny = model_of("llava")
    monkeypatch.setattr(type(adapter_for(tiny.model)), "grey", lambda *_: None)
    before = traces(tiny)
    with prune(tiny.model, "vflowopt(keep=0.5 alpha=0.5)"):
        with pytest.raises(RecipeError, match="llava does not give the pixels below its tokens; s"):
            generate(tiny)
    assert traces(tiny) == before
    with prune(tiny.model, "vflowopt(keep=0.5)"):
        generate(tiny)


# -- stages that lie


@dataclass(frozen=True)
class Liar(Stage):
    """Promises a count, or bounds, and selects what it is told to."""

    index: tuple[int, ...] | tuple[tuple[int, ...], ...] = (0,)
    promise: int | tuple[int, int] | None = None
    at: Site = Input()

    name = "liar"

    @property
    def site(self) -> Site:
        return self.at

    def budget(self, candidates):
        if self.promise is None:
            return super().budget(candidates)
        least, most = (
            (self.promise, self.promise) if isinstance(self.promise, int) else self.promise
        )
        counts = torch.tensor([least])
        return Budget.of(torch.zeros_like(candidates.rows), counts, least=least, most=most)

    def select(self, context):
        return Selection(torch.tensor(self.index, dtype=torch.int64))


@pytest.mark.parametrize("site", [Input(), Layer(2), Cache()])
def test_a_stage_is_held_to_its_promise(site):
    tiny = model_of("llava")
    with prune(tiny.model, Liar(index=(0, 3), promise=2, at=site)) as report:
        generate(tiny)
    assert all(decision.kept.shape[-1] == 2 for decision in report.last.decisions)
    before = traces(tiny)
    with prune(tiny.model, Liar(index=(0, 3), promise=3, at=site)) as report:
        with pytest.raises(RecipeError, match="promised to keep 3 of 32 tokens and kept 2"):
            generate(tiny)
        assert report.calls == []
    assert traces(tiny) == before


@pytest.mark.parametrize("site", [Input(), Layer(2), Cache()])
def test_a_stage_is_held_to_its_bounds(site):
    tiny = model_of("llava")
    for bounds in ((0, 2), (2, 2), (1, 32)):
        with prune(tiny.model, Liar(index=(0, 3), promise=bounds, at=site)) as report:
            generate(tiny)
        assert all(decision.kept.shape[-1] == 2 for decision in report.last.decisions)
    for bounds in ((3, 9), (0, 1)):
        with prune(tiny.model, Liar(index=(0, 3), promise=bounds, at=site)) as report:
            error = f"liar promised to keep {bounds[0]} to {bounds[1]} of 32 tokens and kept 2"
            with pytest.raises(RecipeError, match=error):
                generate(tiny)
            assert report.calls == []


@pytest.mark.parametrize("site", [Input(), Layer(0), Layer(2), Cache()])
@pytest.mark.parametrize("promise", [None, 0, (0, 3)])
def test_a_stage_may_keep_nothing(site, promise):
    tiny = model_of("llava")
    with prune(tiny.model, Liar(index=(), promise=promise, at=site)) as report:
        output = generate(tiny)
    assert output.shape[1] == tiny.inputs()["input_ids"].shape[1] + 3
    assert report.media_tokens.per_site == {site: 0.0}
    assert report.media_tokens.before == 32
    assert all(decision.kept.shape[-1] == 0 for decision in report.last.decisions)
    text = tiny.inputs()["input_ids"].shape[1] - 32
    layers = adapter_for(tiny.model).shape.layers
    whole = text + 32
    full = site.index if isinstance(site, Layer) else 0
    assert report.media_tokens.after == round(32 * full / layers)
    stored = full * whole + (layers - full) * text
    assert report.kv_bytes.after * layers * whole == report.kv_bytes.before * stored


@pytest.mark.parametrize("site", [Input(), Layer(2), Cache()])
def test_a_stage_must_not_keep_more_than_there_is(site):
    tiny = model_of("llava")
    with prune(tiny.model, Liar(index=(0,) * 33, at=site)):
        with pytest.raises(RecipeError, match=r"must keep 0 to 32 tokens, .*; got \(33,\)"):
            generate(tiny)


@pytest.mark.parametrize("site", [Input(), Layer(2), Cache()])
def test_heads_choose_for_themselves_at_caches_alone(site):
    tiny = model_of("llava")
    heads = adapter_for(tiny.model).shape.kv_heads
    form = rf"\[K\] or \[{heads}, K\]" if site == Cache() else r"\[K\]"
    with prune(tiny.model, Liar(index=((0, 1),) * (heads + 1), at=site)):
        with pytest.raises(RecipeError, match=f"must keep 0 to 32 tokens, {form}; got "):
            generate(tiny)
    with prune(tiny.model, Liar(index=((0, 1),) * heads, at=site)):
        if site == Cache():
            generate(tiny)
        else:
            with pytest.raises(RecipeError, match="must keep 0 to 32 tokens"):
                generate(tiny)


def test_a_stage_that_is_known_to_keep_all_is_not_asked():
    tiny = model_of("llava")
    with prune(tiny.model, Liar(index=(), promise=32)) as report:
        generate(tiny)
    (decision,) = report.last.decisions
    assert torch.equal(decision.kept, report.last.layouts[0].position)


# -- caches


@pytest.mark.parametrize("kind", ["object", "name"])
def test_a_static_cache_fails_before_any_work(kind):
    tiny = model_of("llava")
    expected = generate(tiny)
    if kind == "object":
        more = {CACHE_NAME: StaticCache(tiny.model.config, max_cache_len=80)}
    else:
        more = {"cache_implementation": "static"}
    with prune(tiny.model, "random") as report:
        with pytest.raises(UnsupportedModelError, match="pruning needs a DynamicCache; drop"):
            generate(tiny, **more)
        assert report.calls == []
    assert torch.equal(generate(tiny), expected)


def test_a_pruned_cache_is_of_no_use_outside():
    tiny = model_of("llava")
    inputs = tiny.inputs()
    with torch.no_grad(), prune(tiny.model, "random"):
        cache = tiny.model(**inputs, use_cache=True).past_key_values
    length = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == length
    mask = torch.ones(1, length + 1, dtype=torch.int64)
    step = {"input_ids": torch.tensor([[7]]), "attention_mask": mask, CACHE_NAME: cache}
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match="this cache was pruned: .* go"),
    ):
        tiny.model(**step)
    with torch.no_grad(), prune(tiny.model, "random"):  # inside again it goes on
        tiny.model(**step)
    assert cache.get_seq_length() == length + 1


def test_a_cache_filled_by_others_fails():
    tiny = model_of("llava")
    with torch.no_grad():
        cache = tiny.model(**tiny.inputs(), use_cache=True).past_key_values
    assert type(cache) is DynamicCache
    with torch.no_grad(), prune(tiny.model, "random"):
        with pytest.raises(UnsupportedModelError, match="already holds .* from outside"):
            tiny.model(input_ids=torch.tensor([[7]]), **{CACHE_NAME: cache})


# -- prompts


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_text_alone_is_left_alone(name):
    tiny = model_of(name)
    ids = torch.arange(5, 15)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": tiny.suppress}
    expected = tiny.model.generate(**inputs, **settings)
    with prune(tiny.model, ALL_SITES) as report:
        assert torch.equal(tiny.model.generate(**inputs, **settings), expected)
    assert report.calls == []
    with pytest.raises(LookupError, match="nothing was recorded: no prompt with images"):
        report.media_tokens  # noqa: B018
    assert "no prompt with media yet" in str(report)


def test_embeddings_without_ids_fail():
    tiny = model_of("llava")
    embeddings = tiny.model.get_input_embeddings()(torch.arange(5, 15)[None])
    with torch.no_grad(), prune(tiny.model, "random"):
        with pytest.raises(UnsupportedModelError, match="pass input_ids and pixels"):
            tiny.model(inputs_embeds=embeddings)


def test_features_without_the_encoder_fail_for_methods_that_need_its_map():
    tiny = model_of("llava")
    with torch.no_grad():
        features = tiny.model.model.get_image_features(tiny.inputs()["pixel_values"])

    @functools.wraps(tiny.model.model.get_image_features)
    def precomputed(*args: Any, **kwargs: Any) -> Any:
        return features

    # Features from a store: encoded before, so the tower does not run.
    tiny.model.model.get_image_features = precomputed
    try:
        with prune(tiny.model, "random(keep=0.5)") as report:
            generate_with_any_pixels = generate(tiny)
        assert generate_with_any_pixels.shape[0] == 1
        assert report.media_tokens.after == 16
        with prune(tiny.model, "vflowopt(keep=0.5)"):
            with pytest.raises(UnsupportedModelError, match="without running the encoder here"):
                generate(tiny)
    finally:
        del tiny.model.model.get_image_features


# -- what is remembered


def test_nothing_but_the_report_is_kept_alive():
    tiny = model_of("llava")
    gc.collect()
    inputs = tiny.inputs()
    with torch.no_grad(), prune(tiny.model, ALL_SITES) as report:
        output = tiny.model(**inputs, use_cache=True)
        watched = {
            "pixels": weakref.ref(inputs["pixel_values"]),
            "ids": weakref.ref(inputs["input_ids"]),
            "cache": weakref.ref(output.past_key_values),
            "layer": weakref.ref(output.past_key_values.layers[0]),
            "keys": weakref.ref(output.past_key_values.layers[0].keys),
            "logits": weakref.ref(output.logits),
        }
        del inputs, output
    gc.collect()
    assert [name for name, reference in watched.items() if reference() is not None] == []
    assert len(report.last.decisions) > 3


def test_decisions_own_their_tensors():
    """A small result must not hold the large tensor that it was cut from."""
    tiny = model_of("llava")
    with prune(tiny.model, "plphp(keep=0.5)") as report:
        generate(tiny)
    for decision in report.last.decisions:
        held = decision.kept.untyped_storage().nbytes()
        assert held == decision.kept.numel() * decision.kept.element_size()


def test_calls_follow_each_other():
    tiny = model_of("llava")
    with prune(tiny.model, "random(keep=0.5)") as report:
        generate(tiny)
        generate(tiny, **tiny.inputs(1, 4, short=True))
    assert [len(call.layouts[0]) for call in report.calls] == [32, 16]
    assert report.media_tokens.before == 16
    assert repr(report) == "Report(random(keep=0.5), 2 prefills)"
