"""One call of the language model: which tokens are in flight, and what happens to them in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokenprune.core.indices import take
from tokenprune.core.selection import Merge
from tokenprune.engine.cache import PrunedLayer, adopt, cache_bytes, full_cache_bytes
from tokenprune.engine.deepstack import DeepStack, absorb_
from tokenprune.engine.flight import Flight
from tokenprune.engine.masks import LazyMask
from tokenprune.engine.prefill import Prefill
from tokenprune.engine.prompt import Prompt, Sample
from tokenprune.engine.rows import Attended
from tokenprune.engine.schedule import Schedule
from tokenprune.engine.sequence import Prefilled, Sequence
from tokenprune.engine.signals import Probing
from tokenprune.errors import RecipeError
from tokenprune.report.report import Call

__all__ = ["Forward", "padding_of"]


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

    Attributes:
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
    ) -> None:
        self._schedule = schedule
        self._cache = cache
        layers = schedule.adapter.shape.layers
        self.sequence = Sequence() if cache is None else adopt(cache, layers)
        self.flight = Flight(batch, self.sequence.end, length, device)
        self.prefill: Prefill | None = None
        self._deepstack: DeepStack | None = None
        self._narrows_at_once = False
        self._cut: dict[int, Any] = {}
        self.sequence.end += length
        self._show_rows()

    # -- in order

    def begin(self, kwargs: dict[str, Any], prompt: Prompt | None) -> None:
        """Run the input stages.

        Args:
            kwargs: What the language model is called with; `inputs_embeds` `[B, S, D]` and what
                goes with them are replaced.
            prompt: None if this forward brings no media.
        """
        if self._schedule.input or self._schedule.layer:
            self._deepstack = DeepStack.taken_from(kwargs)
        if prompt is None:
            self._renumber(kwargs, None)
            return
        real = padding_of(kwargs.get("attention_mask"))
        if real is not None:
            real = real[:, self.flight.past : self.sequence.end]
        prefill = self.prefill = Prefill(self._schedule, prompt, real, self.flight, self.sequence)
        hidden, before = kwargs["inputs_embeds"], prefill.alive
        for step in self._schedule.input:
            with torch.no_grad():  # what is decided, weights included, is constant to gradients
                merges = prefill.prune(step, -1, hidden)
            hidden = self._merge(hidden, merges)
        kwargs["inputs_embeds"] = hidden
        prefill.signals.enter_model(hidden)
        # Rows leave where the first layer begins: the model's own code before it sees all of them.
        self._narrows_at_once = prefill.has_changed(before)
        self._renumber(kwargs, prefill.tokens() if self._narrows_at_once else None)

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
        for step in self._schedule.layer.get(number, ()):
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

    def attended(self, number: int, attended: Callable[[], Attended]) -> None:
        """Collect what stages ask of the attention that a layer has just computed."""
        if self.prefill is not None:
            with torch.no_grad():
                self.prefill.signals.attended(number, attended)

    def after_attention(self, number: int, layer: PrunedLayer) -> None:
        """Run the stages on the cache of a layer, which has just stored its keys and values.

        Args:
            number: Of the decoder layer, from 0.
            layer: Its cache.
        """
        prefill = self.prefill
        if prefill is not None:
            self._prune_cache(prefill, number, layer)
        if layer.evict() and prefill is not None:
            prefill.leave_window(number, layer)

    def leave_layer(self, number: int, hidden: Tensor) -> Tensor | None:
        """The hidden states `[B, Q, D]` that leave a layer, if they change here; None if not."""
        if self._deepstack is None or number >= len(self._deepstack.features):
            return None
        return self._deepstack.add(number, hidden, self.flight.source)

    def finish(self) -> Call | None:
        """The record of a prefill that brought media; None if this was none."""
        if self.prefill is None:
            return None
        call = self.prefill.call
        if self._cache is not None:
            call.media_entries = self.prefill.entries
            call.kv_bytes_before = full_cache_bytes(self._cache)
            call.kv_bytes_after = cache_bytes(self._cache)
        elif self._schedule.cache:
            call.warnings.append("use_cache=False: there is no cache to prune")
        self.sequence.prompts.append(Prefilled(self.flight.past, call))
        return call

    # -- what layers and attention are told

    def layer(self, number: int) -> PrunedLayer | None:
        """The cache of a layer; None without a cache."""
        if self._cache is None:
            return None
        found: PrunedLayer = self._cache.layers[number]
        return found

    def cut_arguments(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Cut what the model's loop still passes at full length down to the rows in flight."""
        source, length = self.flight.source, self.flight.length
        if source is None:
            return args, kwargs

        def cut(value: Any, dim: int) -> Any:
            if id(value) not in self._cut:  # once a narrowing, not once a layer
                several = value if isinstance(value, tuple) else (value,)
                short = tuple(take(one, source, dim % one.ndim) for one in several)
                self._cut[id(value)] = (value, short if several is value else short[0])
            return self._cut[id(value)][1]

        kwargs = dict(kwargs)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = cut(kwargs["position_ids"], -1)
        if kwargs.get("position_embeddings") is not None:
            # [B, N, d]; older releases keep those of time, row and column apart: [3, B, N, d].
            kwargs["position_embeddings"] = cut(kwargs["position_embeddings"], -2)
        rest = tuple(
            cut(one, 1)
            if isinstance(one, Tensor) and one.ndim > 1 and one.shape[1] == length
            else one
            for one in args[1:]
        )
        return (*args[:1], *rest), kwargs

    # -- how

    def _show_rows(self) -> None:
        self.sequence.rows, self.sequence.holes = self.flight.rows, self.flight.holes
        self._cut = {}

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

    def _renumber(self, kwargs: dict[str, Any], tokens: list[Tensor] | None) -> None:
        """Compact positions: what is left counts without gaps."""
        if not self._schedule.compact:
            return
        flight, sequence = self.flight, self.sequence
        batch, length = flight.rows.shape
        device = flight.rows.device
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = flight.rows
        if positions.ndim != 2:
            raise RecipeError(
                "positions='compact' needs one-dimensional positions; use positions='original'"
            )
        if sequence.shift is None:
            sequence.shift = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        positions = positions.to(device).expand(batch, length) - sequence.shift
        if tokens is not None:
            gone = torch.ones(batch, length, dtype=torch.int64, device=device)
            for number, kept in enumerate(tokens):
                gone[number, kept] = 0
            real = padding_of(kwargs.get("attention_mask"))
            if real is not None:  # padding never counted
                gone = gone * real[:, flight.past : flight.past + length].to(device)
            positions = positions - (gone.cumsum(1) - gone)  # [B, S]
            sequence.shift = sequence.shift + gone.sum(1, keepdim=True)
        kwargs["position_ids"] = positions

    def _prune_cache(self, prefill: Prefill, number: int, layer: PrunedLayer) -> None:
        steps = self._schedule.cache_steps(number)
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


def padding_of(mask: Any) -> Tensor | None:
    """`[B, N]` bool, False at padding, from what a model is given as its attention mask."""
    if isinstance(mask, dict):
        mask = next((one for one in mask.values() if isinstance(one, LazyMask)), None)
    if isinstance(mask, LazyMask):
        return mask.padding
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return None if bool(mask.all()) else mask.bool()
    return None
