"""Idefics3: tiles of an image, then the whole of it; patches are shuffled into fewer tokens."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.adapters._maps import pool_grid
from tokenprune.adapters._pixels import HALF, Normalisation, patches
from tokenprune.adapters.base import Adapter, Item, MediaCall, Tower
from tokenprune.core.layout import Modality
from tokenprune.errors import UnsupportedModelError

__all__ = ["Idefics3"]

_MARKS = 2
"""Tokens between tiles of a line: one around views, and one that names the next tile's place."""


class Idefics3(Adapter):
    """Idefics3. Canvas 0 of an image is the view of all of it, canvas 1 its tiles, side by side."""

    model_types = ("idefics3",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    normalisation: ClassVar[Normalisation] = HALF

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        views = int(self._real(call).sum())
        height = call.arguments["pixel_values"].shape[-2]
        side = height // self.config.vision_config.patch_size // self.config.scale_factor
        tilings = self._tilings(views, side**2, prompt.get("input_ids"))
        return [_tiled(rows, columns, side) for rows, columns in tilings]

    def tower(self, modality: Modality) -> Tower | None:
        base: Any = self.base_model
        return Tower(base.vision_model.encoder.layers[-1])

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        mask = call.arguments.get("pixel_attention_mask")
        if mask is not None and not bool(mask.flatten(0, 1)[self._real(call)].all()):
            raise UnsupportedModelError(
                "views with padding inside give no encoder map; let the processor resize pictures "
                "to squares, as it does by itself, or use a method without maps"
            )
        side = int(len(maps[0]) ** 0.5)
        scale = self.config.scale_factor
        pooled = pool_grid(
            torch.stack(maps), (side, side), lambda x: functional.avg_pool2d(x, scale)
        )
        return list(torch.split(pooled.flatten(0, 1), [len(item.row) for item in call.items]))

    def grey(self, call: MediaCall) -> list[Tensor] | None:
        side = self.config.vision_config.patch_size
        return list(self.normalisation.grey(patches(self._views(call), side)))

    def _views(self, call: MediaCall) -> Tensor:
        """All views in the order of encoding: `[W, 3, height, width]`."""
        pixels: Tensor = call.arguments["pixel_values"]
        return pixels.flatten(0, 1)[self._real(call)]

    def _real(self, call: MediaCall) -> Tensor:
        """`[B * views]` bool: the model drops views of zeros, which fill up a batch."""
        pixels: Tensor = call.arguments["pixel_values"]
        if pixels.is_meta:  # a forecast, of one prompt: nothing fills it up
            return torch.ones(pixels.shape[:2].numel(), dtype=torch.bool)
        return (pixels.flatten(0, 1) != 0).flatten(1).any(dim=1)

    def _tilings(self, views: int, tokens: int, ids: Tensor | None) -> list[tuple[int, int]]:
        """Rows and columns of tiles of each image; none of an image in one piece.

        How tiles lie is not among the model's inputs, but the prompt is written so that it shows:
        before each view stands a mark of its place, and lines of tiles are apart. The view of the
        whole image comes last, and so the mark before the last view of a prompt tells such views.

        Args:
            views: Views in all.
            tokens: Tokens of a view.
            ids: `[B, S]`, the prompt.
        """
        alone = [(0, 0)] * views
        if ids is None or ids.shape[1] == 0:
            return alone
        ids = ids.cpu()
        placeholders = ids == self.config.image_token_id
        # Beams repeat a sample in adjacent rows.
        repeats = max(1, int(placeholders.sum()) // max(1, views * tokens))
        tilings: list[tuple[int, int]] = []
        for row, where in zip(ids[::repeats], placeholders[::repeats], strict=True):
            starts = (functional.pad(where.int(), (1, 0)).diff() == 1).nonzero()[:, 0]
            marks = row[starts - 1]
            lines: list[int] = []  # tiles in each, of the image being read
            for number, (start, mark) in enumerate(zip(starts, marks, strict=True)):
                if mark == marks[-1]:
                    if len(set(lines)) > 1:
                        return alone
                    tilings.append((len(lines), lines[0]) if lines else (0, 0))
                    lines = []
                elif lines and start - starts[number - 1] == tokens + _MARKS:
                    lines[-1] += 1
                else:
                    lines.append(1)
        return tilings if sum(r * c + 1 for r, c in tilings) == views else alone


def _tiled(rows: int, columns: int, side: int) -> Item:
    """An image of `rows` x `columns` tiles, then the whole of it, each of `side` tokens a side."""
    tiles = Item.grid(rows * columns, side, side, video=False)
    tile = tiles.canvas
    tiles = replace(
        tiles,
        canvas=torch.ones_like(tile),
        row=tiles.row + tile // max(1, columns) * side,
        column=tiles.column + tile % max(1, columns) * side,
    )
    parts = [tiles, Item.grid(1, side, side, video=False)]
    return Item(
        **{
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(Item)
        }
    )
