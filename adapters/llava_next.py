"""LLaVA-NeXT: a base view and a grid of tiles an image, with a newline token after each line."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from tokenprune.adapters.base import Item, MediaCall
from tokenprune.adapters.llava import Llava
from tokenprune.core.layout import Modality

__all__ = ["LlavaNext"]

_NEWLINE = -1.0


class LlavaNext(Llava):
    """LLaVA-NeXT. Canvas 0 of an image is its base view, canvas 1 the tiles without padding."""

    model_types = ("llava_next",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        blank = [torch.zeros(tiles, self.side**2) for tiles in self._tiles(call)]
        return [self._read(packed) for packed in self._pack(call, blank, _NEWLINE)]

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        views = iter(maps)
        features = [torch.stack([next(views) for _ in range(n)]) for n in self._tiles(call)]
        packed = self._pack(call, features, _NEWLINE)
        return [one[item.real] for one, item in zip(packed, call.items, strict=True)]

    def _pictures(self, call: MediaCall) -> Tensor:
        pixels: Tensor = call.arguments["pixel_values"]
        if pixels.ndim == 4:
            return pixels
        # Images of fewer tiles are padded to the most.
        tiles = self._tiles(call)
        return torch.cat([image[:n] for image, n in zip(pixels, tiles, strict=True)])

    def _tiles(self, call: MediaCall) -> list[int]:
        """Views of each image: tiles and the base view."""
        size = self.config.vision_config.image_size
        tiles = []
        for image_size in torch.as_tensor(call.arguments["image_sizes"]).tolist():
            height, width = select_best_resolution(image_size, self.config.image_grid_pinpoints)
            tiles.append(-(-height // size) * -(-width // size) + 1)
        return tiles

    def _pack(self, call: MediaCall, features: list[Tensor], newline: float) -> list[Tensor]:
        """Send an entry for each patch, `[tiles, Nv, ...]` an image, as the model sends features.

        Returns:
            For each image an entry for each of its placeholders, newlines included.
        """
        base: Any = self.base_model
        channels = features[0].shape[2:]
        packed, _ = base.pack_image_features(
            [feature.reshape(*feature.shape[:2], channels.numel()) for feature in features],
            call.arguments["image_sizes"],
            image_newline=torch.full((channels.numel(),), newline),
            **self._packing(call),
        )
        return [one.reshape(-1, *channels) for one in packed]

    def _packing(self, call: MediaCall) -> dict[str, Any]:
        """Further arguments of the model's packing."""
        name = "vision_feature_select_strategy"
        return {name: self._setting(call, name)}

    def _read(self, packed: Tensor) -> Item:
        """Read the layout off packed features that are -1 at newlines."""
        real = packed != _NEWLINE
        base = self.side**2
        lines = int((~real[base:]).sum())
        columns = (len(packed) - base) // lines - 1 if lines else 0
        canvases = [
            Item.grid(1, self.side, self.side, video=False),
            Item.grid(1, lines, columns, video=False),
        ]
        return Item(
            real=real,
            canvas=torch.cat([one.canvas + n for n, one in enumerate(canvases)]),
            frame=torch.cat([one.frame for one in canvases]),
            row=torch.cat([one.row for one in canvases]),
            column=torch.cat([one.column for one in canvases]),
            seconds=torch.cat([one.seconds for one in canvases]),
        )
