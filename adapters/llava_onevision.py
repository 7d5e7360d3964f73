"""LLaVA-OneVision: tiled images, shrunk if large; frames shrunk by two, a newline after a clip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.adapters.base import Item, MediaCall
from tokenprune.adapters.llava_next_video import LlavaNextVideo
from tokenprune.core.layout import Modality

__all__ = ["LlavaOnevision"]


class LlavaOnevision(LlavaNextVideo):
    """LLaVA-OneVision. Several images of one sample are not tiled."""

    model_types = ("llava_onevision",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        items = super().items(call, prompt)
        if call.modality == "image":
            return items
        return [replace(one, real=functional.pad(one.real, (0, 1), value=False)) for one in items]

    def _tiles(self, call: MediaCall) -> list[int]:
        tiles = super()._tiles(call)
        images = call.arguments.get("batch_num_images")
        if images is None:
            return tiles
        alone = [n == 1 for n in torch.as_tensor(images).tolist() for _ in range(n)]
        return [n if tiled else 1 for n, tiled in zip(tiles, alone, strict=True)]

    def _packing(self, call: MediaCall) -> dict[str, Any]:
        name = "vision_aspect_ratio"
        return {name: self._setting(call, name)}

    def _pooled_side(self) -> int:
        return -(-self.side // 2)

    def _pool(self, maps: Tensor) -> Tensor:
        base: Any = self.base_model
        pooled: Tensor = base.apply_pooling(maps.flatten(2) if maps.ndim > 2 else maps[..., None])
        return pooled.reshape(*pooled.shape[:2], *maps.shape[2:])
