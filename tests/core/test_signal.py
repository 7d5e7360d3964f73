"""What signals say of themselves: where they can be had, and what they depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from tokenprune.core.context import EncoderView
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
from tokenprune.errors import RecipeError
from tokenprune.methods._vflowopt import Importance

SITES: list[Site] = [Input(), Layer(0), Layer(3), Cache(), Cache((1, 2))]


@dataclass(frozen=True, kw_only=True)
class Received(EncoderSignal):
    """What each token receives."""

    def of(self, view: EncoderView) -> Tensor:
        return view.received()


EVERYWHERE: list[Signal[Any]] = [
    Hidden(),
    Hidden(layer=INPUT),
    Text(),
    Text(after=False),
    Question(),
    Frames(),
    Received(),
]


@pytest.mark.parametrize("signal", EVERYWHERE, ids=str)
@pytest.mark.parametrize("site", SITES, ids=str)
def test_signals_of_the_prompt_are_had_everywhere(signal: Signal[Any], site: Site) -> None:
    signal.check(site)


@pytest.mark.parametrize(
    "make",
    [
        Attention,
        lambda **more: Attention(queries="own", rotary=False, reduce="max", heads="sum", **more),
        Keys,
        lambda **more: Keys(rotary=False, of="text", **more),
        Values,
        lambda **more: Values(of="text", **more),
    ],
)
@pytest.mark.parametrize(
    ("site", "layer", "rule"),
    [
        (Input(), 0, r"at input: no layer has run; act at Layer\(0\) instead, layer=0"),
        (Input(), -1, "at input: no layer has run"),
        (Layer(0), 0, None),
        (Layer(3), 0, None),
        (Layer(3), -1, None),
        (Layer(0), -1, "at layer 0: no layer comes before; use layer=0, the layer about to run"),
        (Layer(3), 1, "at layer 3: layer must be 0, the layer about to run, and -1, the one befo"),
        (Layer(3), -2, "at layer 3: layer must be 0, the layer about to run, and -1"),
        (Cache(), 0, None),
        (Cache((1, 2)), 0, None),
        (Cache(), -1, "at cache: layer must be 0, the layer whose cache it is"),
        (Cache((1, 2)), 1, "at cache: layer must be 0, the layer whose cache it is"),
    ],
)
def test_signals_of_layers_are_had_at_layers_and_caches(
    make: Any, site: Site, layer: int, rule: str | None
) -> None:
    signal = make(layer=layer)
    if rule is None:
        signal.check(site)
        return
    with pytest.raises(RecipeError, match=rule) as caught:
        signal.check(site)
    assert str(caught.value).startswith(f"{signal} cannot be had at {site}: ")


@pytest.mark.parametrize("queries", [0, -1, True, 1.5, "media", None])
def test_attention_of_unknown_queries_fails(queries: Any) -> None:
    with pytest.raises(RecipeError, match='queries must be a number of tokens of at least 1, "te'):
        Attention(queries=queries)


@pytest.mark.parametrize("name", ["reduce", "heads"])
def test_attention_that_is_reduced_otherwise_fails(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} must be one of mean, sum, max or None, got 'me"):
        Attention(**{name: "median"})  # type: ignore[arg-type]
    for known in ("mean", "sum", "max", None):
        Attention(**{name: known})  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [1, -1, "output", None])
def test_hidden_states_of_other_layers_fail(layer: Any) -> None:
    with pytest.raises(RecipeError, match='layer must be 0 or "input", got'):
        Hidden(layer=layer)


@pytest.mark.parametrize("kind", [Keys, Values])
def test_keys_and_values_of_other_tokens_fail(kind: Any) -> None:
    with pytest.raises(RecipeError, match="of must be one of media, text, got 'sound'"):
        kind(of="sound")


@pytest.mark.parametrize(
    ("signal", "depends"),
    [
        (Attention(), True),
        (Attention(queries=32), True),
        (Attention(queries="text"), True),
        (Attention(queries="own"), False),
        (Keys(), False),
        (Values(layer=-1), False),
        (Keys(of="text"), True),
        (Values(of="text"), True),
        (Hidden(), False),
        (Hidden(layer=INPUT), False),
        (Text(), True),
        (Text(after=False), True),
        (Question(), True),
        (Frames(), False),
        (Received(), False),
    ],
    ids=str,
)
def test_text_dependence(signal: Signal[Any], depends: bool) -> None:
    assert signal.text_dependent is depends


def test_signals_are_values() -> None:
    for signal in (*EVERYWHERE, Attention(), Keys(), Values()):
        assert signal == type(signal)() or signal in (Hidden(layer=INPUT), Text(after=False))
        assert hash(signal) is not None
        with pytest.raises(AttributeError):
            signal.layer = 3  # type: ignore[attr-defined]
    assert len({Attention(), Attention(queries=1), Attention(layer=0)}) == 1
    assert len({Keys(), Keys(rotary=False), Values(), Attention(), Hidden()}) == 5
    assert Importance(t=1.0) != Importance() == Importance(t=None)
