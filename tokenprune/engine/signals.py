"""What stages see at their site, collected when they ask for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from tokenprune.adapters.base import Adapter, MediaCall
from tokenprune.core.context import CacheContext, ModelShape
from tokenprune.core.layout import TokenLayout
from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.flight import Flight
from tokenprune.engine.prompt import Sample
from tokenprune.errors import UnsupportedModelError

__all__ = ["EncoderMaps", "StoredEntries", "columns_of"]


def columns_of(sample: Sample, rows: Tensor, flight: Flight, stored: int, past: int) -> Tensor:
    """The cache columns of rows of a layout: what is in flight was stored last."""
    position = sample.layout.position[rows] - past
    located = flight.locate(sample.number, position.flatten()).view(position.shape)
    return located + stored - flight.rows.shape[1]


class StoredEntries(CacheContext):
    """A cache context that gathers keys and values only if a stage asks for them."""

    def __init__(
        self,
        shape: ModelShape,
        past: int,
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
        self.shape = shape
        self.memory = sample.memory
        stored = layer.keys.shape[2]
        self._columns = columns_of(sample, rows, flight, stored, past)
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


class EncoderMaps:
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
