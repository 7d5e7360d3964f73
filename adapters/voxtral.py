"""Voxtral: 12.5 tokens a second of audio, in windows of 30 seconds, silence included."""

from __future__ import annotations

from typing import Any, ClassVar

from tokenprune.adapters._audio import MEL_SECONDS, Windows
from tokenprune.adapters.base import Adapter, Item, MediaCall
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
        audio = self.config.audio_config
        # Neighbouring states of the tower are laid side by side to be one token.
        whole = audio.max_source_positions * audio.hidden_size // audio.intermediate_size
        windows = Windows(
            tokens=[whole] * len(features),
            whole=whole,
            seconds=features.shape[-1] * MEL_SECONDS,
        )
        return windows.items(prompt["input_ids"] == self.config.audio_token_id)
