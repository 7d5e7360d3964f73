"""One prompt on its way through a pruned model: who is alive, and what was decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters.base import Adapter, MediaCall
from tokenprune.core.context import (
    CacheContext,
    Context,
    LayerContext,
    ModelShape,
)
from tokenprune.core.indices import pad_left
from tokenprune.core.layout import MODALITIES, TokenLayout
from tokenprune.core.selection import Merge, Selection
from tokenprune.core.site import Input
from tokenprune.core.stage import Stage
from tokenprune.engine.cache import PrunedLayer
from tokenprune.errors import RecipeError, UnsupportedModelError
from tokenprune.report.report import Call, Decision

__all__ = ["Flight", "Prefill", "Sample"]


class Flight:
    """Which tokens of one forward are in flight, sample by sample.

    Attributes:
        past: Logical length before this forward.
        length: Tokens that the language model was called with.
        rows: `[B, Q]` logical index of each hidden state, -1 for holes.
        source: `[B, Q]` index of each into the language model's input, -1 for holes; None while
            all of it is in flight.
        holes: Whether `rows` has any.
    """

    def __init__(self, batch: int, past: int, length: int, device: torch.device) -> None:
        self.past = past
        self.length = length
        self.rows = torch.arange(past, past + length, device=device).expand(batch, length)
        self.source: Tensor | None = None
        self.holes = False
        self._tokens: list[Tensor] | None = None

    def locate(self, sample: int, tokens: Tensor) -> Tensor:
        """Where tokens of a sample, `[K]` indices into the input, are among its hidden states."""
        if self._tokens is None:
            return tokens
        present = self._tokens[sample]
        holes = self.rows.shape[1] - len(present)
        return torch.searchsorted(present, tokens) + holes

    def narrow(self, tokens: list[Tensor]) -> Tensor:
        """Go on with some tokens only.

        Args:
            tokens: For each sample the indices `[K]` into the input that go on, increasing.

        Returns:
            `[B, Q']`, where each new hidden state is among the present ones; -1 for holes.
        """
        gather = pad_left([self.locate(b, kept) for b, kept in enumerate(tokens)])
        self.source = pad_left(tokens)
        self.rows = torch.where(self.source >= 0, self.source + self.past, -1)
        self.holes = len({len(kept) for kept in tokens}) > 1
        self._tokens = tokens
        return gather


@dataclass
class Sample:
    """The state of one row of the batch.

    Attributes:
        number: The row.
        layout: Its `P` media tokens, on the model's device.
        alive: `[N]` rows of `layout` that are still there, increasing.
        text: `[T]` indices into the input of everything else but padding.
        encoder_map: Returns a map aligned to `layout`, `[P]`.
        memory: What stages keep for later ones, by method name.
    """

    number: int
    layout: TokenLayout
    alive: Tensor
    text: Tensor
    encoder_map: Callable[[str], Tensor]
    memory: dict[str, Any] = field(default_factory=dict)
    modalities: frozenset[int] = frozenset()

    def candidates(self, stage: Stage) -> Tensor:
        """Rows of `layout` that the stage may look at."""
        wanted = {MODALITIES[name] for name in stage.modalities}
        if self.modalities <= wanted:
            return self.alive
        modality = self.layout.modality[self.alive]
        return self.alive[torch.isin(modality, modality.new_tensor(sorted(wanted)))]


class Prefill:
    """Runs the stages of a recipe on one prompt.

    Attributes:
        call: The record that goes into the report.
        samples: One for each row of the batch.
    """

    def __init__(
        self,
        adapter: Adapter,
        shape: ModelShape,
        input_ids: Tensor,
        media: list[MediaCall],
        prompt: dict[str, Any],
        real: Tensor | None,
        past: int,
        frame_seconds: Sequence[Tensor] | None = None,
    ) -> None:
        self._shape = shape
        self._past = past
        laid_out = adapter.layouts(input_ids, media, prompt, past, frame_seconds)
        self.call = Call(layouts=[layout for layout, _ in laid_out], length=0)
        maps = _Maps(adapter, media)
        device, length = input_ids.device, input_ids.shape[1]
        real = None if real is None else real.cpu()
        self.samples = []
        for number, (layout, items) in enumerate(laid_out):
            text = torch.ones(length, dtype=torch.bool) if real is None else real[number].clone()
            text[layout.position - past] = False
            rows = torch.arange(len(layout))
            self.samples.append(
                Sample(
                    number=number,
                    layout=layout.to(device),
                    alive=rows.to(device),
                    text=text.nonzero()[:, 0].to(device),
                    encoder_map=maps.of(layout, items, device),
                    modalities=frozenset(layout.modality.tolist()),
                )
            )
        self.entries = torch.zeros(len(self.samples), shape.layers, shape.kv_heads, dtype=torch.int)

    # -- hidden states

    def prune(self, stage: Stage, hidden: Tensor, flight: Flight) -> list[tuple[Sample, Merge]]:
        """Run a stage at an `Input` or `Layer` site on the hidden states `[B, Q, D]`.

        Returns:
            What is to be merged: rows of a merge are rows of the sample's layout.
        """
        merges = []
        for sample in self.samples:
            candidates = sample.candidates(stage)
            if not len(candidates):
                continue
            layout = sample.layout[candidates]
            if stage.counts(layout) == len(candidates):
                self._record(stage, sample, candidates, candidates, None)
                continue
            where = flight.locate(sample.number, layout.position - self._past)
            # Stages work on one device, whichever the layer is on.
            features = hidden[sample.number, where.to(hidden.device)].to(where.device)
            selection = stage.select(self._context(stage, sample, candidates, layout, features))
            _check(stage, selection, layout, heads=None)
            kept = candidates[selection.index]
            merge = _translate(selection.merge, candidates)
            if merge is not None:
                merges.append((sample, merge))
            self._record(stage, sample, candidates, kept, merge)
            if len(candidates) == len(sample.alive):
                sample.alive = kept
            else:
                others = sample.alive[~torch.isin(sample.alive, candidates)]
                sample.alive = torch.cat([others, kept]).sort().values
        return merges

    def _context(
        self,
        stage: Stage,
        sample: Sample,
        candidates: Tensor,
        layout: TokenLayout,
        features: Tensor,
    ) -> Context:
        layer = getattr(stage.site, "index", None)
        common: dict[str, Any] = dict(
            layout=layout,
            features=features,
            shape=self._shape,
            memory=sample.memory,
            encoder_map=lambda name: sample.encoder_map(name)[candidates],
        )
        return Context(**common) if layer is None else LayerContext(**common, layer=layer)

    def tokens(self) -> list[Tensor]:
        """For each sample the indices into the input of all that is alive, text included."""
        return [
            torch.cat([s.text, s.layout.position[s.alive] - self._past]).sort().values
            for s in self.samples
        ]

    def enter_layer(self, layer: int) -> None:
        """Note how many media tokens a layer is about to store."""
        for sample in self.samples:
            self.entries[sample.number, layer] = len(sample.alive)

    # -- caches

    def leave_window(self, number: int, layer: PrunedLayer) -> None:
        """Note how many media tokens a layer with a sliding window still stores."""
        assert layer.index is not None
        for sample in self.samples:
            stored = torch.isin(sample.layout.position, layer.index[sample.number, 0])
            self.entries[sample.number, number] = int(stored.sum())

    def prune_cache(
        self,
        stages: list[Stage],
        number: int,
        layer: PrunedLayer,
        flight: Flight,
        attention: Tensor | None,
    ) -> tuple[Tensor, bool] | None:
        """Run the cache stages of one layer.

        Args:
            attention: `[B, heads, S]` of the last query, if a stage needs it.

        Returns:
            The columns to keep, `[B, H, S']`, and whether they have holes; None to keep all.
        """
        kept = [
            self._prune_entries(sample, stages, number, layer, flight, attention)
            for sample in self.samples
        ]
        if all(one is None for one in kept):
            return None
        heads, stored = layer.keys.shape[1], layer.keys.shape[2]
        columns = [
            self._columns(sample, layer, flight, one, heads, stored)
            for sample, one in zip(self.samples, kept, strict=True)
        ]
        return pad_left(columns), len({one.shape[-1] for one in columns}) > 1

    def _prune_entries(
        self,
        sample: Sample,
        stages: list[Stage],
        number: int,
        layer: PrunedLayer,
        flight: Flight,
        attention: Tensor | None,
    ) -> Tensor | None:
        """Which rows of the layout each head of one sample keeps, `[H, K]`; None for all."""
        heads = layer.keys.shape[1]
        rows = sample.alive.expand(heads, -1)
        changed = False
        for stage in stages:
            candidates = sample.candidates(stage)
            if len(candidates) != len(sample.alive):
                raise RecipeError(
                    f"{stage.name} prunes only some of the modalities {sorted(sample.modalities)} "
                    "of this prompt, which a cache stage cannot; use an input stage"
                )
            if not rows.shape[1]:
                continue
            layout = sample.layout[rows[0]]
            if stage.counts(layout) == rows.shape[1]:
                self._record(stage, sample, rows, rows, None, layer=number)
                continue
            context = _StoredEntries(self, sample, number, layer, flight, attention, rows)
            selection = stage.select(context)
            _check(stage, selection, layout, heads)
            if selection.index.shape[-1] == rows.shape[1]:
                self._record(stage, sample, rows, rows, None, layer=number)
                continue
            kept = rows.gather(1, selection.index.expand(heads, -1))
            self._record(stage, sample, rows, kept, None, layer=number)
            rows, changed = kept, True
        self.entries[sample.number, number] = rows.shape[1]
        return rows if changed else None

    def _columns(
        self,
        sample: Sample,
        layer: PrunedLayer,
        flight: Flight,
        kept: Tensor | None,
        heads: int,
        stored: int,
    ) -> Tensor:
        """The columns `[H, K]` of a layer's cache that one sample keeps."""
        device = sample.alive.device
        media = _columns_of(sample, sample.alive, flight, stored, self._past)
        other = torch.ones(stored, dtype=torch.bool, device=device).index_fill_(0, media, False)
        fresh = flight.rows.shape[1]
        absent = fresh - len(sample.text) - len(sample.alive)  # holes and padding of this forward
        if absent:
            real = torch.zeros(fresh, dtype=torch.bool, device=device)
            real[flight.locate(sample.number, sample.text)] = True
            other[stored - fresh :] &= real
        count = stored - fresh + len(sample.text)
        if layer.holes and stored > fresh:
            assert layer.index is not None
            valid = layer.index[sample.number, 0] >= 0
            other &= valid
            count = int(other.sum())
        other = other.to(torch.uint8).argsort(stable=True)[stored - count :]
        rows = sample.alive[None] if kept is None else kept
        columns = _columns_of(sample, rows, flight, stored, self._past)
        columns = torch.cat([other.expand(len(columns), -1), columns], dim=-1).sort(dim=-1).values
        return columns.expand(heads, -1)

    def _record(
        self,
        stage: Stage,
        sample: Sample,
        candidates: Tensor,
        kept: Tensor,
        merge: Merge | None,
        layer: int | None = None,
    ) -> None:
        position = sample.layout.position
        self.call.decisions.append(
            Decision(
                method=stage.name,
                site=stage.site,
                layer=getattr(stage.site, "index", 0) if layer is None else layer,
                sample=sample.number,
                candidates=candidates.shape[-1],
                kept=position[kept],
                merge=_translate(merge, position),
            )
        )


def _columns_of(sample: Sample, rows: Tensor, flight: Flight, stored: int, past: int) -> Tensor:
    """The cache columns of rows of a layout: what is in flight was stored last."""
    position = sample.layout.position[rows] - past
    located = flight.locate(sample.number, position.flatten()).view(position.shape)
    return located + stored - flight.rows.shape[1]


class _StoredEntries(CacheContext):
    """A cache context that gathers keys and values only if a stage asks for them."""

    def __init__(
        self,
        prefill: Prefill,
        sample: Sample,
        number: int,
        layer: PrunedLayer,
        flight: Flight,
        attention: Tensor | None,
        rows: Tensor,
    ) -> None:
        self.layer = number
        self.layout = sample.layout
        self.rows = rows
        self.shape = prefill._shape
        self.memory = sample.memory
        stored = layer.keys.shape[2]
        self._columns = _columns_of(sample, rows, flight, stored, prefill._past)
        self._stored = layer.keys[sample.number], layer.values[sample.number]
        if attention is None:
            self.attention = None
        else:
            share = attention.shape[1] // len(rows)
            columns = self._columns.repeat_interleave(share, dim=0)
            rows_of_heads = attention[sample.number].gather(1, columns.to(attention.device))
            self.attention = rows_of_heads.to(columns.device)

    @cached_property
    def keys(self) -> Tensor:  # type: ignore[override]  # a field of the base, gathered late here
        return self._gather(self._stored[0])

    @cached_property
    def values(self) -> Tensor:  # type: ignore[override]
        return self._gather(self._stored[1])

    def _gather(self, stored: Tensor) -> Tensor:
        columns = self._columns[..., None].to(stored.device)
        gathered = stored.gather(1, columns.expand(-1, -1, stored.shape[-1]))
        return gathered.to(self._columns.device)


class _Maps:
    """Encoder maps, aligned once for each encoder call."""

    def __init__(self, adapter: Adapter, media: list[MediaCall]) -> None:
        self._adapter = adapter
        self._media = media
        self._aligned: dict[tuple[str, int], list[Tensor]] = {}

    def of(
        self, layout: TokenLayout, items: list[tuple[int, int]], device: torch.device
    ) -> Callable[[str], Tensor]:
        done: dict[str, Tensor] = {}

        def encoder_map(name: str) -> Tensor:
            if name not in done:
                done[name] = self._assemble(name, layout, items, device)
            return done[name]

        return encoder_map

    def _assemble(
        self, name: str, layout: TokenLayout, items: list[tuple[int, int]], device: torch.device
    ) -> Tensor:
        full = torch.full((len(layout),), torch.nan, device=device)
        for number, (call, index) in enumerate(items):
            if self._adapter.tower(self._media[call].modality) is None:
                continue
            rows = (layout.item == number).nonzero()[:, 0]
            full[rows.to(device)] = self._align(name, call)[index].to(device, torch.float32)
        return full

    def _align(self, name: str, number: int) -> list[Tensor]:
        if (name, number) not in self._aligned:
            call = self._media[number]
            if name not in call.maps:
                raise UnsupportedModelError(
                    f"{name} reads the encoder's attention, but the {call.modality} features came "
                    "without running the encoder here; give pixels, inside `with prune(...)`"
                )
            self._aligned[name, number] = self._adapter.align(call, call.maps[name])
        return self._aligned[name, number]


def _translate(merge: Merge | None, names: Tensor) -> Merge | None:
    if merge is None:
        return None
    return Merge(names[merge.source], names[merge.target], merge.weight)


def _check(stage: Stage, selection: Selection, layout: TokenLayout, heads: int | None) -> None:
    """Hold a stage to the count it promised, before anything is cut."""
    shape = selection.index.shape
    promised = stage.counts(layout)
    if promised is not None and shape[-1] != promised:
        raise RecipeError(
            f"{stage.name} promised to keep {promised} of {len(layout)} tokens and kept {shape[-1]}"
        )
    if (selection.index.ndim == 2 and shape[0] != heads) or not 0 < shape[-1] <= len(layout):
        raise RecipeError(
            f"{stage.name} at {stage.site} must keep 1 to {len(layout)} tokens, [K] or "
            f"[{heads}, K] at a cache; got {tuple(shape)}"
        )
    if selection.merge is not None and not isinstance(stage.site, Input):
        raise RecipeError(f"{stage.name} cannot merge tokens at {stage.site}, only at the input")
