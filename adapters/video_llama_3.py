"""VideoLLaMA 3: pictures of any size, frames merged two by two, a text timestamp before each."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.adapters._maps import join_neighbours
from tokenprune.adapters._pixels import HALF, Normalisation
from tokenprune.adapters.base import Adapter, Item, MediaCall, Tower
from tokenprune.core.layout import Modality

__all__ = ["VideoLlama3"]


class VideoLlama3(Adapter):
    """VideoLLaMA 3.

    Its processor leaves out tokens of a clip that look as they did a frame before: they are no
    media tokens here, neither kept nor pruned nor counted.
    """

    model_types = ("video_llama_3",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")
    normalisation: ClassVar[Normalisation] = HALF

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        items = [
            Item.grid(frames, rows // merge, columns // merge, video=call.modality == "video")
            for frames, rows, columns, merge in self._grids(call)
        ]
        shown = self._shown(call, [len(item.real) for item in items], prompt)
        return [_only(item, one) for item, one in zip(items, shown, strict=True)]

    def tower(self, modality: Modality) -> Tower | None:
        base: Any = self.base_model
        return Tower(base.vision_model.encoder.layers[-1])

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        grids = self._grids(call)
        patches = torch.split(torch.cat(maps), [t * h * w for t, h, w, _ in grids])
        aligned = []
        for item, one, (_, rows, columns, merge) in zip(call.items, patches, grids, strict=True):
            tokens = join_neighbours(one, merge**2)
            line = item.frame.clamp(min=0) * (rows // merge) + item.row
            aligned.append(tokens[(line * (columns // merge) + item.column).to(tokens.device)])
        return aligned

    def grey(self, call: MediaCall) -> list[Tensor] | None:
        name = "pixel_values" if call.modality == "image" else "pixel_values_videos"
        pixels: Tensor = call.arguments[name]
        grey = self.normalisation.grey(pixels.reshape(len(pixels), 3, -1))  # [patches, pixels]
        return list(
            torch.split(grey, [h * w for t, h, w, _ in self._grids(call) for _ in range(t)])
        )

    def _grids(self, call: MediaCall) -> list[tuple[int, int, int, int]]:
        """Frames, rows and columns of patches, and patches along a side of a token."""
        grids = torch.as_tensor(call.arguments[f"{call.modality}_grid_thw"]).tolist()
        merges = torch.as_tensor(call.arguments[f"{call.modality}_merge_sizes"]).tolist()
        return [(t, h, w, merge) for (t, h, w), merge in zip(grids, merges, strict=True)]

    def _shown(self, call: MediaCall, tokens: list[int], prompt: dict[str, Any]) -> list[Tensor]:
        """For each picture `[tokens]` bool: what of it the processor put into the prompt."""
        mask = prompt.get("video_compression_mask")
        if call.modality == "image" or mask is None:
            return [torch.ones(count, dtype=torch.bool) for count in tokens]
        mask = torch.as_tensor(mask).cpu().bool()
        once = mask[:: max(1, len(mask) // sum(tokens))]  # beams repeat it
        return list(torch.split(once, tokens))


def _only(item: Item, chosen: Tensor) -> Item:
    return Item(**{field.name: getattr(item, field.name)[chosen] for field in fields(Item)})
