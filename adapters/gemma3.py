"""Gemma 3: one square view an image, pooled into a grid of fixed size."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.adapters._maps import pool_grid
from tokenprune.adapters.base import Item, MediaCall, Tower
from tokenprune.adapters.llava import Llava
from tokenprune.core.layout import Modality

__all__ = ["Gemma3"]


class Gemma3(Llava):
    """Gemma 3. A crop that the processor adds to an image (pan and scan) is an image of its own.

    Tokens of an image see each other in both directions; what pruning leaves of them still does.
    """

    model_types = ("gemma3",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    sees_ahead = True

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        side = self._tokens_a_side()
        return [Item.grid(1, side, side, video=False) for _ in range(len(self._pictures(call)))]

    def tower(self, modality: Modality) -> Tower | None:
        block = self._block(-1)
        return None if block is None else Tower(block)

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        stride = self.side // self._tokens_a_side()
        grid = self.side, self.side
        return list(pool_grid(torch.stack(maps), grid, lambda x: functional.avg_pool2d(x, stride)))

    def _tokens_a_side(self) -> int:
        return int(self.config.mm_tokens_per_image**0.5)
