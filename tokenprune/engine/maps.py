"""Encoder signals, aligned to media tokens once for each encoder call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenprune.adapters.base import Adapter, MediaCall
from tokenprune.core.layout import Modality, TokenLayout
from tokenprune.core.signal import EncoderSignal
from tokenprune.errors import UnsupportedModelError

__all__ = ["EncoderMaps"]


class EncoderMaps:
    """What encoder signals made of the views of some encoder calls.

    Args:
        adapter: Of the model.
        media: The calls.
        wanted: The modalities that each signal is read of.
    """

    def __init__(
        self,
        adapter: Adapter,
        media: list[MediaCall],
        wanted: dict[EncoderSignal, frozenset[Modality]],
    ) -> None:
        self._adapter = adapter
        self._media = media
        self._wanted = wanted
        self._aligned: dict[tuple[EncoderSignal, int], list[Tensor]] = {}

    def of(
        self, layout: TokenLayout, items: list[tuple[int, int]], device: torch.device
    ) -> Callable[[EncoderSignal], Tensor]:
        """The signals of one sample.

        Args:
            layout: Its `P` media tokens.
            items: For each item the number of its call, and which of its items it is.
            device: Where stages work.

        Returns:
            A function of a signal: `[P]` or `[P, C]`; nan where nothing is read of a token.
            `[G, C]` for a signal of views, a row for each span of the layout.
        """
        done: dict[EncoderSignal, Tensor] = {}

        def encoder(signal: EncoderSignal) -> Tensor:
            if signal not in done:
                found = self._assemble(signal, layout, items, device)
                done[signal] = found if signal.per == "token" else _mean_of_spans(found, layout)
            return done[signal]

        return encoder

    def _assemble(
        self,
        signal: EncoderSignal,
        layout: TokenLayout,
        items: list[tuple[int, int]],
        device: torch.device,
    ) -> Tensor:
        full: Tensor | None = None
        for number, (call, index) in enumerate(items):
            if self._adapter.tower(self._media[call].modality) is None:
                continue
            aligned = self._align(signal, call)
            if aligned is None:
                continue
            values = aligned[index].to(device, torch.float32)  # [n] or [n, C]
            if full is None:
                full = values.new_full((len(layout), *values.shape[1:]), torch.nan)
            full[(layout.item == number).nonzero()[:, 0].to(device)] = values
        return torch.full((len(layout),), torch.nan, device=device) if full is None else full

    def _align(self, signal: EncoderSignal, number: int) -> list[Tensor] | None:
        """For each item of a call `[n]` or `[n, C]`; None if its kind was not to be read."""
        if (signal, number) not in self._aligned:
            call = self._media[number]
            if call.modality not in self._wanted[signal]:
                return None
            if signal not in call.maps:
                raise UnsupportedModelError(
                    f"{signal} reads the encoder's attention, but the {call.modality} features "
                    "came without running the encoder here; give pixels or sound, inside "
                    "`with prune(...)`"
                )
            maps = call.maps[signal]
            if signal.per == "view":
                maps = self._spread(call, maps)
            self._aligned[signal, number] = self._adapter.align(call, maps)
        return self._aligned[signal, number]

    def _spread(self, call: MediaCall, vectors: list[Tensor]) -> list[Tensor]:
        """The vector of each view at all of its tokens, `[Nv, C]`: `align` knows where they go."""
        return [
            vector.expand(tokens, -1)
            for vector, tokens in zip(vectors, call.view_tokens, strict=True)
        ]


def _mean_of_spans(values: Tensor, layout: TokenLayout) -> Tensor:
    """The mean over the tokens of each image, frame or sound: `[P, C]` -> `[G, C]`."""
    spans = layout.spans().to(values.device)
    number = int(spans.max()) + 1 if len(spans) else 0
    sums = values.new_zeros(number, *values.shape[1:]).index_add(0, spans, values)
    sizes = values.new_zeros(number).index_add(0, spans, values.new_ones(len(spans)))
    return sums / sizes[:, None]
