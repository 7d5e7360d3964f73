"""What stages are shown is what the unpruned model computes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.contract.cases import SOUND_ONLY
from tests.contract.harness import generate, model_of, prompt_of, windows_of
from tests.contract.oracle import assert_close
from tests.tiny import FAMILIES, decoder_of
from tokenprune import prune
from tokenprune.adapters.base import adapter_for
from tokenprune.core.selection import Merge, Selection
from tokenprune.core.site import (
    Cache,
    Input,
    Layer,
    Site,
)
from tokenprune.core.stage import EncoderStage, Stage
from tokenprune.errors import RecipeError


@dataclass(frozen=True, eq=False)
class Spy(Stage, part=True):
    """Keeps everything, and notes what it was shown."""

    site: Site = Input()
    seen: list[Any] = field(default_factory=list)

    needs = frozenset({"attention_rows"})

    def select(self, context: Any) -> Selection:
        self.seen.append(context)
        total = context.rows.shape[1] if isinstance(self.site, Cache) else len(context.layout)
        return Selection(torch.arange(total))


@dataclass(frozen=True, eq=False)
class SpyMap(EncoderStage, part=True):
    """Notes how much attention each token of a view receives, and two of the rows."""

    received: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    modalities = frozenset({"image", "video"})

    def importance(self, view: Any, grey: Any) -> Tensor:
        received = view.received()
        picked = torch.tensor([[0, view.tokens - 1]]).expand(view.views, 2)
        self.received.extend(received.unbind())
        self.rows.extend(view.rows(picked).unbind())
        return received


@dataclass(frozen=True, eq=False)
class Merging(Stage, part=True):
    """Drops every token but the first, which absorbs the second."""

    site: Site = Input()

    def select(self, context: Any) -> Selection:
        merge = Merge(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0.5, 0.5]))
        return Selection(torch.arange(1), merge)


@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_features_are_hidden_states(name: str, kind: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one, kind)
    plain: list[Tensor] = []  # what enters each layer
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: plain.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in decoder_of(one.model).layers
    ]
    one.model(**inputs)
    for handle in handles:
        handle.remove()
    spies = [Spy(Input()), Spy(Layer(0)), Spy(Layer(2)), Spy(Layer(4))]
    with prune(one.model, *spies) as report:
        one.model(**inputs)
    for spy, layer in zip(spies, (0, 0, 2, 4), strict=True):
        assert len(spy.seen) == len(inputs["input_ids"])
        for row, context in enumerate(spy.seen):
            assert torch.equal(context.layout.position, report.calls[0].layouts[row].position)
            assert_close(context.features, plain[layer][row, context.layout.position], "features")


@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_attention_rows_are_those_of_eager_attention(name: str, kind: str) -> None:
    # A fresh model: Phi-4, once called without `output_attentions`, fails with it.
    one, eager = model_of(name), tiny.build(name, attention="eager")
    inputs = prompt_of(one, kind)
    plain = eager.model(**inputs, output_attentions=True, use_cache=True)
    spy = Spy(Cache())
    # Some tokens are gone when a cache stage looks: candidates are what is left.
    with prune(one.model, spy) as report:
        one.model(**inputs, use_cache=True)
    samples = len(inputs["input_ids"])
    # Layers with a sliding window forget by themselves, and are not shown to cache stages.
    layers = [layer for layer, window in enumerate(windows_of(one)) if window is None]
    assert len(spy.seen) == samples * len(layers)
    for number, context in enumerate(spy.seen):
        layer, row = layers[number // samples], number % samples
        assert context.layer == layer
        position = report.calls[0].layouts[row].position
        weights = plain.attentions[layer][row, :, -1]  # [heads, S]
        share = weights.shape[0] // len(context.rows)
        where = position[context.rows]  # [H, N]
        expected = weights.gather(1, where.repeat_interleave(share, dim=0))
        assert_close(context.attention, expected, "attention")
        stored = plain.past_key_values.layers[layer]
        for got, of_layer in ((context.keys, stored.keys), (context.values, stored.values)):
            index = where[..., None].expand(-1, -1, of_layer.shape[-1])
            assert_close(got, of_layer[row].gather(1, index), "keys or values")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_cache_stages_see_what_is_left(name: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one)
    spy = Spy(Cache())
    with prune(one.model, "random(keep=0.5) + random(keep=0.5 at=cache)", spy) as report:
        cache = one.model(**inputs, use_cache=True).past_key_values
    decisions = [one for one in report.calls[0].decisions if one.kept.ndim == 2]
    random = [one for one in decisions if one.method == "random"]
    for context, decision in zip(spy.seen, random, strict=True):
        position = context.layout.position
        assert torch.equal(position[context.rows], decision.kept)
        kept = set(map(tuple, context.keys[0].tolist()))
        assert kept <= set(map(tuple, cache.layers[context.layer].keys[0, 0].tolist()))


@contextmanager
def weights_logged(towers: list[Any]) -> Iterator[list[Tensor]]:
    """The attention weights of towers' blocks, one `[heads, P + Nv, P + Nv]` a view."""
    inside = {module for tower in towers for module in tower.block.modules()}
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch, ExitStack() as hooks:
        for module in inside:
            if hasattr(module, "fused_attn"):  # of timm, which drops out from the weights
                patch.setattr(module, "fused_attn", False)
                log = module.attn_drop.register_forward_hook(
                    lambda module, args, output: seen.extend(output.unbind())
                )
                hooks.callback(log.remove)
        for name in {type(module).__module__ for module in inside}:
            found = [one for one in EAGER if hasattr(sys.modules[name], one)]
            if not found:
                continue
            eager = getattr(sys.modules[name], found[0])

            def logged(module: Any, *args: Any, _eager: Any = eager, **kwargs: Any) -> Any:
                output, weights = _eager(module, *args, **kwargs)
                if module in inside:
                    seen.extend(weights.unbind())
                return output, weights

            patch.setattr(sys.modules[name], found[0], logged)
        yield seen


EAGER = ("simple_eager_attention_forward", "eager_attention_forward")
"""What transformers calls the plain attention of a tower; the first one a module has."""

WITH_TOWER = [*(name for name in FAMILIES if name not in SOUND_ONLY), "llava_pixtral"]


@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", WITH_TOWER)
@torch.no_grad()
def test_encoder_views_are_the_tower_s_attention(name: str, kind: str) -> None:
    one, eager = model_of(name), model_of(name, "eager")
    inputs = prompt_of(one, kind)
    adapter = adapter_for(eager.model)
    towers = [adapter.tower(name) for name in adapter.modalities if name != "audio"]
    tower = towers[0]
    with weights_logged(towers) as weights:
        eager.model(**inputs)
    if name in ("llava_pixtral", "mistral3"):  # all pictures in one sequence
        lengths = (inputs["image_sizes"] // 14).prod(dim=1).tolist()
        (whole,) = weights
        rows = whole.split(lengths, dim=1)
        weights = [row.split(lengths, dim=2)[number] for number, row in enumerate(rows)]
    spy = SpyMap()
    with prune(one.model, spy):
        one.model(**inputs)
    assert len(spy.received) == len(weights) > 0
    for received, rows, full in zip(spy.received, spy.rows, weights, strict=True):
        dense = full.mean(0)[tower.prefix_tokens :, tower.prefix_tokens :]  # [Nv, Nv]
        dense = dense / dense.sum(-1, keepdim=True)
        real = dense.sum(0) > 0  # nothing attends to padding
        assert_close(received, dense[real].sum(0), "received attention")
        assert_close(rows, dense[[0, -1]], "attention rows")


@pytest.mark.parametrize("site", [Layer(2), Cache()])
def test_merges_elsewhere_than_at_the_input_are_refused(site: Site) -> None:
    one = model_of("llava")
    with pytest.raises(RecipeError, match="merge"), prune(one.model, Merging(site)):
        generate(one, prompt_of(one))
