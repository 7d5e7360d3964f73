"""Qwen2-VL: pictures of any size, merged two by two; a clip is one run of placeholders."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.adapters._maps import join_neighbours
from tokenprune.adapters._pixels import CLIP, Normalisation
from tokenprune.adapters.base import Adapter, Item, MediaCall, Tower
from tokenprune.core.layout import Modality

__all__ = ["Qwen2VL"]

Grid = tuple[int, int, int]
"""Frames, rows and columns of patches."""


class Qwen2VL(Adapter):
    """Qwen2-VL. A frame is a temporal patch (two pictures); the model is not given its time."""

    model_types = ("qwen2_vl",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")
    normalisation: ClassVar[Normalisation] = CLIP

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        merge = self._merge()
        grids = self._grids(call)
        steps = self._seconds_per_frame(call, prompt) or [torch.nan] * len(grids)
        return [
            Item.grid(
                frames,
                rows // merge,
                columns // merge,
                video=call.modality == "video",
                seconds=torch.arange(frames, dtype=torch.float64) * step,
            )
            for (frames, rows, columns), step in zip(grids, steps, strict=True)
        ]

    def frame_times(self, seconds: Tensor) -> Tensor:
        return seconds[:: self._joined]

    def tower(self, modality: Modality) -> Tower | None:
        visual: Any = self.base_model.visual
        return Tower(visual.blocks[-1])

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        grids = self._grids(call)
        merge = self._merge()
        merged = join_neighbours(torch.cat(maps), merge**2)
        aligned = torch.empty_like(merged)
        aligned[self._order(grids).to(merged.device)] = merged
        tokens = [frames * rows * columns // merge**2 for frames, rows, columns in grids]
        return list(torch.split(aligned, tokens))

    def grey(self, call: MediaCall) -> list[Tensor] | None:
        grids = self._grids(call)
        pixels: Tensor = call.arguments[_PIXELS[call.modality]]
        grey = self.normalisation.grey(pixels.reshape(len(pixels), 3, -1))  # [patches, pixels]
        groups = grey.reshape(-1, self._merge() ** 2, grey.shape[1])
        encoded = groups[self._order(grids).to(grey.device)].flatten(0, 1)
        views = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
        return list(torch.split(encoded, views))

    # -- for this family and those built on it

    @property
    def _joined(self) -> int:
        """Pictures of a clip that are one frame."""
        return int(self.config.vision_config.temporal_patch_size)

    def _merge(self) -> int:
        """Patches along a side of a token."""
        return int(self.config.vision_config.spatial_merge_size)

    def _grids(self, call: MediaCall) -> list[Grid]:
        grids = torch.as_tensor(call.arguments[f"{call.modality}_grid_thw"]).tolist()
        return [(frames, rows, columns) for frames, rows, columns in grids]

    def _order(self, grids: list[Grid]) -> Tensor:
        """The token, row by row, that each merge group of the tower's sequence becomes."""
        merge = self._merge()
        return torch.arange(sum(t * (h // merge) * (w // merge) for t, h, w in grids))

    def _seconds_per_frame(self, call: MediaCall, prompt: dict[str, Any]) -> list[float] | None:
        """Seconds between the frames of each clip; None if the model is not given them."""
        seconds = None if self.seconds_name is None else prompt.get(self.seconds_name)
        if call.modality != "video" or seconds is None:
            return None
        clips = len(self._grids(call))
        steps: list[float] = torch.as_tensor(seconds, dtype=torch.float64).tolist()
        # Beams repeat each entry.
        return steps[:: len(steps) // clips] if len(steps) % clips == 0 else None


_PIXELS: dict[Modality, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
