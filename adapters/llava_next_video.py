"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, frames pooled before the projector."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.adapters._maps import pool_grid
from tokenprune.adapters.base import Item, MediaCall
from tokenprune.adapters.llava_next import LlavaNext
from tokenprune.core.layout import Modality

__all__ = ["LlavaNextVideo"]


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video. The model is not told when its frames were taken."""

    model_types = ("llava_next_video",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        if call.modality == "image":
            return super().items(call, prompt)
        clips, frames = self._clips(call).shape[:2]
        side = self._pooled_side()
        return [Item.grid(frames, side, side, video=True) for _ in range(clips)]

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        if call.modality == "image":
            return super().align(call, maps)
        pooled = self._pool(torch.stack(maps))  # [clips * frames, tokens]
        return list(pooled.reshape(len(self._clips(call)), -1, *pooled.shape[2:]))

    def _pictures(self, call: MediaCall) -> Tensor:
        if call.modality == "image":
            return super()._pictures(call)
        return self._clips(call).flatten(0, 1)

    def _clips(self, call: MediaCall) -> Tensor:
        """Pixels of the clips: `[clips, frames, 3, height, width]`."""
        # Releases of transformers differ in the name.
        names = [name for name in ("pixel_values_videos", "pixel_values") if name in call.arguments]
        pixels: Tensor = call.arguments[names[0]]
        return pixels

    def _pooled_side(self) -> int:
        """Tokens along a side of a frame."""
        return self.side // int(self.config.spatial_pool_stride)

    def _pool(self, maps: Tensor) -> Tensor:
        """Pool maps of frames `[F, Nv, ...]` as the model pools their features."""
        stride = self.config.spatial_pool_stride
        # A learned pooling has no counterpart for maps: its weights are for features.
        largest = self.config.spatial_pool_mode == "max"
        pool = functional.max_pool2d if largest else functional.avg_pool2d
        return pool_grid(maps, (self.side, self.side), lambda x: pool(x, stride))
