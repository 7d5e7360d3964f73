"""One prompt on its way through a pruned model: who is alive, and what was decided."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from tokenprune.core.context import Context, Lifetime
from tokenprune.core.indices import pad_left
from tokenprune.core.recipe import Step
from tokenprune.core.selection import Merge, Selection
from tokenprune.core.site import Layer
from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.checks import check_selection, of_kinds
from tokenprune.engine.flight import Flight
from tokenprune.engine.laid import LaidPrompt
from tokenprune.engine.merges import absorb_entries, real_pairs, translate
from tokenprune.engine.prompt import Given, Sample
from tokenprune.engine.schedule import Schedule
from tokenprune.engine.sequence import Sequence
from tokenprune.engine.signals import Collector, Place, columns_of
from tokenprune.report.report import Call, Decision

__all__ = ["Prefill"]

T = TypeVar("T")


class Prefill:
    """Runs the stages of a recipe on one prompt.

    Args:
        schedule: Which stages act where.
        prompt: The prompt.
        real: `[B, S]` bool, False at padding; None if there is none.
        flight: Its tokens in flight.
        sequence: The sequence that it goes on.
        given: What the caller knows.

    Attributes:
        call: The record that goes into the report.
        samples: One for each row of the batch.
        signals: What is collected for stages.
    """

    def __init__(
        self,
        schedule: Schedule,
        prompt: LaidPrompt,
        real: Tensor | None,
        flight: Flight,
        sequence: Sequence,
        given: Given,
    ) -> None:
        past = flight.past
        self._shape = shape = schedule.adapter.shape
        self._flight = flight
        self._sequence = sequence
        self._group = prompt.group
        self.call = Call(layouts=list(prompt.layouts), length=sequence.end)
        real = None if real is None else real.cpu()
        self.samples = []
        for number, layout in enumerate(prompt.layouts):
            length = prompt.length
            mask = torch.ones(length, dtype=torch.bool) if real is None else real[number].clone()
            mask[layout.position - past] = False
            text = mask.nonzero()[:, 0]
            last = int(layout.position[-1]) - past if len(layout) else -1
            self.samples.append(
                Sample(
                    number=number,
                    layout=layout.to(prompt.device),
                    alive=torch.arange(len(layout)).to(prompt.device),
                    text=text.to(prompt.device),
                    text_after=text[text > last].to(prompt.device),
                    encoder=prompt.encoders[number],
                    modalities=frozenset(layout.modality.tolist()),
                )
            )
        self.entries = torch.zeros(len(self.samples), shape.layers, shape.kv_heads, dtype=torch.int)
        self.signals = Collector(schedule, self.samples, flight, given, prompt.frames)

    @property
    def alive(self) -> list[Tensor]:
        """For each sample the rows of its layout that are still there."""
        return [sample.alive for sample in self.samples]

    def has_changed(self, before: list[Tensor]) -> bool:
        """Whether fewer are alive than before in any sample."""
        pairs = zip(before, self.samples, strict=True)
        return any(len(old) != len(sample.alive) for old, sample in pairs)

    # -- hidden states

    def prune(self, step: Step, layer: int, hidden: Tensor) -> list[tuple[Sample, Merge]]:
        """Run a step at an `Input` or `Layer` site on the hidden states `[B, Q, D]`.

        Args:
            step: The step.
            layer: Decoder layer, from 0; -1 at the input.
            hidden: What is about to enter it.

        Returns:
            What is to be merged: rows of a merge are rows of the sample's layout.
        """
        place = Place(step, layer, hidden=hidden)
        merges = []
        for sample in self.samples:
            rows = sample.candidates(step.stage)
            if not len(rows):
                continue
            selection = self._select(place, sample, rows)
            if selection is None:
                continue
            kept = rows[selection.index]
            merge = translate(selection.merge, rows)
            if merge is not None:
                merges.append((sample, merge))
            self._record(place, sample, rows, kept, merge)
            if len(rows) == len(sample.alive):
                sample.alive = kept
            else:
                others = sample.alive[~torch.isin(sample.alive, rows)]
                sample.alive = torch.cat([others, kept]).sort().values
        return merges

    def _select(self, place: Place, sample: Sample, rows: Tensor) -> Selection | None:
        """Let a stage choose among candidates; None, recorded, if it is known to keep all."""
        stage = place.step.stage
        context = Context(
            layout=sample.layout,
            rows=rows,
            shape=self._shape,
            layer=None if place.layer < 0 else place.layer,
            collect=self.signals.at(place, sample, rows),
            make_state=lambda kind, lives: self._state(place.step, sample, kind, lives),
        )
        budget = stage.budget(context)
        if budget.least >= len(context):
            self._record(place, sample, rows, rows, None)
            return None
        selection = stage.select(context)
        check_selection(stage, selection, context, budget)
        return selection

    def _state(self, step: Step, sample: Sample, kind: type[T], lives: Lifetime) -> T:
        if lives == "prompt":
            state: T = sample.state.setdefault((step.number, kind), kind())
        else:
            state = self._sequence.state_of(step.number, kind, sample.number)
        return state

    def tokens(self) -> list[Tensor]:
        """For each sample the indices into the input of all that is alive, text included."""
        return [
            torch.cat([s.text, s.layout.position[s.alive] - self._flight.past]).sort().values
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
        self, steps: list[Step], number: int, layer: PrunedLayer
    ) -> tuple[Tensor, bool] | None:
        """Run the steps on the cache of one layer.

        Returns:
            The columns to keep, `[B, H, S']`, and whether they have holes; None to keep all.
        """
        kept = [self._prune_entries(sample, steps, number, layer) for sample in self.samples]
        if all(one is None for one in kept):
            return None
        columns = [
            self._columns(sample, layer, one)
            for sample, one in zip(self.samples, kept, strict=True)
        ]
        return pad_left(columns), len({one.shape[-1] for one in columns}) > 1

    def _prune_entries(
        self, sample: Sample, steps: list[Step], number: int, layer: PrunedLayer
    ) -> Tensor | None:
        """Which rows of the layout each head of one sample keeps, `[H, K]`; None for all."""
        heads = layer.keys.shape[1]
        rows = sample.alive.expand(heads, -1)
        changed = False
        for step in steps:
            stage = step.stage
            candidates = rows if sample.all_on(stage) else of_kinds(stage, sample.on(stage), rows)
            if not candidates.shape[1]:
                continue
            place = Place(step, number, stored=layer)
            with torch.no_grad():  # what is decided, weights included, is constant to gradients
                selection = self._select(place, sample, candidates)
            if selection is None:
                continue
            kept = _pick(candidates, selection.index)
            merge = translate(selection.merge, candidates)
            self._record(place, sample, candidates, kept, merge)
            if merge is not None:
                self._absorb(sample, layer, merge)
            if kept.shape[1] == candidates.shape[1]:
                continue
            rows = kept if candidates is rows else _without(rows, candidates, kept)
            changed = True
        self.entries[sample.number, number] = rows.shape[1]
        return rows if changed else None

    def _absorb(self, sample: Sample, layer: PrunedLayer, merge: Merge) -> None:
        """Merge entries of one sample in a layer's cache: `[H, M]` rows of the layout."""
        ends = merge.source, merge.target
        stored, position = layer.keys.shape[2], sample.layout.position
        source, target = (columns_of(sample, one, self._flight, stored) for one in ends)
        absorb_entries(layer, sample.number, source, target, merge)
        real = real_pairs(merge).to(position.device)
        self._sequence.join(*(position[one[real]] for one in ends))

    def _columns(self, sample: Sample, layer: PrunedLayer, kept: Tensor | None) -> Tensor:
        """The columns `[H, K]` of a layer's cache that one sample keeps.

        Args:
            sample: The sample.
            layer: The cache.
            kept: `[H, K]` rows of the layout; None for all that are alive.
        """
        flight, device = self._flight, sample.alive.device
        heads, stored = layer.keys.shape[1], layer.keys.shape[2]
        media = columns_of(sample, sample.alive, flight, stored)
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
        columns = columns_of(sample, rows, flight, stored)
        columns = torch.cat([other.expand(len(columns), -1), columns], dim=-1).sort(dim=-1).values
        return columns.expand(heads, -1)

    def _record(
        self, place: Place, sample: Sample, rows: Tensor, kept: Tensor, merge: Merge | None
    ) -> None:
        position, stage = sample.layout.position, place.step.stage
        site = stage.site
        self.call.decisions.append(
            Decision(
                method=stage.name,
                site=site,
                layer=site.index if isinstance(site, Layer) else max(0, place.layer),
                sample=sample.number,
                candidates=rows.shape[-1],
                kept=position[kept],
                merge=translate(merge, position),
                step=place.step.number,
                length=None if self._group is None else self._sequence.end,
                group=self._group,
            )
        )


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """The rows `[H, K]` that a selection keeps of `[H, N]`, as one set where heads agree."""
    if index.ndim == 1 and rows.stride(0) == 0:
        return rows[0][index].expand(len(rows), -1)
    return rows.gather(1, index.expand(len(rows), -1))


def _without(rows: Tensor, candidates: Tensor, kept: Tensor) -> Tensor:
    """The rows `[H, N]` of each head, of whose candidates only some are kept: `[H, K]`."""
    parts = []
    for own, there, left in zip(rows, candidates, kept, strict=True):
        others = own[~torch.isin(own, there)]
        parts.append(torch.cat([others, left]).sort().values)
    return torch.stack(parts)
