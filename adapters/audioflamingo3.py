"""Audio Flamingo 3: 25 tokens a second of audio, in windows of 30 seconds."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tokenprune.adapters._audio import MEL_SECONDS, Windows
from tokenprune.adapters.base import Adapter, Item, MediaCall
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
            tokens=_tokens(mask.sum(dim=-1)).tolist(),
            whole=int(_tokens(mask.new_tensor(mask.shape[-1]).long())),
            seconds=mask.shape[-1] * MEL_SECONDS,
        )
        return windows.items(placeholders)


def _tokens(mel_frames: Tensor) -> Tensor:
    """A convolution of stride two, then a mean over two."""
    return ((mel_frames - 1) // 2 + 1) // 2
