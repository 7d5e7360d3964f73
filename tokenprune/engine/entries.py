"""Pruning what a cache has stored before: entries of all prompts that its sequence holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokenprune.core.indices import pad_left
from tokenprune.core.layout import MODALITIES, TokenLayout
from tokenprune.core.selection import Merge
from tokenprune.core.signal import Attention, Keys, Question, Signal, Values
from tokenprune.core.stage import Stage
from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.merges import absorb_entries
from tokenprune.engine.sequence import Prefilled
from tokenprune.errors import RecipeError

__all__ = ["Entries", "Held", "StoredTokens", "count_entries", "held_by", "join_layouts"]


def join_layouts(prompts: list[Prefilled], sample: int) -> TokenLayout:
    """The media tokens of several prompts, in one table that counts items and canvases through.

    Args:
        prompts: In order.
        sample: Row of the batch.
    """
    columns: dict[str, list[Tensor]] = {one.name: [] for one in fields(TokenLayout)}
    items = canvases = 0
    ahead = 0, 0
    for prompt in prompts:
        layout = prompt.call.layouts[sample]
        if not len(layout):
            continue
        # Groups of one prompt, or of a session's clip, are numbered through.
        ahead = ahead if prompt.continues else (items, canvases)
        shifted = {"item": layout.item + ahead[0], "canvas": layout.canvas + ahead[1]}
        for name, column in columns.items():
            column.append(shifted.get(name, getattr(layout, name)))
        items = max(items, int(shifted["item"].max()) + 1)
        canvases = max(canvases, int(shifted["canvas"].max()) + 1)
    if not columns["item"]:
        return prompts[0].call.layouts[sample]
    return TokenLayout(**{name: torch.cat(column) for name, column in columns.items()})


@dataclass
class StoredTokens:
    """The media tokens of one row of the batch, of all prompts.

    Attributes:
        number: The row.
        layout: Its `P` tokens, positions increasing.
        state: What stages keep for later ones while this prompt is prefilled, by step and kind.
    """

    number: int
    layout: TokenLayout
    state: dict[tuple[int, type[Any]], Any]

    def on(self, stage: Stage) -> Tensor:
        """`[P]` bool: which tokens are of a kind that the stage acts on."""
        wanted = sorted(MODALITIES[name] for name in stage.acts_on)
        return torch.isin(self.layout.modality, self.layout.modality.new_tensor(wanted))


class Held(NamedTuple):
    """The media entries of one sample in one layer.

    Attributes:
        rows: `[H or 1, N]` rows of the layout, and
        columns: `[H or 1, N]` where they are stored.
    """

    rows: Tensor
    columns: Tensor


class Entries:
    """The media entries of one layer's cache, for stages to choose from.

    Args:
        layer: The cache.
        samples: The rows of the batch.
        attention: Gives an attention signal of a sample for `[H, N]` rows of its layout.
        question: What the caller asks, if it is known.
    """

    def __init__(
        self,
        layer: PrunedLayer,
        samples: list[StoredTokens],
        attention: Callable[[Attention, StoredTokens, Tensor], Tensor],
        question: str | None,
    ) -> None:
        self._layer = layer
        self._samples = samples
        self._attention = attention
        self._question = question
        self.held = [held_by(layer, sample) for sample in samples]

    def rows(self, sample: int) -> Tensor:
        """`[H, N]`, the rows of the layout that each head stores; one set where heads agree."""
        return self.held[sample].rows.expand(self._layer.keys.shape[1], -1)

    def collect(self, sample: StoredTokens, rows: Tensor, stage: Stage) -> Callable[..., Any]:
        """What a stage reads signals with."""

        def read(signal: Signal[Any]) -> Any:
            if signal not in stage.needs and signal not in (Keys(), Values()):
                raise RecipeError(
                    f"{stage.name} at {stage.site} reads {signal}, which its needs do not name"
                )
            if isinstance(signal, Question):
                return self._question
            if isinstance(signal, Keys | Values):
                return self._stored(signal, sample, rows)
            if isinstance(signal, Attention):
                return self._attention(signal, sample, rows)
            raise RecipeError(f"{stage.name} asks for {signal}, which is no signal of caches")

        return read

    def _stored(self, signal: Keys | Values, sample: StoredTokens, rows: Tensor) -> Tensor:
        layer, number = self._layer, sample.number
        entries = (layer.keys if isinstance(signal, Keys) else layer.values)[number]  # [H, S, d]
        columns = self._columns(sample, rows)
        if signal.of == "text":
            columns = self._others(sample)
        columns = columns.expand(len(entries), -1)[..., None].to(entries.device)
        found = entries.gather(1, columns.expand(-1, -1, entries.shape[-1]))
        return found.to(rows.device)

    def _columns(self, sample: StoredTokens, rows: Tensor) -> Tensor:
        """Where rows `[H, K]` that heads hold are stored, `[H, K]`."""
        held = self.held[sample.number]
        heads = max(len(held.rows), len(rows))
        known = held.rows.expand(heads, -1).contiguous()
        places = torch.searchsorted(known, rows.expand(heads, -1).contiguous())
        return held.columns.expand(heads, -1).gather(1, places)

    def _others(self, sample: StoredTokens) -> Tensor:
        """The columns `[H or 1, T]` of all entries that are no media, without holes."""
        index = self._layer.index[sample.number]  # [H or 1, S]
        other = (index >= 0).scatter(1, self.held[sample.number].columns, False)
        return other.nonzero()[:, 1].view(len(index), -1)

    def absorb(self, sample: StoredTokens, merge: Merge) -> None:
        """Merge entries of one sample: `[H, M]` rows of the layout."""
        source, target = (self._columns(sample, one) for one in (merge.source, merge.target))
        absorb_entries(self._layer, sample.number, source, target, merge)

    def keep(self, kept: list[Tensor | None]) -> None:
        """Store these rows alone of media, `[H, K]` for each sample; None for all."""
        if all(one is None for one in kept):
            return
        columns = []
        for sample, rows in zip(self._samples, kept, strict=True):
            media = (
                self.held[sample.number].columns if rows is None else self._columns(sample, rows)
            )
            other = self._others(sample)
            heads = max(len(media), len(other))
            both = torch.cat([media.expand(heads, -1), other.expand(heads, -1)], dim=1)
            columns.append(both.sort(dim=1).values)
        heads = max(map(len, columns))
        columns = [one.expand(heads, -1) for one in columns]
        self._layer.select(pad_left(columns))
        self._layer.holes = len({one.shape[1] for one in columns}) > 1


def held_by(layer: PrunedLayer, sample: StoredTokens) -> Held:
    """The media entries of one sample that a layer stores."""
    index = layer.index[sample.number]  # [H or 1, S]
    position = sample.layout.position.to(index.device)
    columns = torch.isin(index, position).nonzero()[:, 1].view(len(index), -1)
    rows = torch.searchsorted(position, index.gather(1, columns))
    return Held(rows, columns)


def count_entries(cache: Cache, prompt: Prefilled) -> Tensor:
    """Media entries of a prompt that each layer and head stores, `[B, L, H]` int32 on the CPU."""
    layouts = prompt.call.layouts
    heads = cache.layers[0].keys.shape[1]
    counts = torch.zeros(len(layouts), len(cache.layers), heads, dtype=torch.int32)
    for number, layer in enumerate(cache.layers):
        for sample, layout in enumerate(layouts):
            index = layer.index[sample]  # [H or 1, S]
            held = torch.isin(index, layout.position.to(index.device))
            counts[sample, number] = held.sum(dim=1).cpu()
    return counts
