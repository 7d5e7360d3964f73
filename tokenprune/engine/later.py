"""When stages act on what was stored before: which of them, in one forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokenprune.core.recipe import Step
from tokenprune.core.signal import Attention
from tokenprune.core.site import Cache as CacheSite
from tokenprune.engine.cache import PrunedLayer, cache_bytes, full_cache_bytes
from tokenprune.engine.entries import count_entries
from tokenprune.engine.flight import Flight
from tokenprune.engine.late import LateStages, remember_query
from tokenprune.engine.prefill import Prefill
from tokenprune.engine.prompt import Given
from tokenprune.engine.rows import Attended
from tokenprune.engine.schedule import Schedule
from tokenprune.engine.sequence import Sequence

__all__ = ["Later"]


class Later:
    """Lets stages act after the prefill, and while tokens are generated.

    Args:
        schedule: Which stages act where.
        sequence: What the cache holds.
        cache: The cache; None without one.
        given: What the caller knows.
    """

    def __init__(
        self, schedule: Schedule, sequence: Sequence, cache: Cache | None, given: Given
    ) -> None:
        self._schedule = schedule
        self._sequence = sequence
        self._cache = cache
        self._given = given
        self._stages: LateStages | None = None
        self._decodes = False

    def begin(self, flight: Flight, prefill: Prefill | None, batch: int) -> None:
        """A forward begins.

        Args:
            flight: Its tokens.
            prefill: The prompt that it brings; None if it brings no media.
            batch: Rows of the batch.
        """
        sequence, schedule = self._sequence, self._schedule
        sequence.decides = bool(schedule.decode)
        if self._cache is None or not sequence.prompts or self._given.more:
            return
        steps: list[Step] = []
        if sequence.settled < len(sequence.prompts):
            steps = schedule.after_prefill
        elif flight.length == 1:
            self._decodes = True
            sequence.decoded += 1
            steps = [step for step in schedule.decode if _is_due(step, sequence.decoded)]
        steps = [*schedule.whole, *steps]
        if not steps:
            return

        def asking(sample: int, signal: Attention) -> Tensor:
            if prefill is not None:
                return prefill.signals.asking(prefill.samples[sample], signal)
            every = torch.arange(flight.rows.shape[1], device=flight.rows.device)
            return every if signal.queries == "text" else every[-int(signal.queries) :]

        state = (
            [{} for _ in range(batch)]
            if prefill is None
            else [sample.state for sample in prefill.samples]
        )
        self._stages = LateStages(schedule, steps, sequence, self._given, asking, state)

    def attended(self, number: int, attended: Callable[[], Attended], layer: PrunedLayer) -> None:
        """A layer has computed its attention."""
        if self._decodes and self._schedule.decode:
            remember_query(self._sequence, self._schedule, number, attended())
        if self._stages is not None:
            self._stages.attended(number, attended, layer)

    def prune(self, number: int, layer: PrunedLayer) -> None:
        """Run the steps that follow a layer's attention."""
        if self._stages is not None:
            with torch.no_grad():
                self._stages.prune(number, layer)

    def settle(self, prefill: Prefill | None) -> None:
        """The last layer has run: if the prompt is whole, run the steps that waited for it."""
        sequence = self._sequence
        if self._given.more or sequence.settled == len(sequence.prompts):
            return
        if self._stages is not None and self._cache is not None:
            with torch.no_grad():
                for number, layer in enumerate(self._cache.layers):
                    self._stages.settle(number, layer)
            self._count(self._cache, prefill)
        sequence.settled, sequence.decoded = len(sequence.prompts), 0

    def _count(self, cache: Cache, prefill: Prefill | None) -> None:
        """Count anew what the cache stores of each prompt."""
        before, after = full_cache_bytes(cache), cache_bytes(cache)
        for prompt in self._sequence.prompts:
            counts = count_entries(cache, prompt)
            prompt.call.media_entries = counts
            prompt.call.kv_bytes_before, prompt.call.kv_bytes_after = before, after
        if prefill is not None:
            prefill.entries = counts  # of the newest prompt


def _is_due(step: Step, decoded: int) -> bool:
    site = step.stage.site
    return isinstance(site, CacheSite) and decoded % site.every == 0
