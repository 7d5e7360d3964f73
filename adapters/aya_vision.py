"""Aya Vision: tiles of one size on a SigLIP tower, each announced by a token of text."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.adapters._pixels import HALF, Normalisation
from tokenprune.adapters.base import Tower
from tokenprune.adapters.internvl import InternVL
from tokenprune.core.layout import Modality

__all__ = ["AyaVision"]


class AyaVision(InternVL):
    """Aya Vision. As in InternVL each tile is a canvas of its own, the whole picture the last."""

    model_types = ("aya_vision",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    normalisation: ClassVar[Normalisation] = HALF

    def tower(self, modality: Modality) -> Tower | None:
        tower: Any = self.base_model.vision_tower
        # Some releases of transformers wrap the tower once more.
        layers = getattr(tower, "vision_model", tower).encoder.layers
        chosen = self.config.vision_feature_layer
        chosen = chosen if isinstance(chosen, list | tuple) else [chosen]
        # The features of several layers are concatenated: the deepest has seen the most.
        last = max(layer if layer >= 0 else len(layers) + 1 + layer for layer in chosen)
        return Tower(layers[last - 1]) if last > 0 else None

    @property
    def _patch(self) -> int:
        return int(self.config.vision_config.patch_size)

    @property
    def _shuffled(self) -> int:
        return int(self.config.downsample_factor)

    def _tiles(self, tiles: int, tokens: int, ids: Tensor | None) -> list[int]:
        alone = [1] * tiles
        if ids is None or ids.shape[1] == 0:
            return alone
        placeholders = ids == self.config.image_token_id
        # Beams repeat a sample in adjacent rows.
        repeats = max(1, int(placeholders.sum()) // max(1, tiles * tokens))
        counts = []
        for row, here in zip(ids[::repeats], placeholders[::repeats], strict=True):
            edges = functional.pad(here.int(), (0, 1)).diff()
            after = torch.where(edges == -1)[0] + 1  # the place after each run, which is one tile
            if not len(after) or after[-1] == len(row):
                continue
            # Other tiles are followed by the token that announces the next one.
            last = (row[after] == row[after[-1]]).nonzero()[:, 0]
            counts += functional.pad(last, (1, 0), value=-1).diff().tolist()
        return counts if sum(counts) == tiles else alone
