"""Voxtral: 12.5 tokens a second of audio, in windows of 30 seconds, silence included."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.adapters._audio import MEL_SECONDS, Windows, audio_tower
from tokenprune.adapters._maps import join_neighbours
from tokenprune.adapters.base import Adapter, Item, MediaCall, Tower
from tokenprune.core.layout import Modality

__all__ = ["Voxtral"]


class Voxtral(Adapter):
    """Voxtral.

    The silence that pads the last window is encoded like any other: the model is not told where
    the audio ends. Its tokens are in the layout, and pruning may drop them.
    """

    model_types = ("voxtral",)
    modalities: ClassVar[tuple[Modality, ...]] = ("audio",)

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        features = call.arguments["input_features"]  # [windows, mels, mel frames]
        whole = self.config.audio_config.max_source_positions // self._joined
        windows = Windows(
            tokens=[whole] * len(features),
            whole=whole,
            seconds=features.shape[-1] * MEL_SECONDS,
        )
        return windows.items(prompt["input_ids"] == self.config.audio_token_id)

    def tower(self, modality: Modality) -> Tower | None:
        return audio_tower(self.base_model)

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        tokens = join_neighbours(torch.cat(maps), self._joined)
        return list(torch.split(tokens, [len(item.real) for item in call.items]))

    @property
    def _joined(self) -> int:
        """Neighbouring states of the tower that are laid side by side to be one token."""
        audio = self.config.audio_config
        return int(audio.intermediate_size // audio.hidden_size)
