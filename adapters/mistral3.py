"""Mistral Small 3.1 and later: pictures of any size on a Pixtral tower, merged two by two."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from tokenprune.adapters._maps import pool_grid
from tokenprune.adapters.base import Item, MediaCall
from tokenprune.adapters.llava import Llava
from tokenprune.core.layout import Modality

__all__ = ["Mistral3"]


class Mistral3(Llava):
    """Mistral 3. Breaks after the lines of a picture are text of the prompt."""

    model_types = ("mistral3",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        merge = self.config.spatial_merge_size
        return [
            Item.grid(1, rows // merge, columns // merge, video=False)
            for rows, columns in self._grids(call)
        ]

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        merge = self.config.spatial_merge_size
        return [
            pool_grid(one[None], grid, lambda x: functional.avg_pool2d(x, merge))[0]
            for one, grid in zip(maps, self._grids(call), strict=True)
        ]
