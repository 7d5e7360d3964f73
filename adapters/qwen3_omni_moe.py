"""Qwen3-Omni, the thinker: pictures as in Qwen3-VL, but timed; 13 tokens a second of audio."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from tokenprune.adapters._audio import MEL_SECONDS, audio_tower
from tokenprune.adapters.base import Item, MediaCall, Tower
from tokenprune.adapters.qwen3_vl import Qwen3VL
from tokenprune.core.layout import Modality

__all__ = ["Qwen3OmniMoe"]

STRIDE: Final = 8
"""Mel frames a token: three convolutions of stride two."""


class Qwen3OmniMoe(Qwen3VL):
    """The thinker of Qwen3-Omni. The audio of a clip is an item of its own.

    A view of audio is a window of several seconds, or what a sound has left for its last one.
    """

    model_types = ("qwen3_omni_moe_thinker",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video", "audio")
    audio_in_video: ClassVar[bool] = True
    seconds_name: ClassVar[str | None] = "video_second_per_grid"

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        if call.modality != "audio":
            return super().items(call, prompt)
        mask: Tensor = call.arguments["feature_attention_mask"]
        chunk = 2 * self.config.audio_config.n_window
        return [Item.audio(_seconds(count, chunk)) for count in mask.sum(dim=-1).tolist()]

    def tower(self, modality: Modality) -> Tower | None:
        return audio_tower(self.base_model) if modality == "audio" else super().tower(modality)

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        if call.modality != "audio":
            return super().align(call, maps)
        return list(torch.split(torch.cat(maps), [len(item.real) for item in call.items]))


def _seconds(mel_frames: int, chunk: int) -> Tensor:
    """When each token begins: `[N]`.

    The convolutions run over chunks of a second, so the last token of each is a shorter one.
    """
    starts = [
        begin + frame
        for begin in range(0, mel_frames, chunk)
        for frame in range(0, min(chunk, mel_frames - begin), STRIDE)
    ]
    return torch.tensor(starts, dtype=torch.float64) * MEL_SECONDS
