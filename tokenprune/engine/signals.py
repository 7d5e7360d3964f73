"""Collecting what stages ask for: of the layers of one prefill, and at a stage's own site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenprune.core.context import Candidates
from tokenprune.core.recipe import Step
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
from tokenprune.core.site import Cache, Input
from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.flight import Flight
from tokenprune.engine.prompt import Given, Sample
from tokenprune.engine.rows import Attended, attention_rows
from tokenprune.engine.schedule import Request, Schedule
from tokenprune.errors import RecipeError

__all__ = ["Collector", "Place", "Probing", "columns_of"]


class Probing(Protocol):
    """Shows what a layer that is about to run will attend with."""

    def __call__(self, *, rotary: bool) -> Attended: ...


def columns_of(sample: Sample, rows: Tensor, flight: Flight, stored: int) -> Tensor:
    """The cache columns of rows of a layout: what is in flight was stored last."""
    position = sample.layout.position[rows] - flight.past
    located = flight.locate(sample.number, position.flatten()).view(position.shape)
    return located + stored - flight.rows.shape[1]


class _Found(NamedTuple):
    """A signal of a layer for one sample.

    Attributes:
        alive: `[n]` rows of the layout that were alive then.
        values: Of these: an axis of `n`, the last one of attention, else the one before the last.
    """

    alive: Tensor
    values: Tensor


@dataclass(frozen=True)
class Place:
    """Where a step acts.

    Attributes:
        step: The step.
        layer: Decoder layer, from 0; -1 at the input.
        hidden: `[B, Q, D]`, what is about to enter it; None at a cache.
        stored: The layer's cache; None elsewhere.
    """

    step: Step
    layer: int
    hidden: Tensor | None = None
    stored: PrunedLayer | None = None


class Collector:
    """The signals of one prefill.

    Args:
        schedule: What is wanted where.
        samples: The rows of the batch.
        flight: The tokens in flight.
        given: What the caller knows.
        frames: For each sample, which of the given pictures are its own.
    """

    def __init__(
        self,
        schedule: Schedule,
        samples: list[Sample],
        flight: Flight,
        given: Given,
        frames: list[list[Tensor]],
    ) -> None:
        self._schedule = schedule
        self._samples = samples
        self._flight = flight
        self._given = given
        self._frames = frames
        self._input: Tensor | None = None  # [B, S, D], what entered the model
        self._entered: Tensor | None = None  # [B, Q, D], what entered the layer at hand
        self._found: dict[Request, list[_Found]] = {}

    # -- in the order of a prefill

    def enter_model(self, hidden: Tensor) -> None:
        """Keep what enters the language model, `[B, S, D]`, if it is needed later."""
        if self._schedule.keeps_input:
            self._input = hidden

    def before_layer(self, layer: int, probing: Probing | None, *, narrowed: bool) -> None:
        """Probe a layer that is about to run, before or after tokens leave there."""
        requests = self._schedule.probed(layer, narrowed=narrowed)
        if not requests or probing is None:
            return
        if not narrowed:
            self._forget(layer - 1)
        for rotary in (True, False):
            wanted = [one for one in requests if _rotary(one) == rotary]
            if wanted:
                self._collect(wanted, probing(rotary=rotary))

    def enter_layer(self, layer: int, hidden: Tensor) -> None:
        """Keep what enters a layer, `[B, Q, D]`, if it is needed at its cache."""
        self._forget(layer - 1)
        if self._schedule.keeps_entered:
            self._entered = hidden

    def attended(self, layer: int, attended: Callable[[], Attended]) -> None:
        """A layer has computed its attention."""
        requests = self._schedule.attended(layer)
        if requests:
            self._collect(requests, attended())

    # -- at a stage's site

    def at(self, place: Place, sample: Sample, rows: Tensor) -> Callable[[Signal[Any]], Any]:
        """What a stage reads signals with.

        Args:
            place: Where it acts.
            sample: On which sample.
            rows: `[N]`, or `[H, N]` at a cache: its candidates.
        """

        def collect(signal: Signal[Any]) -> Any:
            site = place.step.stage.site
            free = (Hidden(),) if place.stored is None else (Keys(), Values())
            if signal not in place.step.stage.needs and signal not in free:
                name = place.step.stage.name
                raise RecipeError(f"{name} at {site} reads {signal}, which its needs do not name")
            return self._value(signal, place, sample, rows)

        return collect

    def _value(self, signal: Signal[Any], place: Place, sample: Sample, rows: Tensor) -> Any:
        if isinstance(signal, Question):
            return self._given.question
        if isinstance(signal, Frames):
            return self._frames[sample.number]
        if isinstance(signal, EncoderSignal):
            found = sample.encoder(signal)
            return found if signal.per == "view" else _take(found, rows)
        if isinstance(signal, Text):
            text = sample.text_after if signal.after else sample.text
            return self._of_input(place, sample, text)
        if isinstance(signal, Hidden):
            return self._hidden(signal, place, sample, rows)
        if isinstance(signal, Attention | Keys | Values):
            return self._of_layer(signal, place, sample, rows)
        raise RecipeError(f"{place.step.stage.name} asks for {signal}, which is no known signal")

    def _of_input(self, place: Place, sample: Sample, tokens: Tensor) -> Tensor:
        """What entered the model at `[K]` indices into the input, `[K, D]`."""
        at_input = isinstance(place.step.stage.site, Input)
        source = place.hidden if at_input else self._input
        assert source is not None, "the schedule keeps the input for those that need it"
        return source[sample.number, tokens.to(source.device)].to(tokens.device)

    def _hidden(self, signal: Hidden, place: Place, sample: Sample, rows: Tensor) -> Tensor:
        alike = rows if rows.ndim == 1 else rows[0] if _alike(rows) else rows
        tokens = sample.layout.position[alike] - self._flight.past  # [N] or [H, N]
        if signal.layer == INPUT:
            return self._of_input(place, sample, tokens)
        source = self._entered if place.hidden is None else place.hidden
        assert source is not None, "the schedule keeps what enters a layer for its cache"
        where = self._flight.locate(sample.number, tokens.flatten()).view(tokens.shape)
        # Stages work on one device, whichever the layer is on.
        return source[sample.number, where.to(source.device)].to(where.device)

    def _of_layer(
        self, signal: Attention | Keys | Values, place: Place, sample: Sample, rows: Tensor
    ) -> Tensor:
        request = self._schedule.request(place.step, signal, place.layer)
        # What a stage at the cache before this one has merged is no longer what was collected.
        merged = place.stored is not None and request.layer == place.layer and _is_stored(signal)
        if merged or request not in self._found:
            assert place.stored is not None, "what is not collected is stored"
            assert not isinstance(signal, Attention), "attention is always collected"
            return self._stored(signal, place.stored, sample, rows)
        alive, values = self._found[request][sample.number]
        if not isinstance(signal, Attention) and signal.of == "text":
            return values
        rows = rows if rows.ndim == 1 or not _alike(rows) else rows[0]
        if rows.ndim == 1 and len(rows) == len(alive):
            return values
        places = torch.searchsorted(alive, rows)
        return _take_heads(values, places, -1 if isinstance(signal, Attention) else -2)

    def _stored(
        self, signal: Keys | Values, layer: PrunedLayer, sample: Sample, rows: Tensor
    ) -> Tensor:
        """Entries of a layer's cache, `[H, N, d]`."""
        entries = layer.keys if isinstance(signal, Keys) else layer.values
        if signal.of == "text":
            where = self._flight.locate(sample.number, sample.text)
            columns = where + entries.shape[2] - self._flight.rows.shape[1]
        else:
            columns = columns_of(sample, rows, self._flight, entries.shape[2])
        columns = columns.expand(entries.shape[1], -1)[..., None].to(entries.device)
        stored = entries[sample.number]
        return stored.gather(1, columns.expand(-1, -1, stored.shape[-1])).to(rows.device)

    # -- of layers

    def _forget(self, layer: int) -> None:
        """Let go of what was collected before a layer: stages look one layer back at most."""
        self._found = {one: found for one, found in self._found.items() if one.layer >= layer}

    def _collect(self, requests: list[Request], attended: Attended) -> None:
        stored = attended.keys.shape[2]
        columns = [
            columns_of(sample, sample.alive, self._flight, stored) for sample in self._samples
        ]
        for request in requests:
            signal = request.signal
            if isinstance(signal, Attention):
                queries = [self._asking(request, signal, sample) for sample in self._samples]
                found = attention_rows(attended, queries, columns, signal, request.grouped)
            else:
                source = attended.keys if isinstance(signal, Keys) else attended.values
                where = columns if signal.of == "media" else self._text_columns(stored)
                found = [
                    source[sample.number].index_select(1, one.to(source.device))
                    for sample, one in zip(self._samples, where, strict=True)
                ]
            self._found[request] = [
                _Found(sample.alive, values.to(sample.alive.device))
                for sample, values in zip(self._samples, found, strict=True)
            ]

    def _text_columns(self, stored: int) -> list[Tensor]:
        ahead = stored - self._flight.rows.shape[1]
        return [self._flight.locate(one.number, one.text) + ahead for one in self._samples]

    def asking(self, sample: Sample, signal: Attention) -> Tensor:
        """Which hidden states in flight of a sample ask, `[R]`: its last tokens, or its text.

        Raises:
            RecipeError: There is no text after the media.
        """
        if signal.queries == "text":
            tokens = sample.text_after
            if not len(tokens):
                raise RecipeError(
                    "the attention of the text after the media was asked for, and the prompt ends "
                    "with its media; put the question last, or use queries=1"
                )
        else:
            assert isinstance(signal.queries, int), "a stage's own queries are looked up elsewhere"
            tokens = sample.newest(signal.queries, self._flight.past)
        return self._flight.locate(sample.number, tokens)

    def _asking(self, request: Request, signal: Attention, sample: Sample) -> Tensor:
        if request.own is None:
            return self.asking(sample, signal)
        step = self._schedule.steps[request.own]
        tokens = self._own_queries(step, sample, request.layer)
        return self._flight.locate(sample.number, tokens)

    def _own_queries(self, step: Step, sample: Sample, layer: int) -> Tensor:
        stage = step.stage
        rows = sample.candidates(stage)
        if isinstance(stage.site, Cache):
            rows = rows.expand(self._schedule.adapter.shape.kv_heads, -1)
        candidates = Candidates(
            layout=sample.layout, rows=rows, shape=self._schedule.adapter.shape, layer=layer
        )
        chosen = stage.queries(candidates)
        if chosen.ndim != 1 or not bool(torch.isin(chosen, sample.alive).all()) or not len(chosen):
            raise RecipeError(
                f"{stage.name} must name the rows [R] of candidates that ask, at least one, got "
                f"{chosen.tolist()}"
            )
        return sample.layout.position[chosen] - self._flight.past


def _rotary(request: Request) -> bool:
    return isinstance(request.signal, Values) or request.signal.rotary


def _is_stored(signal: Attention | Keys | Values) -> bool:
    """Whether a cache holds it."""
    return isinstance(signal, Values) or (isinstance(signal, Keys) and signal.rotary)


def _alike(rows: Tensor) -> bool:
    """Whether all heads have the same candidates, as long as no cache stage has pruned."""
    return rows.ndim == 1 or rows.stride(0) == 0 or len(rows) == 1


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """Of `[P, ...]` the candidates, `[N, ...]`; `[H, N, ...]` where heads have different ones."""
    return values[rows if rows.ndim == 1 or not _alike(rows) else rows[0]]


def _take_heads(values: Tensor, places: Tensor, dim: int) -> Tensor:
    """Pick along an axis of candidates: places `[N]`, or `[H, N]` for each key-value head.

    Args:
        values: `[A, R, n]`, `[A, n]` or `[n]` with `dim=-1`; `[H, n, d]` with `dim=-2`. `A` heads.
        places: Where.
        dim: The axis.
    """
    if places.ndim == 1:
        return values.index_select(dim, places.to(values.device))
    several = places.repeat_interleave(len(values) // len(places), dim=0)  # [A, N]
    while several.ndim < values.ndim:
        several = several.unsqueeze(-1 if dim == -2 else 1)
    shape = list(values.shape)
    shape[dim] = places.shape[-1]
    return values.gather(dim, several.to(values.device).expand(shape))
