"""Audio Flamingo 3: 25 tokens a second of audio, in windows of 30 seconds."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.adapters._audio import (
    MEL_SECONDS,
    Windows,
    audio_tower,
    convolved,
    padding_after,
)
from tokenprune.adapters._maps import join_neighbours
from tokenprune.adapters.base import Adapter, Item, MediaCall, Tower
from tokenprune.core.layout import Modality

__all__ = ["AudioFlamingo3"]


class AudioFlamingo3(Adapter):
    """Audio Flamingo 3. Padding of the last window is not encoded."""

    model_types = ("audioflamingo3",)
    modalities: ClassVar[tuple[Modality, ...]] = ("audio",)

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        mask: Tensor = call.arguments["input_features_mask"]  # [windows, mel frames]
        placeholders: Tensor = prompt["input_ids"] == self.config.audio_token_id
        windows = Windows(
            tokens=self._tokens(call),
            whole=-(-mask.shape[-1] // 2) // 2,
            seconds=mask.shape[-1] * MEL_SECONDS,
        )
        return windows.items(placeholders)

    def tower(self, modality: Modality) -> Tower | None:
        return audio_tower(self.base_model)

    def padding(self, call: MediaCall) -> Tensor | None:
        mask: Tensor = call.arguments["input_features_mask"]
        return padding_after(convolved(mask.sum(dim=-1)), -(-mask.shape[-1] // 2))

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        windows = zip(maps, self._tokens(call), strict=True)
        tokens = torch.cat([join_neighbours(one, 2)[:count] for one, count in windows])
        return list(torch.split(tokens, [len(item.real) for item in call.items]))

    def _tokens(self, call: MediaCall) -> list[int]:
        """Of each window: a convolution of stride two, then a mean over two."""
        mask: Tensor = call.arguments["input_features_mask"]
        tokens: list[int] = (convolved(mask.sum(dim=-1)) // 2).tolist()
        return tokens
