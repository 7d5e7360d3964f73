"""Video-LLaVA: a tower for images, another for frames, and a class token in every frame."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.adapters.base import Item, MediaCall
from tokenprune.adapters.llava import Llava
from tokenprune.core.layout import Modality

__all__ = ["VideoLlava"]


class VideoLlava(Llava):
    """Video-LLaVA. The class tokens among a clip's placeholders are no patches and always stay."""

    model_types = ("video_llava",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        if call.modality == "image":
            return super().items(call, prompt)
        clips, frames = call.arguments["pixel_values_videos"].shape[:2]
        ((rows, columns), *_) = self._grids(call)
        clip = Item.grid(frames, rows, columns, video=True)
        real = torch.ones(frames, 1 + rows * columns, dtype=torch.bool)
        real[:, 0] = False
        return [replace(clip, real=real.flatten()) for _ in range(clips)]

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        if call.modality == "image":
            return maps
        clips = len(call.arguments["pixel_values_videos"])
        return list(torch.stack(maps).reshape(clips, -1, *maps[0].shape[1:]))

    def _encoder(self, modality: Modality) -> nn.Module:
        return self.base_model.get_submodule(f"{modality}_tower")

    def _pictures(self, call: MediaCall) -> Tensor:
        if call.modality == "video":
            frames: Tensor = call.arguments["pixel_values_videos"]
            return frames.flatten(0, 1)
        # Releases of transformers differ in the name.
        pixels: Tensor | None = call.arguments.get("pixel_values")
        return call.arguments["pixel_values_images"] if pixels is None else pixels
