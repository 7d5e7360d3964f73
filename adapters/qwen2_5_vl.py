"""Qwen2.5-VL: as Qwen2-VL, with windows in the tower and times of the frames."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.adapters.base import Tower
from tokenprune.adapters.qwen2_vl import Grid, Qwen2VL
from tokenprune.core.layout import Modality

__all__ = ["Qwen2_5VL"]


class Qwen2_5VL(Qwen2VL):
    """Qwen2.5-VL."""

    model_types = ("qwen2_5_vl",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")
    seconds_name: ClassVar[str | None] = "second_per_grid_ts"

    def tower(self, modality: Modality) -> Tower | None:
        vision = self.config.vision_config
        # A block that attends within windows does not see a whole view.
        whole = vision.depth - 1 in vision.fullatt_block_indexes
        return super().tower(modality) if whole else None

    def _order(self, grids: list[Grid]) -> Tensor:
        vision = self.config.vision_config
        merge = self._merge()
        side = vision.window_size // merge // vision.patch_size
        order = []
        done = 0
        for frames, rows, columns in grids:
            frame, row, column = torch.meshgrid(
                torch.arange(frames),
                torch.arange(rows // merge),
                torch.arange(columns // merge),
                indexing="ij",
            )
            # The tower goes window by window, within a window and a frame row by row.
            window = (frame * rows + row // side) * columns + column // side
            order.append(window.flatten().argsort(stable=True) + done)
            done += frame.numel()
        return torch.cat(order)
