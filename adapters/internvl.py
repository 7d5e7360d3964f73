"""InternVL: tiles of one size, four patches shuffled into one token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.adapters._maps import pool_grid
from tokenprune.adapters._pixels import IMAGENET, Normalisation, patches
from tokenprune.adapters.base import Adapter, Item, MediaCall, Tower
from tokenprune.core.layout import Modality

__all__ = ["InternVL"]


class InternVL(Adapter):
    """InternVL.

    How the tiles of an image lie is not among the model's inputs: each tile is a canvas of its
    own, the thumbnail the last one. Frames of a video are images to the model, one item each.
    """

    model_types = ("internvl",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    normalisation: ClassVar[Normalisation] = IMAGENET

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        side = self._side(call)
        pixels = call.arguments["pixel_values"]
        tiles = self._tiles(len(pixels), side**2, prompt.get("input_ids"))
        images = [Item.grid(count, side, side, video=False) for count in tiles]
        # The thumbnail comes last; canvas 0 is the one that shows the whole picture.
        return [
            replace(one, canvas=(one.canvas + 1) % count)
            for one, count in zip(images, tiles, strict=True)
        ]

    def tower(self, modality: Modality) -> Tower | None:
        tower: Any = self.base_model.vision_tower
        layers = tower.encoder.layer
        chosen = self.config.vision_feature_layer
        last = chosen if chosen >= 0 else len(layers) + 1 + chosen
        return Tower(layers[last - 1], prefix_tokens=1) if last > 0 else None

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        side = self._side(call) * self._shuffled
        pooled = pool_grid(
            torch.stack(maps), (side, side), lambda x: functional.avg_pool2d(x, self._shuffled)
        )
        return list(torch.split(pooled.flatten(0, 1), [len(item.row) for item in call.items]))

    def grey(self, call: MediaCall) -> list[Tensor] | None:
        return list(self.normalisation.grey(patches(call.arguments["pixel_values"], self._patch)))

    # -- for this family and those built on it

    @property
    def _patch(self) -> int:
        """Pixels along a side of a patch."""
        return int(self.config.vision_config.patch_size[0])

    @property
    def _shuffled(self) -> int:
        """Patches along a side of a token."""
        return int(round(1 / self.config.downsample_ratio))

    def _side(self, call: MediaCall) -> int:
        """Tokens along a side of a tile."""
        return int(call.arguments["pixel_values"].shape[-1] // self._patch // self._shuffled)

    def _tiles(self, tiles: int, tokens: int, ids: Tensor | None) -> list[int]:
        """Tiles of each image: the placeholders of an image are one unbroken run.

        Args:
            tiles: Tiles in all.
            tokens: Tokens of a tile.
            ids: `[B, S]`, the prompt.
        """
        alone = [1] * tiles
        if ids is None or ids.shape[1] == 0:
            return alone
        placeholders = ids == self.config.image_token_id
        # Beams repeat a sample in adjacent rows.
        repeats = max(1, int(placeholders.sum()) // max(1, tiles * tokens))
        edges = functional.pad(placeholders[::repeats].int(), (1, 1)).diff(dim=1)
        runs = (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]
        counts = (runs // tokens).tolist()
        fits = bool((runs % tokens == 0).all()) and sum(counts) == tiles
        return counts if fits else alone
