"""PerceptionLM: tiles or frames of one size, pooled after the projector."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig

from tokenprune.adapters._longva_processor import LongVAImageProcessor, LongVAProcessor
from tokenprune.adapters._maps import pool_grid
from tokenprune.adapters._pixels import CLIP, HALF, Normalisation, patches
from tokenprune.adapters.base import Adapter, Item, MediaCall, Tower
from tokenprune.core.indices import runs
from tokenprune.core.layout import Modality

__all__ = ["PerceptionLM"]


class PerceptionLM(Adapter):
    """PerceptionLM, and LongVA, which `tokenprune convert longva` writes as one on a CLIP tower.

    How the tiles of an image lie is not among the model's inputs: each tile is a canvas of its
    own. PerceptionLM shows the whole picture first, LongVA shows tiles alone. The model is not told
    when its frames were taken.
    """

    model_types = ("perception_lm",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    @classmethod
    def fix_config(cls, config: Any) -> Any:
        clip = getattr(config, "clip_config", None)
        if clip and not isinstance(config.vision_config, CLIPVisionConfig):
            # Early releases of transformers take every tower for one of timm's.
            config.vision_config = CLIPVisionConfig(**clip)
        return config

    @classmethod
    def fix_processor(cls, processor: Any) -> Any:
        tiled = isinstance(processor.image_processor, LongVAImageProcessor)
        return LongVAProcessor.of(processor) if tiled else processor

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
        video, counts = call.modality == "video", [pixels.shape[1]]
        if not video and prompt.get("input_ids") is not None:
            counts = self._tiles(pixels.shape[1], side**2, prompt["input_ids"])
        return [Item.grid(count, side, side, video=video) for count in counts] * len(pixels)

    def tower(self, modality: Modality) -> Tower | None:
        tower: Any = self.base_model.vision_tower
        prefix = int(self.config.vision_use_cls_token)
        if hasattr(tower, "timm_model"):
            return Tower(tower.timm_model.blocks[-1], prefix)
        # Some releases of transformers wrap the tower once more.
        return Tower(getattr(tower, "vision_model", tower).encoder.layers[-1], prefix)

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        side = self._side(call)
        tokens = side // self._pooled
        pooled = pool_grid(
            torch.stack(maps), (side, side), lambda x: functional.adaptive_avg_pool2d(x, tokens)
        )
        return list(torch.split(pooled.flatten(0, 1), [len(item.row) for item in call.items]))

    def grey(self, call: MediaCall) -> list[Tensor] | None:
        pictures = call.arguments["pixel_values"].flatten(0, 1)
        clip = self.config.vision_config.model_type == "clip_vision_model"
        normalisation: Normalisation = CLIP if clip else HALF
        return list(normalisation.grey(patches(pictures, self._patch)))

    def _tiles(self, tiles: int, tokens: int, ids: Tensor) -> list[int]:
        """Tiles of each image in a line of `pixel_values`: of one, or of all images of a prompt.

        Args:
            tiles: Tiles in all.
            tokens: Tokens of a tile.
            ids: `[B, S]`, the prompt: the placeholders of an image are one unbroken run.
        """
        found = list(runs(ids[:1] == self.config.image_token_id))
        counts = [run // tokens for run in found]
        fits = all(run % tokens == 0 for run in found) and sum(counts) == tiles
        return counts if fits else [tiles]

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
