"""Qwen2-Audio: 25 tokens a second of audio."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from tokenprune.adapters._audio import (
    MEL_SECONDS,
    audio_tower,
    convolved,
    even_audio,
    padding_after,
)
from tokenprune.adapters._maps import join_neighbours
from tokenprune.adapters.base import Adapter, Item, MediaCall, Tower
from tokenprune.core.layout import Modality
from tokenprune.errors import UnsupportedModelError

__all__ = ["SECONDS_PER_TOKEN", "Qwen2Audio", "audio_items"]

SECONDS_PER_TOKEN: Final = 4 * MEL_SECONDS


def audio_items(mel_frames: Tensor) -> list[Item]:
    """Items of so many mel frames: a convolution of stride two, then a mean over two."""
    tokens = convolved(mel_frames) // 2
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

    def tower(self, modality: Modality) -> Tower | None:
        return audio_tower(self.base_model)

    def padding(self, call: MediaCall) -> Tensor | None:
        frames: Tensor | None = call.arguments.get("feature_attention_mask")
        if frames is not None:
            return padding_after(convolved(frames.sum(dim=-1)), -(-frames.shape[-1] // 2))
        mask: Tensor | None = call.arguments.get("attention_mask")
        if mask is None:
            return None
        # Kernels differ in their masks: [W, Nv], or [W, 1, Nv, Nv] of bools or of what is added.
        keys = mask if mask.ndim == 2 else mask[:, 0, 0]
        return keys < 0 if keys.is_floating_point() else keys == 0

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        return [
            join_neighbours(one, 2)[: len(item.real)]
            for one, item in zip(maps, call.items, strict=True)
        ]


def _expanded(placeholders: Tensor) -> bool:
    """Whether any of the placeholders `[B, S]` are neighbours: the model goes by the same sign."""
    return bool((placeholders[:, 1:] & placeholders[:, :-1]).any())
