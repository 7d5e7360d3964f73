"""One call of the language model: which tokens are in flight, and what happens to them in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokenprune.core.indices import take
from tokenprune.core.selection import Merge
from tokenprune.engine.arguments import ArgumentCut, compact_positions
from tokenprune.engine.cache import PrunedLayer, adopt, cache_bytes, full_cache_bytes
from tokenprune.engine.deepstack import DeepStack, absorb_
from tokenprune.engine.flight import Flight
from tokenprune.engine.laid import LaidPrompt
from tokenprune.engine.later import Later
from tokenprune.engine.masks import padding_of
from tokenprune.engine.prefill import Prefill
from tokenprune.engine.prompt import Given, Sample
from tokenprune.engine.rows import Attended
from tokenprune.engine.schedule import Schedule
from tokenprune.engine.sequence import Prefilled, Sequence
from tokenprune.engine.signals import Probing
from tokenprune.report.report import Call

__all__ = ["Forward"]


class Forward:
    """A forward of the language model under a recipe.

    What calls it sees this order: `begin`, then for each layer `enter_layer`, `after_attention`
    and `leave_layer`, then `finish`. It knows nothing of hooks: `Run` calls it while a model runs,
    and a plan calls it with tokens that have no content.

    Args:
        schedule: Which stages act where.
        cache: Where keys and values go; None without a cache.
        batch: Rows of the batch.
        length: Tokens that the language model is called with.
        device: Where they are.
        given: What the caller knows.

    Attributes:
        schedule: Which stages act where.
        flight: The tokens in flight.
        sequence: What it goes on, shared by the layers of the cache.
        prefill: The prompt on its way through the layers; None if this forward brings no media.
    """

    def __init__(
        self,
        schedule: Schedule,
        cache: Cache | None,
        batch: int,
        length: int,
        device: torch.device,
        given: Given | None = None,
    ) -> None:
        self.schedule = schedule
        self._cache = cache
        self._given = given or Given()
        layers = schedule.adapter.shape.layers
        self.sequence = Sequence() if cache is None else adopt(cache, layers)
        self.flight = Flight(batch, self.sequence.end, length, device)
        self.prefill: Prefill | None = None
        self._later = Later(schedule, self.sequence, cache, self._given)
        self._deepstack: DeepStack | None = None
        self._narrows_at_once = False
        self.sequence.end += length
        self._show_rows()

    # -- in order

    def begin(self, kwargs: dict[str, Any], prompt: LaidPrompt | None) -> None:
        """Run the input stages.

        Args:
            kwargs: What the language model is called with; `inputs_embeds` `[B, S, D]` and what
                goes with them are replaced.
            prompt: None if this forward brings no media.
        """
        if self.schedule.input or self.schedule.layer:
            self._deepstack = DeepStack.taken_from(kwargs)
        if prompt is None:
            self._later.begin(self.flight, None, len(kwargs["inputs_embeds"]))
            compact_positions(kwargs, self.flight, self.sequence, None, self.schedule.compact)
            return
        real = padding_of(kwargs.get("attention_mask"))
        if real is not None:
            real = real[:, self.flight.past : self.sequence.end]
        prefill = self.prefill = Prefill(
            self.schedule, prompt, real, self.flight, self.sequence, self._given
        )
        self._hold(prefill)
        self._later.begin(self.flight, prefill, len(prefill.samples))
        hidden, before = kwargs["inputs_embeds"], prefill.alive
        for step in self.schedule.input:
            with torch.no_grad():  # what is decided, weights included, is constant to gradients
                merges = prefill.prune(step, -1, hidden)
            hidden = self._merge(hidden, merges)
        kwargs["inputs_embeds"] = hidden
        prefill.signals.enter_model(hidden)
        # Rows leave where the first layer begins: the model's own code before it sees all of them.
        self._narrows_at_once = prefill.has_changed(before)
        tokens = prefill.tokens() if self._narrows_at_once else None
        compact_positions(kwargs, self.flight, self.sequence, tokens, self.schedule.compact)

    def _hold(self, prefill: Prefill) -> None:
        """Let the sequence hold a prompt: of all its tokens, until layers have let some go."""
        alive = [torch.ones_like(sample.alive, dtype=torch.bool) for sample in prefill.samples]
        held = Prefilled(self.flight.past, prefill.call, alive, self._given.continues)
        self.sequence.prompts.append(held)

    def enter_layer(
        self, number: int, hidden: Tensor, probing: Probing | None = None
    ) -> Tensor | None:
        """Run the stages of a layer.

        Args:
            number: Of the decoder layer, from 0.
            hidden: `[B, Q, D]`, about to enter it.
            probing: Shows what the layer will attend with; None if nothing can.

        Returns:
            `[B, Q', D]`, what enters it instead; None if nothing changes here.
        """
        prefill = self.prefill
        if prefill is None:
            return None
        before, entered = prefill.alive, hidden
        prefill.signals.before_layer(number, probing, narrowed=False)
        for step in self.schedule.layer.get(number, ()):
            with torch.no_grad():
                merges = prefill.prune(step, number, hidden)
            hidden = self._merge(hidden, merges)
        prefill.enter_layer(number)
        if prefill.has_changed(before) or (number == 0 and self._narrows_at_once):
            gather = self.flight.narrow(prefill.tokens())
            self._show_rows()
            hidden = take(hidden, gather, 1)
        prefill.signals.enter_layer(number, hidden)
        return None if hidden is entered else hidden

    def probe_layer(self, number: int, probing: Probing) -> None:
        """Probe a layer with what really enters it, for the stages that look at it later."""
        if self.prefill is not None:
            self.prefill.signals.before_layer(number, probing, narrowed=True)

    def attended(
        self, number: int, attended: Callable[[], Attended], layer: PrunedLayer | None
    ) -> None:
        """Collect what stages ask of the attention that a layer has just computed."""
        with torch.no_grad():
            if self.prefill is not None:
                self.prefill.signals.attended(number, attended)
            if layer is not None:
                self._later.attended(number, attended, layer)

    def after_attention(self, number: int, layer: PrunedLayer) -> None:
        """Run the stages on the cache of a layer, which has just stored its keys and values.

        Args:
            number: Of the decoder layer, from 0.
            layer: Its cache.
        """
        prefill = self.prefill
        if prefill is not None:
            self._prune_cache(prefill, number, layer)
        self._later.prune(number, layer)
        if layer.evict() and prefill is not None:
            prefill.leave_window(number, layer)

    def leave_layer(self, number: int, hidden: Tensor) -> Tensor | None:
        """The hidden states `[B, Q, D]` that leave a layer, if they change here; None if not."""
        if self._deepstack is None or number >= len(self._deepstack.features):
            return None
        return self._deepstack.add(number, hidden, self.flight.source)

    def finish(self) -> Call | None:
        """The record of a prefill that brought media; None if this was none."""
        prefill, sequence = self.prefill, self.sequence
        if prefill is not None:
            alive = [sample.mask() for sample in prefill.samples]
            sequence.prompts[-1] = sequence.prompts[-1]._replace(alive=alive)
        self._later.settle(prefill)
        if prefill is None:
            return None
        call = prefill.call
        if self._cache is not None:
            call.media_entries = prefill.entries
            call.kv_bytes_before = full_cache_bytes(self._cache)
            call.kv_bytes_after = cache_bytes(self._cache)
        elif self.schedule.on_caches:
            call.warnings.append("use_cache=False: there is no cache to prune")
        return call

    def abandon(self) -> None:
        """The forward failed: what it brought is not held."""
        prompts = self.sequence.prompts
        if self.prefill is not None and prompts and prompts[-1].call is self.prefill.call:
            prompts.pop()

    # -- what layers and attention are told

    def layer(self, number: int) -> PrunedLayer | None:
        """The cache of a layer; None without a cache."""
        if self._cache is None:
            return None
        found: PrunedLayer = self._cache.layers[number]
        return found

    def cut_arguments(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Cut what the model's loop still passes at full length down to the rows in flight."""
        return self._cut.cut(args, kwargs)

    # -- how

    def _show_rows(self) -> None:
        self.sequence.rows, self.sequence.holes = self.flight.rows, self.flight.holes
        self._cut = ArgumentCut(self.flight)

    def _merge(self, hidden: Tensor, merges: list[tuple[Sample, Merge]]) -> Tensor:
        """New hidden states in which targets have absorbed their sources, DeepStack included."""
        if not merges:
            return hidden
        hidden = hidden.clone()
        if self._deepstack is not None:
            self._deepstack = self._deepstack.copied()
        for sample, merge in merges:
            position = sample.layout.position - self.flight.past
            source, target = position[merge.source], position[merge.target]
            here, there = (self.flight.locate(sample.number, one) for one in (source, target))
            absorb_(hidden[sample.number], here, there, merge.weight)
            if self._deepstack is not None:  # what the layers to come add
                self._deepstack.absorb_(sample.number, source, target, merge.weight)
        return hidden

    def _prune_cache(self, prefill: Prefill, number: int, layer: PrunedLayer) -> None:
        steps = self.schedule.cache_steps(number)
        if not steps:
            return
        if layer.window is not None:
            warning = "layers with a sliding window forget by themselves: their caches are kept"
            if warning not in prefill.call.warnings:
                prefill.call.warnings.append(warning)
            return
        kept = prefill.prune_cache(steps, number, layer)
        if kept is not None:
            layer.select(kept[0])
            layer.holes = kept[1]
