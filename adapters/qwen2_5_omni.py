"""Qwen2.5-Omni, the thinker: pictures as in Qwen2.5-VL, audio as in Qwen2-Audio."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokenprune.adapters.base import Item, MediaCall, Tower
from tokenprune.adapters.qwen2_5_vl import Qwen2_5VL
from tokenprune.adapters.qwen2_audio import audio_items
from tokenprune.core.layout import Modality

__all__ = ["Qwen2_5Omni"]


class Qwen2_5Omni(Qwen2_5VL):
    """The thinker of Qwen2.5-Omni. The audio of a clip is an item of its own."""

    model_types = ("qwen2_5_omni_thinker",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video", "audio")
    audio_in_video: ClassVar[bool] = True
    seconds_name: ClassVar[str | None] = "video_second_per_grid"

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        if call.modality != "audio":
            return super().items(call, prompt)
        mask = call.arguments.get("feature_attention_mask")
        lengths = call.arguments.get("audio_feature_lengths") if mask is None else mask.sum(dim=1)
        return audio_items(torch.as_tensor(lengths))

    def tower(self, modality: Modality) -> Tower | None:
        return None if modality == "audio" else super().tower(modality)
