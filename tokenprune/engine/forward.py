"""One call of the language model: which tokens are in flight, and what happens to them in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokenprune.core.indices import take
from tokenprune.core.selection import Merge
from tokenprune.engine.cache import PrunedLayer, SequenceClock, adopt, cache_bytes, full_cache_bytes
from tokenprune.engine.deepstack import DeepStack, absorb_
from tokenprune.engine.flight import Flight
from tokenprune.engine.masks import LazyMask
from tokenprune.engine.prefill import Prefill
from tokenprune.engine.prompt import Prompt, Sample
from tokenprune.engine.schedule import Schedule
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
        clock: Shared by the layers of the cache.
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
        self.clock = SequenceClock() if cache is None else adopt(cache, layers)
        self.flight = Flight(batch, self.clock.end, length, device)
        self.prefill: Prefill | None = None
        self._deepstack: DeepStack | None = None
        self._narrows_at_once = False
        self._cut: dict[int, Any] = {}
        self.clock.end += length
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
            real = real[:, self.flight.past : self.clock.end]
        adapter, past = self._schedule.adapter, self.flight.past
        prefill = self.prefill = Prefill(adapter, prompt, real, past)
        prefill.call.length = self.clock.end
        hidden, before = kwargs["inputs_embeds"], prefill.alive
        for stage in self._schedule.input:
            with torch.no_grad():  # what is decided, weights included, is constant to gradients
                merges = prefill.prune(stage, hidden, self.flight)
            hidden = self._merge(hidden, merges)
        kwargs["inputs_embeds"] = hidden
        # Rows leave where the first layer begins: the model's own code before it sees all of them.
        self._narrows_at_once = prefill.has_changed(before)
        self._renumber(kwargs, prefill.tokens() if self._narrows_at_once else None)

    def enter_layer(self, number: int, hidden: Tensor) -> Tensor | None:
        """Run the stages of a layer.

        Args:
            number: Of the decoder layer, from 0.
            hidden: `[B, Q, D]`, about to enter it.

        Returns:
            `[B, Q', D]`, what enters it instead; None if nothing leaves here.
        """
        prefill = self.prefill
        if prefill is None:
            return None
        before = prefill.alive
        for stage in self._schedule.layer.get(number, ()):
            with torch.no_grad():
                prefill.prune(stage, hidden, self.flight)
        prefill.enter_layer(number)
        if not prefill.has_changed(before) and not (number == 0 and self._narrows_at_once):
            return None
        gather = self.flight.narrow(prefill.tokens())
        self._show_rows()
        return take(hidden, gather, 1)

    def after_attention(
        self,
        number: int,
        layer: PrunedLayer,
        last_row: Callable[[], Tensor] | None = None,
    ) -> None:
        """Run the stages on the cache of a layer, which has just stored its keys and values.

        Args:
            number: Of the decoder layer, from 0.
            layer: Its cache.
            last_row: Gives the attention `[B, heads, S]` of the last query; None if there is none.
        """
        prefill = self.prefill
        if prefill is not None:
            self._prune_cache(prefill, number, layer, last_row)
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
        self.clock.rows, self.clock.holes = self.flight.rows, self.flight.holes
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
            absorb_(hidden[sample.number], source, target, merge.weight)
            if self._deepstack is not None:
                self._deepstack.absorb_(sample.number, source, target, merge.weight)
        return hidden

    def _renumber(self, kwargs: dict[str, Any], tokens: list[Tensor] | None) -> None:
        """Compact positions: what is left counts without gaps."""
        if not self._schedule.compact:
            return
        flight, clock = self.flight, self.clock
        batch, length = flight.rows.shape
        device = flight.rows.device
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = flight.rows
        if positions.ndim != 2:
            raise RecipeError(
                "positions='compact' needs one-dimensional positions; use positions='original'"
            )
        if clock.shift is None:
            clock.shift = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        positions = positions.to(device).expand(batch, length) - clock.shift
        if tokens is not None:
            gone = torch.ones(batch, length, dtype=torch.int64, device=device)
            for number, kept in enumerate(tokens):
                gone[number, kept] = 0
            real = padding_of(kwargs.get("attention_mask"))
            if real is not None:  # padding never counted
                gone = gone * real[:, flight.past : flight.past + length].to(device)
            positions = positions - (gone.cumsum(1) - gone)  # [B, S]
            clock.shift = clock.shift + gone.sum(1, keepdim=True)
        kwargs["position_ids"] = positions

    def _prune_cache(
        self,
        prefill: Prefill,
        number: int,
        layer: PrunedLayer,
        last_row: Callable[[], Tensor] | None,
    ) -> None:
        stages = self._schedule.cache_stages(number)
        if not stages:
            return
        if layer.window is not None:
            warning = "layers with a sliding window forget by themselves: their caches are kept"
            if warning not in prefill.call.warnings:
                prefill.call.warnings.append(warning)
            return
        wanted = any("attention_rows" in stage.needs for stage in stages)
        with torch.no_grad():
            row = last_row() if wanted and last_row is not None else None
            kept = prefill.prune_cache(stages, number, layer, self.flight, row)
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
