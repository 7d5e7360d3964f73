"""One prompt on its way through a pruned model: who is alive, and what was decided."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters.base import Adapter
from tokenprune.core.context import (
    Context,
    LayerContext,
)
from tokenprune.core.indices import pad_left
from tokenprune.core.layout import TokenLayout
from tokenprune.core.selection import Merge, Selection
from tokenprune.core.site import Input
from tokenprune.core.stage import Stage
from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.flight import Flight
from tokenprune.engine.layouts import lay_out
from tokenprune.engine.prompt import Prompt, Sample
from tokenprune.engine.signals import EncoderMaps, StoredEntries, columns_of
from tokenprune.errors import RecipeError
from tokenprune.report.report import Call, Decision

__all__ = ["Prefill"]


class Prefill:
    """Runs the stages of a recipe on one prompt.

    Args:
        adapter: Of the model.
        prompt: The prompt.
        real: `[B, S]` bool, False at padding; None if there is none.
        past: Logical length before it.

    Attributes:
        call: The record that goes into the report.
        samples: One for each row of the batch.
    """

    def __init__(self, adapter: Adapter, prompt: Prompt, real: Tensor | None, past: int) -> None:
        self._shape = shape = adapter.shape
        self._past = past
        ids, calls, times = prompt.input_ids, prompt.calls, prompt.frame_seconds
        laid_out = lay_out(adapter, ids, calls, prompt.arguments, past, times)
        self.call = Call(layouts=[layout for layout, _ in laid_out], length=0)
        maps = EncoderMaps(adapter, calls)
        device, length = ids.device, ids.shape[1]
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

    @property
    def alive(self) -> list[Tensor]:
        """For each sample the rows of its layout that are still there."""
        return [sample.alive for sample in self.samples]

    def has_changed(self, before: list[Tensor]) -> bool:
        """Whether fewer are alive than before in any sample."""
        pairs = zip(before, self.samples, strict=True)
        return any(len(old) != len(sample.alive) for old, sample in pairs)

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
            promised = _promised(stage, layout)
            if promised == len(candidates):
                self._record(stage, sample, candidates, candidates, None)
                continue
            where = flight.locate(sample.number, layout.position - self._past)
            # Stages work on one device, whichever the layer is on.
            features = hidden[sample.number, where.to(hidden.device)].to(where.device)
            selection = stage.select(self._context(stage, sample, candidates, layout, features))
            _check(stage, selection, len(layout), promised)
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
            promised = _promised(stage, layout)
            if promised == rows.shape[1]:
                self._record(stage, sample, rows, rows, None, layer=number)
                continue
            context = StoredEntries(
                self._shape, self._past, sample, number, layer, flight, attention, rows
            )
            selection = stage.select(context)
            _check(stage, selection, len(layout), promised, heads)
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
        media = columns_of(sample, sample.alive, flight, stored, self._past)
        other = torch.ones(stored, dtype=torch.bool, device=device).index_fill_(0, media, False)
        fresh = flight.rows.shape[1]
        absent = fresh - len(sample.text) - len(sample.alive)  # holes and padding of this forward
        if absent:
            real = torch.zeros(fresh, dtype=torch.bool, device=device)
            real[flight.locate(sample.number, sample.text)] = True
            other[stored - fresh :] &= real
        count = stored - fresh + len(sample.text)
        if layer.holes and stored > fresh:
            valid = layer.index[sample.number, 0] >= 0
            other &= valid
            count = int(other.sum())
        other = other.to(torch.uint8).argsort(stable=True)[stored - count :]
        rows = sample.alive[None] if kept is None else kept
        columns = columns_of(sample, rows, flight, stored, self._past)
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


def _translate(merge: Merge | None, names: Tensor) -> Merge | None:
    if merge is None:
        return None
    return Merge(names[merge.source], names[merge.target], merge.weight)


def _promised(stage: Stage, layout: TokenLayout) -> int | None:
    """How many of these candidates a stage is going to keep; None if it is adaptive."""
    budget = stage.budget(layout)
    return None if budget is None or not budget.exact else budget.total


def _check(
    stage: Stage,
    selection: Selection,
    candidates: int,
    promised: int | None,
    heads: int | None = None,
) -> None:
    """Hold a stage to the count it promised, before anything is cut."""
    shape = selection.index.shape
    if promised is not None and shape[-1] != promised:
        raise RecipeError(
            f"{stage.name} promised to keep {promised} of {candidates} tokens and kept {shape[-1]}"
        )
    if (selection.index.ndim == 2 and shape[0] != heads) or not 0 < shape[-1] <= candidates:
        raise RecipeError(
            f"{stage.name} at {stage.site} must keep 1 to {candidates} tokens, [K] or "
            f"[{heads}, K] at a cache; got {tuple(shape)}"
        )
    if selection.merge is not None and not isinstance(stage.site, Input):
        raise RecipeError(f"{stage.name} cannot merge tokens at {stage.site}, only at the input")
