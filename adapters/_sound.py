"""From a tower's windows to sounds, and from mel frames to seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tokenprune.adapters.base import Item
from tokenprune.core.indices import runs

__all__ = ["MEL_SECONDS", "Windows", "evenly"]

MEL_SECONDS: Final = 160 / 16_000
"""Between two mel frames: 160 samples at 16 kHz, in all families."""


def evenly(tokens: int, seconds_per_token: float) -> Item:
    """A sound whose tokens follow each other at equal distances."""
    return Item.sound(torch.arange(tokens, dtype=torch.float64) * seconds_per_token)


@dataclass(frozen=True)
class Windows:
    """Windows of equal length into which a processor cuts what is too long for the tower.

    Attributes:
        tokens: Of each window, in the order of encoding.
        whole: Tokens of a window that is full.
        seconds: Length of a full window.
    """

    tokens: Sequence[int]
    whole: int
    seconds: float

    def sounds(self, held: Tensor) -> list[Item]:
        """Join the windows of each sound.

        The model is not told which windows belong together, but the prompt shows it: the
        placeholders of a sound stand in one unbroken run, and only its last window may be short.

        Args:
            held: `[B, S]` bool, where the placeholders of the prompt are.

        Returns:
            The sounds; windows that do not fill the runs are one sound each.
        """
        left = list(self.tokens)
        sounds = []
        for run in runs(held):
            while run and left and left[0] <= run:
                parts = [left.pop(0)]
                while left and parts[-1] == self.whole and sum(parts) + left[0] <= run:
                    parts.append(left.pop(0))
                run -= sum(parts)
                sounds.append(parts)
        return [self._joined(parts) for parts in [*sounds, *([one] for one in left)]]

    def _joined(self, parts: list[int]) -> Item:
        step = self.seconds / self.whole
        seconds = [
            window * self.seconds + torch.arange(tokens, dtype=torch.float64) * step
            for window, tokens in enumerate(parts)
        ]
        return Item.sound(torch.cat(seconds))
