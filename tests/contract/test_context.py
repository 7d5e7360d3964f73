"""What stages are shown of caches that others pruned, and of encoders."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.cases import SOUND_ONLY
from tests.contract.doubles import Spy
from tokenprune import prune
from tokenprune.adapters.base import adapter_for
from tokenprune.core.signal import EncoderSignal, Keys
from tokenprune.core.site import Cache, Input
from tokenprune.testing.harness import model_of, prompt_of
from tokenprune.testing.oracle import assert_close
from tokenprune.testing.tiny import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_cache_stages_see_what_is_left(name: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one)
    spy = Spy(Cache(), (Keys(),))
    with prune(one.model, "random(keep=0.5) + random(keep=0.5 at=cache)", spy) as report:
        cache = one.model(**inputs, use_cache=True).past_key_values
    decisions = [one for one in report.calls[0].decisions if one.kept.ndim == 2]
    random = [one for one in decisions if one.method == "random"]
    for (context, found), decision in zip(spy.seen, random, strict=True):
        position = context.layout.position
        assert torch.equal(position[context.rows], decision.kept)
        kept = set(map(tuple, found[Keys()][0].tolist()))
        assert kept <= set(map(tuple, cache.layers[context.layer].keys[0, 0].tolist()))


class Seeing(Spy):
    """Looks at pictures alone."""

    name = "seeing"
    modalities = frozenset({"image", "video"})


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
    seen: list[tuple[Tensor, ...]] = []

    @dataclass(frozen=True)
    class Noted(EncoderSignal):
        def of(self, view: Any) -> Tensor:
            received, ends = view.received(), torch.tensor([[0, view.tokens - 1]])
            of_class = view.class_row() if tower.prefix_tokens else received
            rows = view.rows(ends.expand(view.views, 2))
            seen.extend(zip(received, rows, of_class, strict=True))
            return received

    with prune(one.model, Seeing(Input(), (Noted(),))):
        one.model(**inputs)
    assert len(seen) == len(weights) > 0
    for (received, rows, of_class), full in zip(seen, weights, strict=True):
        dense = full.mean(0)[tower.prefix_tokens :, tower.prefix_tokens :]  # [Nv, Nv]
        dense = dense / dense.sum(-1, keepdim=True)
        real = dense.sum(0) > 0  # nothing attends to padding
        assert_close(received, dense[real].sum(0), "received attention")
        assert_close(rows, dense[[0, -1]], "attention rows")
        if tower.prefix_tokens:
            row = full.mean(0)[0, tower.prefix_tokens :]
            assert_close(of_class, row / row.sum(), "the class token's row")
