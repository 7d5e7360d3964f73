"""Granite Speech: a Q-Former makes three tokens of each 0.3 seconds of audio."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from tokenprune.adapters._audio import MEL_SECONDS, padding_after
from tokenprune.adapters.base import Adapter, Item, MediaCall, Tower
from tokenprune.core.layout import Modality

__all__ = ["GraniteSpeech"]

STATE_SECONDS: Final = 2 * MEL_SECONDS
"""Two mel frames are stacked to be one state of the encoder."""


class GraniteSpeech(Adapter):
    """Granite Speech. Tokens of a window all attend to all of it: they have its frame and time.

    The encoder attends in blocks, the last one padded; a view is one of them.
    """

    model_types = ("granite_speech",)
    modalities: ClassVar[tuple[Modality, ...]] = ("audio",)

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        features: Tensor = call.arguments["input_features"]  # [items, states, two mel frames]
        window = self.config.window_size
        queries = window // self.config.downsample_rate
        mask = prompt.get("input_features_mask")  # [items, tokens]
        if mask is None:
            tokens = [-(-features.shape[1] // window) * queries] * len(features)
        else:
            tokens = mask.sum(dim=-1).tolist()
        frames = [torch.arange(count) // queries for count in tokens]
        return [Item.audio(frame * (window * STATE_SECONDS), frame) for frame in frames]

    def tower(self, modality: Modality) -> Tower | None:
        encoder: Any = self.base_model.get_submodule("encoder")
        return Tower(encoder.layers[-1], biased=True)

    def padding(self, call: MediaCall) -> Tensor | None:
        features: Tensor = call.arguments["input_features"]
        block = self.config.encoder_config.context_size
        starts = torch.arange(0, features.shape[1], block, device=features.device)
        return padding_after((features.shape[1] - starts).repeat(len(features)), block)

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        """As in the base; each token of a window has the mean of its states, which is our choice.

        A Q-Former makes the tokens, and each of them of all states of the window.
        """
        features: Tensor = call.arguments["input_features"]
        window = self.config.window_size
        queries = window // self.config.downsample_rate
        sounds = torch.stack(maps).reshape(len(features), -1, *maps[0].shape[1:])
        aligned = []
        for states, item in zip(sounds[:, : features.shape[1]], call.items, strict=True):
            means = torch.stack([part.mean(dim=0) for part in states.split(window)])
            aligned.append(means.repeat_interleave(queries, dim=0)[: len(item.real)])
        return aligned
