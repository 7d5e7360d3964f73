"""Qwen2-Audio: 25 tokens a second of audio."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from tokenprune.adapters._audio import MEL_SECONDS, even_audio
from tokenprune.adapters.base import Adapter, Item, MediaCall
from tokenprune.core.layout import Modality
from tokenprune.errors import UnsupportedModelError

__all__ = ["SECONDS_PER_TOKEN", "Qwen2Audio", "audio_items"]

SECONDS_PER_TOKEN: Final = 4 * MEL_SECONDS


def audio_items(mel_frames: Tensor) -> list[Item]:
    """Items of so many mel frames: a convolution of stride two, then a mean over two."""
    tokens = ((mel_frames - 1) // 2 + 1) // 2
    return [even_audio(count, SECONDS_PER_TOKEN) for count in tokens.tolist()]


class Qwen2Audio(Adapter):
    """Qwen2-Audio. Prompts with one placeholder an item, expanded inside the model, are refused."""

    model_types = ("qwen2_audio",)
    modalities = ("audio",)

    def encoders(self) -> dict[str, Modality]:
        # `base_model` is found by these names.
        if hasattr(getattr(self.model, "model", self.model), "get_audio_features"):
            return super().encoders()
        return {"audio_tower.forward": "audio"}

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        ids = prompt.get("input_ids")
        placeholders = None if ids is None else ids == self.config.audio_token_id
        if placeholders is not None and not placeholders.any():
            return []  # the audio belongs to an earlier prompt
        mask = prompt.get("feature_attention_mask")
        mask = call.arguments.get("feature_attention_mask") if mask is None else mask
        if mask is None:
            raise UnsupportedModelError(
                "how long each sound is remains unknown without feature_attention_mask; pass all "
                "that the model's processor returns"
            )
        items = audio_items(mask.sum(dim=-1))
        longest = max(len(item.real) for item in items)
        if placeholders is not None and longest > 1 and not _expanded(placeholders):
            count = int(placeholders.sum())
            raise UnsupportedModelError(
                f"the prompt holds {count} audio placeholders for {len(items)} sounds, "
                "one each, and the model would widen them itself, which cannot be pruned; let the "
                "model's processor expand the placeholders (give it text and sound in one call)"
            )
        return items


def _expanded(placeholders: Tensor) -> bool:
    """Whether any of the placeholders `[B, S]` are neighbours: the model goes by the same sign."""
    return bool((placeholders[:, 1:] & placeholders[:, :-1]).any())
