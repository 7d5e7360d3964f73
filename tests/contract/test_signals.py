"""What stages are shown is what the dense model computes: attention, keys, values, hidden states.

The reference is the unpatched model with eager attention, run over the whole sequence with what was
pruned masked (`oracle.dense_run`): its attention weights are those that signals must show.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.cases import SOUND_ONLY
from tests.contract.doubles import Spy, Viewed
from tokenprune import prune
from tokenprune.adapters.base import adapter_for
from tokenprune.core.recipe import Recipe
from tokenprune.core.signal import (
    INPUT,
    Attention,
    EncoderSignal,
    Frames,
    Hidden,
    Keys,
    Question,
    Signal,
    Text,
    Values,
)
from tokenprune.core.site import Cache, Input, Layer, Site
from tokenprune.engine import rows
from tokenprune.engine.cache import CACHE_NAME
from tokenprune.errors import MediaError, RecipeError, UnsupportedModelError
from tokenprune.testing import tiny
from tokenprune.testing.harness import generate, model_of, prompt_of, replay_of, windows_of
from tokenprune.testing.oracle import Replay, assert_close, dense_run
from tokenprune.testing.tiny import FAMILIES, decoder_of

FEW = ("llava_onevision", "qwen2_5_vl", "qwen2_audio", "gemma3", "qwen3_vl")
BEFORE = ["none", "random(keep=0.6) + random(keep=0.7 at=1)"]
"""What has happened when the spies look."""


def families() -> list[Any]:
    names = dict.fromkeys([*FEW, *FAMILIES])
    return [pytest.param(n, marks=() if n in FEW else (pytest.mark.full,)) for n in names]


@cache
def eager(name: str) -> tiny.Tiny:
    # A model of its own: Phi-4, once called without `output_attentions`, fails with it.
    return tiny.build(name, attention="eager")


@dataclass
class Dense:
    """The dense run of a prompt, layer by layer.

    Attributes:
        attentions: `[B, heads, S, S]` of each layer.
        entering: `[B, S, D]`, what enters each layer.
        keys: `[B, H, S, d]` of each layer, and
        values: likewise.
    """

    attentions: list[Tensor]
    entering: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]


@torch.no_grad()
def dense(name: str, inputs: dict[str, Any], replay: Replay) -> Dense:
    model = eager(name).model
    entering: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])

    layers = decoder_of(model).layers
    seen: list[Any] = []
    with watched_attention(layers, seen):
        run = dense_run(model, inputs, inputs["input_ids"], replay, output_attentions=True)
        handles = [one.register_forward_pre_hook(note, with_kwargs=True) for one in layers]
        # Hooks fire in order of registration: merges of the replay come before this.
        dense_run(model, inputs, inputs["input_ids"], replay)
    for handle in handles:
        handle.remove()
    keys, values = zip(*seen[: len(layers)], strict=True)
    return Dense(list(run.attentions), entering, list(keys), list(values))


@contextmanager
def watched_attention(layers: Any, seen: list[Any]) -> Iterator[None]:
    """Keys and values that the eager attention of each layer is given."""
    modules = {sys.modules[type(one.self_attn).__module__] for one in layers}
    inside = {one.self_attn for one in layers}
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for attribute in [
                one for one in vars(module) if one.endswith("eager_attention_forward")
            ]:
                plain = getattr(module, attribute)

                def watch(
                    owner: Any, q: Any, k: Any, v: Any, *args: Any, _p: Any = plain, **kw: Any
                ):
                    if owner in inside:
                        seen.append((k, v))
                    return _p(owner, q, k, v, *args, **kw)

                patch.setattr(module, attribute, watch)
        yield


def spied(
    name: str, kind: str, before: str, spies: list[Spy], **given: Any
) -> tuple[dict[str, Any], Any, Dense]:
    """Let spies look at a prompt; returns the prompt, the call's record and the dense run."""
    one = model_of(name)
    inputs = prompt_of(one, kind)
    recipe = Recipe(before, *spies)
    with prune(one.model, recipe, **given) as report, torch.no_grad():
        one.model(**inputs, use_cache=True)
    replay = replay_of(one, before, report.calls, *inputs["input_ids"].shape)
    return inputs, report.last, dense(name, inputs, replay)


def positions_of(context: Any) -> Tensor:
    """`[N]` positions of candidates; all heads hold the same."""
    rows = context.rows if context.rows.ndim == 1 else context.rows[0]
    return context.layout.position[rows]


def queries_of(signal: Attention, inputs: dict[str, Any], sample: int, context: Any) -> list[int]:
    """Positions of the tokens that ask, written plainly."""
    ids = inputs["input_ids"][sample]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[sample]
    media, alive = set(context.layout.position.tolist()), set(positions_of(context).tolist())
    real = [p for p in range(len(ids)) if mask[p] and (p not in media or p in alive)]
    if signal.queries == "text":
        return [p for p in real if p > max(media)]
    if signal.queries == "own":
        return [positions_of(context).tolist()[n] for n in (0, -1)]
    return real[-signal.queries :]


def expected_attention(
    full: Tensor, signal: Attention, queries: list[int], where: Tensor, groups: int | None
) -> Tensor:
    """Of `[heads, S, S]`, as the signal says; `groups` key-value heads at a cache, else None."""
    found = full[:, queries][:, :, where]  # [heads, R, N]
    if signal.heads is not None:
        found = found.view(groups or 1, -1, *found.shape[1:])
        found = reduce(found, signal.heads, 1)
    if signal.reduce is not None:
        found = reduce(found, signal.reduce, 1)
    return found[0] if signal.heads is not None and groups is None else found


def reduce(values: Tensor, kind: str, dim: int) -> Tensor:
    return {"mean": values.mean, "sum": values.sum, "max": values.amax}[kind](dim)


FORMS = [
    Attention(),
    Attention(queries=3),
    Attention(queries="text"),
    Attention(queries="text", reduce="mean"),
    Attention(queries=4, reduce="max", heads="mean"),
    Attention(queries="text", heads="max"),
    Attention(queries=2, reduce="sum", heads="sum"),
    Attention(queries="own", reduce="mean"),
]


def at_layer(form: Attention, layer: int) -> Attention:
    return Attention(
        layer=layer, queries=form.queries, reduce=form.reduce, heads=form.heads, rotary=form.rotary
    )


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", families())
def test_attention_at_caches_is_that_of_the_dense_model(name: str, kind: str, before: str) -> None:
    spy = Spy(Cache(), tuple(FORMS), (0, -1))
    inputs, call, reference = spied(name, kind, before, [spy])
    samples = len(inputs["input_ids"])
    layers = [layer for layer, window in enumerate(windows_of(model_of(name))) if window is None]
    assert len(spy.seen) == samples * len(layers)
    for number, (context, found) in enumerate(spy.seen):
        sample = number % samples
        assert context.layer == layers[number // samples]
        for signal, got in found.items():
            queries = queries_of(signal, inputs, sample, context)
            want = expected_attention(
                reference.attentions[context.layer][sample],
                signal,
                queries,
                positions_of(context),
                context.shape.kv_heads,
            )
            assert_close(got, want, str(signal))


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", families())
def test_attention_at_layers_is_that_of_the_dense_model(name: str, kind: str, before: str) -> None:
    """Of the layer before, and of the layer about to run, at once."""
    forms = tuple(at_layer(form, layer) for form in FORMS for layer in (-1, 0))
    spies = [Spy(Layer(layer), forms, (0, -1)) for layer in (1, 2, 4)]
    # Before tokens leave at layer 1, its stages have seen what layer 0 attended to.
    inputs, call, reference = spied(name, kind, before, spies)
    for spy in spies:
        assert len(spy.seen) == len(inputs["input_ids"])
        for sample, (context, found) in enumerate(spy.seen):
            for signal, got in found.items():
                if context.layer + signal.layer == 1 and before != "none" and context.layer == 1:
                    continue  # the layer is about to run with fewer tokens than it was probed with
                if signal.queries == "own" and context.layer == 1 and before != "none":
                    continue  # those that asked may have gone since
                queries = queries_of(signal, inputs, sample, context)
                full = reference.attentions[context.layer + signal.layer][sample]
                want = expected_attention(full, signal, queries, positions_of(context), None)
                assert_close(got, want, str(signal))


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", families())
def test_keys_values_and_hidden_states_are_those_of_the_dense_model(
    name: str, kind: str, before: str
) -> None:
    media = (Keys(), Values(), Hidden(), Hidden(layer=INPUT), Text(), Text(after=False))
    text = (Keys(of="text"), Values(of="text"))
    before_it = (Keys(layer=-1), Values(layer=-1), Keys(layer=-1, of="text"))
    spies = [Spy(Cache(), media + text), Spy(Layer(2), media + text + before_it)]
    spies.append(Spy(Input(), (Hidden(), Hidden(layer=INPUT), Text())))
    inputs, call, reference = spied(name, kind, before, spies)
    samples = len(inputs["input_ids"])
    for spy in spies:
        for number, (context, found) in enumerate(spy.seen):
            sample, where = number % samples, positions_of(context)
            words = text_of(inputs, sample, context)
            after = [p for p in words if p > int(context.layout.position.max())]
            for signal, got in found.items():
                if isinstance(signal, Keys | Values):
                    stored = reference.keys if isinstance(signal, Keys) else reference.values
                    full = stored[context.layer + signal.layer]
                    want = full[sample][:, where if signal.of == "media" else words]
                elif isinstance(signal, Text):
                    want = reference.entering[0][sample, after if signal.after else words]
                else:
                    at = 0 if signal.layer == INPUT else context.layer or 0
                    want = reference.entering[at][sample, where]
                assert_close(got, want, str(signal))


def text_of(inputs: dict[str, Any], sample: int, context: Any) -> list[int]:
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[sample]
    media = set(context.layout.position.tolist())
    return [p for p in range(len(mask)) if mask[p] and p not in media]


def test_features_keys_and_values_need_no_name() -> None:
    one = model_of("llava")
    spies = [Spy(Input()), Spy(Layer(2)), Spy(Cache((1,)))]
    with prune(one.model, *spies), torch.no_grad():
        one.model(**prompt_of(one))
        contexts = [spy.seen[0][0] for spy in spies]
    for context in contexts[:2]:
        assert context.features.shape == (len(context), context.shape.width)
    kv_heads, width = contexts[2].shape.kv_heads, contexts[2].shape.head_width
    assert contexts[2].keys.shape == contexts[2].values.shape == (kv_heads, 32, width)


@pytest.mark.parametrize("name", families())
def test_rotation_can_be_left_out(name: str) -> None:
    """Against the dense model whose first layer is given rotations by nothing."""
    form = Attention(queries="text", rotary=False)
    spies = [
        Spy(Layer(0), (form, Keys(rotary=False))),
        Spy(Layer(1), (at_layer(form, -1), Keys(layer=-1, rotary=False))),
        Spy(Cache((0,)), (form, Keys(rotary=False))),
    ]
    one = model_of(name)
    inputs = prompt_of(one, "batch")
    if windows_of(one)[0] is not None:
        spies.pop()  # layers with a window are not shown to cache stages
    try:
        with prune(one.model, *spies), torch.no_grad():
            one.model(**inputs, use_cache=True)
    except UnsupportedModelError as error:
        assert "rotary" in str(error)
        pytest.skip(str(error))
    model = eager(name).model

    def unrotated(module: Any, args: Any, kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        nothing = torch.ones_like(cos), torch.zeros_like(sin)
        return args, {**kwargs, "position_embeddings": nothing}

    handle = decoder_of(model).layers[0].register_forward_pre_hook(unrotated, with_kwargs=True)
    reference = dense(name, inputs, Replay())
    handle.remove()
    for spy in spies:
        assert len(spy.seen) == 2
        for sample, (context, found) in enumerate(spy.seen):
            where = positions_of(context)
            for signal, got in found.items():
                if isinstance(signal, Keys):
                    want = reference.keys[0][sample][:, where]
                else:
                    queries = queries_of(signal, inputs, sample, context)
                    want = reference.attentions[0][sample][:, queries][:, :, where]
                assert_close(got, want, str(signal))


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen2_audio"])
def test_blocks_of_rows_are_joined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK_ELEMENTS", 1)  # a row at a time
    test_attention_at_caches_is_that_of_the_dense_model(name, "batch", BEFORE[1])
    test_attention_at_layers_is_that_of_the_dense_model(name, "batch", BEFORE[0])


def test_what_is_too_large_must_be_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MOST_ELEMENTS", 3 * 32 * 4)
    one = model_of("llava")
    heads = decoder_of(one.model).config.num_attention_heads
    with prune(one.model, Spy(Cache(), (Attention(queries=9),))):
        with pytest.raises(RecipeError, match=f"9 queries of {heads} heads to 32 tokens takes"):
            generate(one, prompt_of(one))
    with prune(one.model, Spy(Cache(), (Attention(queries=9, reduce="mean"),))):
        generate(one, prompt_of(one))


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_audio"])
def test_a_later_prompt_sees_what_came_before(name: str) -> None:
    """Rows of a second forward on one cache are those of one forward over both."""
    one = model_of(name)
    inputs = prompt_of(one)
    spies = [
        Spy(Cache(), (Attention(queries=3),)),
        Spy(Layer(2), (Attention(layer=-1, queries=3), Attention(queries=3))),
    ]
    plain = torch.randint(5, 140, (1, 4), generator=torch.Generator().manual_seed(3))
    whole = {**inputs, "input_ids": torch.cat([plain, inputs["input_ids"]], dim=1)}
    for key in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            fill = 1 if key == "attention_mask" else 0
            whole[key] = torch.nn.functional.pad(inputs[key], (4, 0), value=fill)
    with prune(one.model, *spies), torch.no_grad():
        begun = one.model(input_ids=plain, use_cache=True)
        more = {**inputs, "attention_mask": whole["attention_mask"]}
        more[CACHE_NAME] = begun.past_key_values
        one.model(**more, use_cache=True)
    reference = dense(name, whole, Replay())
    for spy in spies:
        assert spy.seen
        for context, found in spy.seen:
            for signal, got in found.items():
                full = reference.attentions[context.layer + signal.layer][0]
                want = full[:, -3:][:, :, positions_of(context)]
                assert_close(got, want, str(signal))


# -- what the caller gives


def test_question_and_frames_are_what_was_given() -> None:
    one = model_of("qwen2_5_vl")
    inputs = prompt_of(one, "batch")
    clips = int(inputs["video_grid_thw"].shape[0])
    frames = [torch.full((4, 3, 8, 8), n, dtype=torch.uint8) for n in range(clips)]
    spy = Spy(Input(), (Question(), Frames()))
    with prune(one.model, spy, question="who?", frames=frames), torch.no_grad():
        one.model(**inputs)
    assert [found[Question()] for _, found in spy.seen] == ["who?"] * len(spy.seen)
    dealt = [picture for _, found in spy.seen for picture in found[Frames()]]
    assert [int(one[0, 0, 0, 0]) for one in dealt] == list(range(clips))


@pytest.mark.parametrize("signal, name", [(Question(), "question"), (Frames(), "frames")])
def test_what_was_not_given_fails_before_any_work(signal: Signal[Any], name: str) -> None:
    one = model_of("llava")
    with pytest.raises(RecipeError, match=rf"spy needs the {name}.*prune\(..., {name}="):
        with prune(one.model, Spy(Input(), (signal,))):
            raise AssertionError("entered")


def test_frames_of_other_clips_are_refused() -> None:
    one = model_of("llava")
    frames = [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)] * 5
    with prune(one.model, Spy(Input(), (Frames(),)), frames=frames):
        with pytest.raises(MediaError, match="frames has the pictures of 5 images"):
            generate(one, prompt_of(one))
    with pytest.raises(MediaError, match="uint8 tensor"), prune(one.model, "none", frames=[[1]]):
        pass


def test_a_signal_that_is_not_named_is_refused() -> None:
    class Reading(Spy):
        name = "reading"

        def select(self, context: Any) -> Any:
            context[Attention()]

    one = model_of("llava")
    with prune(one.model, Reading(Cache())):
        with pytest.raises(RecipeError, match="its needs do not name"):
            generate(one, prompt_of(one))


@pytest.mark.parametrize(
    "site, signal, error",
    [
        (Input(), Attention(), "no layer has run"),
        (Layer(0), Attention(layer=-1), "no layer comes before"),
        (Layer(2), Keys(layer=1), "layer must be 0"),
        (Cache(), Values(layer=-1), "layer must be 0"),
        (Layer(9), Hidden(), "layers 0 to 4"),
    ],
)
def test_a_signal_that_is_not_there_fails_before_any_work(
    site: Site, signal: Signal[Any], error: str
) -> None:
    one = model_of("llava")
    with pytest.raises(RecipeError, match=error), prune(one.model, Spy(site, (signal,))):
        raise AssertionError("entered")


@pytest.mark.parametrize("name", SOUND_ONLY[:1])
def test_a_tower_that_is_not_there_fails_before_any_work(name: str) -> None:
    one = model_of(name)
    adapter = adapter_for(one.model)
    if adapter.tower("audio") is not None:
        with pytest.raises(UnsupportedModelError, match="class token"):
            with prune(one.model, Spy(Input(), (ClassRow(),))):
                raise AssertionError("entered")


class ClassRow(Viewed):
    class_token = True


# -- encoders


def test_signals_of_views_are_means_of_spans() -> None:
    """A vector a view comes as one for each image or frame."""

    @dataclass(frozen=True)
    class Numbered(EncoderSignal):
        """The mean key of each view."""

        per = "view"

        def of(self, view: Any) -> Tensor:
            return view.keys().mean(dim=1)

    one = model_of("llava_onevision")
    spy = Spy(Input(), (Numbered(), Viewed("keys"), Viewed()))
    with prune(one.model, spy), torch.no_grad():
        one.model(**prompt_of(one))
    for context, found in spy.seen:
        spans = context.layout.spans()
        vectors, keys = found[Numbered()], found[Viewed("keys")]
        assert vectors.shape == (int(spans.max()) + 1, keys.shape[1])
        assert keys.shape[0] == len(context) == len(found[Viewed()])
        assert bool(vectors.isfinite().all()) and not torch.equal(vectors[0], vectors[-1])
