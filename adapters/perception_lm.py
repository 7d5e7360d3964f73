"""PerceptionLM: tiles or frames of one size, pooled after the projector."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig

from tokenprune.adapter import Adapter, Item, MediaCall, Tower
from tokenprune.adapters._pixels import CLIP, HALF, Normalisation, patches
from tokenprune.layout import Modality

__all__ = ["PerceptionLM"]


class PerceptionLM(Adapter):
    """PerceptionLM, and LongVA, which `tokenprune convert longva` writes as one on a CLIP tower.

    How the tiles of an image lie is not among the model's inputs: each tile is a canvas of its
    own. PerceptionLM shows the whole picture first; LongVA shows tiles alone, so that a picture of
    what was kept is one of its first tile. The model is not told when its frames were taken.
    """

    model_types = ("perception_lm",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    @classmethod
    def mend(cls, config: Any) -> Any:
        told = getattr(config, "clip_config", None)
        if told and not isinstance(config.vision_config, CLIPVisionConfig):
            # Early releases of transformers take every tower for one of timm's.
            config.vision_config = CLIPVisionConfig(**told)
        return config

    def encoders(self) -> dict[str, Modality]:
        return {"get_image_features": "image"}

    def modality(
        self, modality: Modality, arguments: dict[str, Any], prompt: dict[str, Any]
    ) -> Modality:
        # Frames are encoded by the method for images, but only the forward itself does that.
        return (
            "video" if arguments["pixel_values"] is prompt.get("pixel_values_videos") else "image"
        )

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        pixels = call.arguments["pixel_values"]
        side = self._side(call) // self._pooled
        item = Item.grid(pixels.shape[1], side, side, video=call.modality == "video")
        return [item] * len(pixels)

    def tower(self, modality: Modality) -> Tower | None:
        tower: Any = self.base_model.vision_tower
        prefix = int(self.config.vision_use_cls_token)
        if hasattr(tower, "timm_model"):
            return Tower(tower.timm_model.blocks[-1], prefix)
        # Some releases of transformers wrap the tower once more.
        return Tower(getattr(tower, "vision_model", tower).encoder.layers[-1], prefix)

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        side = self._side(call)
        pooled = functional.adaptive_avg_pool2d(
            torch.stack(maps).reshape(-1, side, side), side // self._pooled
        )
        return list(pooled.reshape(len(call.items), -1))

    def grey(self, call: MediaCall) -> list[Tensor] | None:
        pictures = call.arguments["pixel_values"].flatten(0, 1)
        clip = self.config.vision_config.model_type == "clip_vision_model"
        normalisation: Normalisation = CLIP if clip else HALF
        return list(normalisation.grey(patches(pictures, self._patch)))

    @property
    def _patch(self) -> int:
        """Pixels along a side of a patch."""
        tower: Any = self.base_model.vision_tower
        if hasattr(tower, "timm_model"):
            return int(tower.timm_model.patch_embed.patch_size[0])
        return int(self.config.vision_config.patch_size)

    @property
    def _pooled(self) -> int:
        """Patches along a side of a token."""
        return int(self.config.projector_pooling_ratio)

    def _side(self, call: MediaCall) -> int:
        """Patches along a side of a tile or frame."""
        return int(call.arguments["pixel_values"].shape[-1] // self._patch)
