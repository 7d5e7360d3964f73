"""Qwen2.5-Omni, the thinker: pictures as in Qwen2.5-VL, audio as in Qwen2-Audio."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.adapters._audio import audio_tower, convolved
from tokenprune.adapters._maps import join_neighbours
from tokenprune.adapters.base import Item, MediaCall, Tower
from tokenprune.adapters.qwen2_5_vl import Qwen2_5VL
from tokenprune.adapters.qwen2_audio import audio_items
from tokenprune.core.layout import Modality

__all__ = ["Qwen2_5Omni"]


class Qwen2_5Omni(Qwen2_5VL):
    """The thinker of Qwen2.5-Omni. The audio of a clip is an item of its own.

    A view of audio is a window of two seconds, or what a sound has left for its last one.
    """

    model_types = ("qwen2_5_omni_thinker",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video", "audio")
    audio_in_video: ClassVar[bool] = True
    seconds_name: ClassVar[str | None] = "video_second_per_grid"

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        if call.modality != "audio":
            return super().items(call, prompt)
        return audio_items(self._mel_frames(call))

    def tower(self, modality: Modality) -> Tower | None:
        return audio_tower(self.base_model) if modality == "audio" else super().tower(modality)

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        if call.modality != "audio":
            return super().align(call, maps)
        # A token is two states of a sound, wherever its windows end.
        states = convolved(self._mel_frames(call)).tolist()
        return [join_neighbours(sound, 2) for sound in torch.split(torch.cat(maps), states)]

    def _mel_frames(self, call: MediaCall) -> Tensor:
        """Of each sound of a call."""
        mask = call.arguments.get("feature_attention_mask")
        lengths = call.arguments.get("audio_feature_lengths") if mask is None else mask.sum(dim=1)
        return torch.as_tensor(lengths)
