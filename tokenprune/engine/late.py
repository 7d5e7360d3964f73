"""Stages that act on what was stored before: after the prefill, or while tokens are generated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from tokenprune.core.context import Context, Lifetime
from tokenprune.core.recipe import Step
from tokenprune.core.selection import Merge, Selection
from tokenprune.core.signal import Attention
from tokenprune.core.site import Cache
from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.checks import check_selection, of_kinds
from tokenprune.engine.entries import Entries, Held, StoredTokens, held_by, join_layouts
from tokenprune.engine.masks import LazyMask
from tokenprune.engine.merges import real_pairs, translate
from tokenprune.engine.prompt import Given
from tokenprune.engine.rows import Attended, attention_rows
from tokenprune.engine.schedule import Schedule, covering
from tokenprune.engine.sequence import Asked, Sequence
from tokenprune.report.report import Decision

__all__ = ["LateStages", "remember_query"]

T = TypeVar("T")

_SINCE: Final = "since"


class LateStages:
    """The stages of one forward that choose among all media entries of its sequence.

    Args:
        schedule: Whose shape of the model counts.
        steps: The steps that act in this forward.
        sequence: What the cache holds.
        given: What the caller knows.
        asking: For each sample, which of its hidden states in flight ask: for a number of the last
            tokens, or the text after the media.
        state: For each sample, what stages keep while this prompt is prefilled.
    """

    def __init__(
        self,
        schedule: Schedule,
        steps: list[Step],
        sequence: Sequence,
        given: Given,
        asking: Callable[[int, Attention], Tensor],
        state: list[dict[tuple[int, type[Any]], Any]],
    ) -> None:
        self._schedule = schedule
        self._steps = steps
        self._sequence = sequence
        self._given = given
        self._asking = asking
        device = sequence.prompts[0].alive[0].device
        self._samples = [
            StoredTokens(
                number=number,
                layout=join_layouts(sequence.prompts, number).to(device),
                state=kept,
            )
            for number, kept in enumerate(state)
        ]
        self._found: dict[tuple[int, int, Attention], list[tuple[Held, Tensor]]] = {}

    def attended(self, number: int, attended: Callable[[], Attended], layer: PrunedLayer) -> None:
        """Collect the attention of a layer, which has just stored its keys and values."""
        steps = covering(self._steps, number)
        wanted = [
            (step, signal)
            for step in steps
            for signal in step.stage.needs
            if isinstance(signal, Attention)
        ]
        if not wanted or layer.window is not None:
            return
        now = attended()
        held = [held_by(layer, sample) for sample in self._samples]
        for step, signal in wanted:
            asked = self._since(step, number, now) if signal.queries == _SINCE else now
            rows = attention_rows(
                asked, self._queries(signal, asked), [one.columns for one in held], signal, True
            )
            self._found[number, step.number, signal] = list(zip(held, rows, strict=True))

    def prune(self, number: int, layer: PrunedLayer) -> None:
        """Run the steps that follow a layer's attention, on its cache."""
        self._run([step for step in self._steps if not _waits(step)], number, layer)

    def settle(self, number: int, layer: PrunedLayer) -> None:
        """Run the steps that wait for the last layer, on the cache of one layer."""
        self._run([step for step in self._steps if _waits(step)], number, layer)

    def _run(self, steps: list[Step], number: int, layer: PrunedLayer) -> None:
        steps = covering(steps, number)
        if not steps or layer.window is not None:
            return
        for step in steps:
            attention = functools.partial(self._attention, number, step.number)
            entries = Entries(layer, self._samples, attention, self._given.question)
            entries.keep([self._kept(step, number, sample, entries) for sample in self._samples])

    def _kept(
        self, step: Step, number: int, sample: StoredTokens, entries: Entries
    ) -> Tensor | None:
        """Which rows of its layout each head of a sample keeps, `[H, K]`; None for all."""
        rows = entries.rows(sample.number)
        candidates = of_kinds(step.stage, sample.on(step.stage), rows)
        if not candidates.shape[1]:
            return None
        selection = self._select(step, number, sample, candidates, entries)
        kept, merge = candidates, None
        if selection is not None:
            index = selection.index.expand(len(candidates), -1)
            kept = candidates.gather(1, index)
            merge = translate(selection.merge, candidates)
        if merge is not None:
            entries.absorb(sample, merge)
            real = real_pairs(merge).to(rows.device)
            ends = (sample.layout.position[one[real]] for one in (merge.source, merge.target))
            self._sequence.join(*ends)
        self._record(step, number, sample, candidates, kept, merge)
        if kept.shape[1] == candidates.shape[1]:
            return None
        if candidates.shape[1] == rows.shape[1]:
            return kept
        parts = [
            torch.cat([own[~torch.isin(own, there)], left]).sort().values
            for own, there, left in zip(rows, candidates, kept, strict=True)
        ]
        return torch.stack(parts)

    def _select(
        self, step: Step, number: int, sample: StoredTokens, rows: Tensor, entries: Entries
    ) -> Selection | None:
        """Let a stage choose; None if it is known to keep all."""
        stage = step.stage
        context = Context(
            layout=sample.layout,
            rows=rows,
            shape=self._schedule.adapter.shape,
            layer=number,
            alive=torch.cat([prompt.alive[sample.number] for prompt in self._sequence.prompts]),
            collect=entries.collect(sample, rows, stage),
            make_state=lambda kind, lives: self._state(step, sample, kind, lives),
        )
        budget = stage.budget(context)
        if budget.least >= len(context):
            return None
        selection = stage.select(context)
        check_selection(stage, selection, context, budget)
        return selection

    def _state(self, step: Step, sample: StoredTokens, kind: type[T], lives: Lifetime) -> T:
        if lives == "prompt":
            state: T = sample.state.setdefault((step.number, kind), kind())
        else:
            state = self._sequence.state_of(step.number, kind, sample.number)
        return state

    def _record(
        self,
        step: Step,
        number: int,
        sample: StoredTokens,
        rows: Tensor,
        kept: Tensor,
        merge: Merge | None,
    ) -> None:
        self._sequence.prompts[-1].call.decisions.append(
            Decision(
                method=step.stage.name,
                site=step.stage.site,
                layer=number,
                sample=sample.number,
                candidates=rows.shape[1],
                kept=sample.layout.position[kept],
                merge=translate(merge, sample.layout.position),
                step=step.number,
                length=self._sequence.end,
                of_sequence=True,
            )
        )

    # -- attention

    def _queries(self, signal: Attention, attended: Attended) -> list[Tensor]:
        if signal.queries == _SINCE:
            every = torch.arange(attended.query.shape[2], device=attended.query.device)
            return [every for _ in self._samples]
        return [self._asking(sample.number, signal) for sample in self._samples]

    def _since(self, step: Step, number: int, attended: Attended) -> Attended:
        """The queries since the last decision of a step, with what is stored now."""
        site = step.stage.site
        every = site.every if isinstance(site, Cache) else 1
        asked = self._sequence.asked.get(number, [])[-every:]
        query = torch.cat([one.query for one in asked], dim=2)
        mask = attended.mask
        if not isinstance(mask, LazyMask):  # of the last query alone
            mask = LazyMask(causal_mask_function, None)
        rows = torch.cat([one.rows for one in asked], dim=1)
        return replace(attended, query=query, mask=mask, rows=rows)

    def _attention(
        self, number: int, step: int, signal: Attention, sample: StoredTokens, rows: Tensor
    ) -> Tensor:
        held, values = self._found[number, step, signal][sample.number]
        heads = max(len(held.rows), len(rows))
        known = held.rows.expand(heads, -1).contiguous()
        places = torch.searchsorted(known, rows.expand(heads, -1).contiguous())
        places = places.repeat_interleave(len(values) // heads, dim=0).to(values.device)
        if values.ndim == 3:
            places = places[:, None].expand(-1, values.shape[1], -1)
        return values.gather(-1, places).to(rows.device)


def _waits(step: Step) -> bool:
    site = step.stage.site
    return isinstance(site, Cache) and site.after == "prefill"


def remember_query(sequence: Sequence, schedule: Schedule, number: int, attended: Attended) -> None:
    """Keep the query of a decode step, for stages that look at all since their last decision."""
    steps = covering(schedule.decode, number)
    if any(isinstance(s, Attention) and s.queries == _SINCE for t in steps for s in t.stage.needs):
        every = max(site.every for site in (t.stage.site for t in steps) if isinstance(site, Cache))
        kept = sequence.asked.setdefault(number, [])
        kept.append(Asked(attended.query, attended.rows))
        del kept[:-every]
