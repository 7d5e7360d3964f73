"""The stages of a recipe on one model: where they act, and what is collected for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from tokenprune.adapters.base import Adapter
from tokenprune.core.group import Group
from tokenprune.core.layout import Modality
from tokenprune.core.recipe import Recipe, Step
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
from tokenprune.core.site import Cache, Input, Layer
from tokenprune.errors import RecipeError, UnsupportedModelError

__all__ = ["Request", "Schedule", "covering", "make_schedule"]


class Request(NamedTuple):
    """A signal of one decoder layer, as it is collected.

    Attributes:
        layer: The decoder layer, from 0.
        signal: With `layer=0`.
        grouped: Whether heads are reduced within each key-value head.
        own: The number of the step whose own queries these are; None for others.
    """

    layer: int
    signal: Attention | Keys | Values
    grouped: bool = False
    own: int | None = None


class Schedule:
    """Which stages act where.

    Attributes:
        adapter: Of the model.
        steps: All of them, in the order of the recipe.
        compact: Whether what is left of the input is numbered anew.
        group: How much of a prompt is prefilled at once; None for all of it.
        encoder: Signals of the encoder, with the modalities they are wanted of.
        input: Steps on the embeddings.
        layer: Steps on the hidden states that enter a layer, by the layer's number.
        cache: Steps on the caches of layers, right after their attention.
        whole: Steps on caches that come with the last part of a prompt, and see all parts.
        after_prefill: Steps on caches once a prompt is there.
        decode: Steps on caches while tokens are generated.
        keeps_input: Whether what enters the language model is needed later.
        keeps_entered: Whether what enters a layer is needed at its cache.
        given: Signals that the caller has to give.
    """

    def __init__(
        self,
        adapter: Adapter,
        steps: Iterable[Step],
        compact: bool = False,
        group: Group | None = None,
    ) -> None:
        self.adapter = adapter
        self.steps = tuple(steps)
        self.compact = compact
        self.group = group
        self.input = [step for step in self.steps if isinstance(step.stage.site, Input)]
        self.cache = list(self._after("layer"))
        self.after_prefill = list(self._after("prefill"))
        self.decode = list(self._after("decode"))
        self.whole: list[Step] = []
        self.layer: dict[int, list[Step]] = {}
        self.encoder: dict[EncoderSignal, frozenset[Modality]] = {}
        self.given: dict[Question | Frames, str] = {}
        self.keeps_input = self.keeps_entered = False
        self._attended: dict[int, list[Request]] = {}
        self._before: dict[int, list[Request]] = {}  # of a layer about to run, for its own stages
        self._narrowed: dict[int, list[Request]] = {}  # of a layer about to run, for later stages
        for step in self.steps:
            site = step.stage.site
            if isinstance(site, Layer):
                self.layer.setdefault(site.index, []).append(step)
            for signal in step.stage.needs:
                self._want(step, signal)

    def _after(self, when: str) -> Iterator[Step]:
        """Steps on caches that act at this time."""
        for step in self.steps:
            site = step.stage.site
            if isinstance(site, Cache) and site.after == when:
                yield step

    @cached_property
    def before_question(self) -> Schedule:
        """The schedule of a part of a prompt that others follow: without what asks for the text."""
        steps = [step for step in self.steps if not step.stage.text_dependent]
        return Schedule(self.adapter, steps)

    @cached_property
    def with_question(self) -> Schedule:
        """The schedule of the last part: what asks for the text at caches sees all parts."""
        schedule = Schedule(self.adapter, self.steps)
        schedule.whole = [step for step in schedule.cache if step.stage.text_dependent]
        schedule.cache = [step for step in schedule.cache if not step.stage.text_dependent]
        return schedule

    @property
    def on_caches(self) -> bool:
        """Whether any stage acts on caches."""
        return bool(self.cache or self.whole or self.prunes_later)

    @property
    def prunes_later(self) -> bool:
        """Whether any stage acts on what was stored before."""
        return bool(self.after_prefill or self.decode)

    def watches(self, layer: int) -> bool:
        """Whether anything is collected, now or later, when a layer attends."""
        return layer in self._attended or self.prunes_later or bool(self.whole)

    def cache_steps(self, layer: int) -> list[Step]:
        """Steps on the cache of one layer, right after its attention."""
        return covering(self.cache, layer)

    # -- what is collected

    def attended(self, layer: int) -> list[Request]:
        """What is collected when a layer attends."""
        return self._attended.get(layer, [])

    def probed(self, layer: int, *, narrowed: bool) -> list[Request]:
        """What a layer that is about to run is probed for, before or after tokens leave there."""
        return (self._narrowed if narrowed else self._before).get(layer, [])

    def request(self, step: Step, signal: Attention | Keys | Values, layer: int) -> Request:
        """A step's signal at a layer, as it is collected."""
        attention = isinstance(signal, Attention)
        own = isinstance(signal, Attention) and signal.queries == "own"
        at_cache = isinstance(step.stage.site, Cache)
        return Request(
            layer=layer + signal.layer,
            signal=replace(signal, layer=0),
            grouped=attention and at_cache,
            own=next(n for n, one in enumerate(self.steps) if one is step) if own else None,
        )

    def _want(self, step: Step, signal: Signal[Any]) -> None:
        site, stage = step.stage.site, step.stage
        if isinstance(signal, EncoderSignal):
            wanted = self.encoder.get(signal, frozenset())
            self.encoder[signal] = wanted | stage.acts_on
        elif isinstance(signal, Question | Frames):
            self.given.setdefault(signal, stage.name)
        elif isinstance(signal, Text):
            self.keeps_input |= not isinstance(site, Input)
        elif isinstance(signal, Hidden):
            self.keeps_input |= signal.layer == INPUT and not isinstance(site, Input)
            self.keeps_entered |= signal.layer == 0 and isinstance(site, Cache)
        elif isinstance(site, Cache) and site.after != "layer":
            return  # it reads the cache itself
        elif isinstance(signal, Attention | Keys | Values):
            for layer in self._layers(step):
                self._want_of_layer(self.request(step, signal, layer), step, signal)

    def _want_of_layer(
        self, request: Request, step: Step, signal: Attention | Keys | Values
    ) -> None:
        ahead = isinstance(step.stage.site, Layer) and signal.layer == 0
        rotated = isinstance(signal, Values) or signal.rotary
        if isinstance(step.stage.site, Cache) and rotated and not isinstance(signal, Attention):
            return  # the cache holds it
        table = self._before if ahead else self._attended if rotated else self._narrowed
        requests = table.setdefault(request.layer, [])
        if request not in requests:
            requests.append(request)

    def _layers(self, step: Step) -> Iterator[int]:
        site = step.stage.site
        if isinstance(site, Layer):
            yield site.index
        elif isinstance(site, Cache):
            yield from (n for n in range(self.adapter.shape.layers) if site.covers(n))


def covering(steps: Iterable[Step], layer: int) -> list[Step]:
    """Those of some steps on caches that act at the cache of one layer."""
    found = []
    for step in steps:
        site = step.stage.site
        if isinstance(site, Cache) and site.covers(layer):
            found.append(step)
    return found


def make_schedule(adapter: Adapter, recipe: Recipe, positions: str) -> Schedule:
    """The schedule of a recipe.

    Raises:
        RecipeError: The recipe, or `positions`, does not fit the model.
        UnsupportedModelError: The model lacks what a stage reads or prunes.
    """
    if positions not in ("original", "compact"):
        raise RecipeError(f"positions must be 'original' or 'compact', got {positions!r}")
    steps = recipe.steps(adapter.shape)
    kind = adapter.config.model_type
    for stage in (step.stage for step in steps):
        wanted = set(adapter.modalities) & stage.acts_on
        if not wanted:
            raise UnsupportedModelError(
                f"{stage.name} prunes {_join(stage.acts_on) or 'no'} tokens, but {kind} "
                f"has only {_join(adapter.modalities)} tokens"
            )
        for signal in stage.needs:
            if isinstance(signal, EncoderSignal):
                _check_towers(adapter, signal, wanted, stage.name)
    text = adapter.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    if positions == "compact" and "mrope_section" in rope:
        raise RecipeError(
            f"positions='compact' needs one-dimensional positions, but {kind} counts time, "
            "row and column; use positions='original'"
        )
    group = recipe.group
    if positions == "compact" and group is not None:
        raise RecipeError(
            f"positions='compact' numbers a whole prompt, but {str(recipe)!r} prefills groups of "
            f"{group}; use positions='original'"
        )
    return Schedule(adapter, steps, compact=positions == "compact", group=group)


def _check_towers(
    adapter: Adapter, signal: EncoderSignal, wanted: Iterable[Modality], name: str
) -> None:
    kind = adapter.config.model_type
    towers = [tower for tower in map(adapter.tower, wanted) if tower is not None]
    if not towers:
        raise UnsupportedModelError(
            f"{name} reads the encoder's attention, which {kind} does not offer for {_join(wanted)}"
        )
    if signal.class_token and not all(tower.prefix_tokens for tower in towers):
        raise UnsupportedModelError(
            f"{name} reads the encoder's class token, and the tower of {kind} has none; use a "
            "setting or a method that reads the attention received"
        )


def _join(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))
