"""Audio: items from the windows of a tower, seconds from mel frames, states of towers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from tokenprune.adapters.base import Item, Tower
from tokenprune.core.indices import runs

__all__ = [
    "MEL_SECONDS",
    "Windows",
    "audio_tower",
    "convolved",
    "even_audio",
    "padding_after",
]

MEL_SECONDS: Final = 160 / 16_000
"""Between two mel frames: 160 samples at 16 kHz, in all families."""


def even_audio(tokens: int, seconds_per_token: float) -> Item:
    """Audio whose tokens follow each other at equal distances."""
    return Item.audio(torch.arange(tokens, dtype=torch.float64) * seconds_per_token)


def audio_tower(base: nn.Module) -> Tower:
    """The tower of families that call it `audio_tower`."""
    layers: Any = base.get_submodule("audio_tower.layers")
    return Tower(layers[-1])


def convolved(mel_frames: Tensor) -> Tensor:
    """States of a tower: a convolution of stride two makes them of mel frames."""
    return (mel_frames - 1) // 2 + 1


def padding_after(lengths: Tensor, longest: int) -> Tensor | None:
    """What follows the first so many states of each view: `[W, longest]` bool; None if nothing."""
    padding = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return padding if bool(padding.any()) else None


@dataclass(frozen=True)
class Windows:
    """Windows of equal length into which a processor cuts audio that is too long for the tower.

    Attributes:
        tokens: Of each window, in the order of encoding.
        whole: Tokens of a window that is full.
        seconds: Length of a full window.
    """

    tokens: Sequence[int]
    whole: int
    seconds: float

    def items(self, placeholders: Tensor) -> list[Item]:
        """Join the windows of each item.

        The model is not told which windows belong together, but the prompt shows it: the
        placeholders of an item stand in one unbroken run, and only its last window may be short.

        Args:
            placeholders: `[B, S]` bool, where those of the prompt stand.

        Returns:
            The items; windows that do not fill the runs are one item each.
        """
        left = list(self.tokens)
        items = []
        for run in runs(placeholders):
            while run and left and left[0] <= run:
                parts = [left.pop(0)]
                while left and parts[-1] == self.whole and sum(parts) + left[0] <= run:
                    parts.append(left.pop(0))
                run -= sum(parts)
                items.append(parts)
        return [self._joined(parts) for parts in [*items, *([one] for one in left)]]

    def _joined(self, parts: list[int]) -> Item:
        step = self.seconds / self.whole
        seconds = [
            window * self.seconds + torch.arange(tokens, dtype=torch.float64) * step
            for window, tokens in enumerate(parts)
        ]
        return Item.audio(torch.cat(seconds))
