"""LLaVA 1.5: one square view an image, on a CLIP or SigLIP tower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.adapter import Adapter, Item, MediaCall, Tower
from tokenprune.adapters._pixels import CLIP, HALF, Normalisation, patches
from tokenprune.layout import Modality

__all__ = ["Llava"]


class Llava(Adapter):
    """LLaVA 1.5. Pixtral towers (pictures of any size in one sequence) offer no encoder maps."""

    model_types = ("llava",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    normalisations: ClassVar[dict[str, Normalisation]] = {
        "clip_vision_model": CLIP,
        "siglip_vision_model": HALF,
    }
    """By tower: what the released processors do."""
    prefix_tokens: ClassVar[dict[str, int]] = {"clip_vision_model": 1, "siglip_vision_model": 0}
    """By tower: tokens of a view that are no patches."""

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        patch = self.config.vision_config.patch_size
        sizes = call.arguments.get("image_sizes")
        pixels = call.arguments["pixel_values"]
        if sizes is None:
            sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        items = [
            Item.grid(1, int(height) // patch, int(width) // patch, video=False)
            for height, width in sizes.tolist()
        ]
        return [self._with_class_token(item, call) for item in items]

    def tower(self, modality: Modality) -> Tower | None:
        vision = self.config.vision_config
        if vision.model_type not in self.prefix_tokens:
            return None
        block = self._block(self.config.vision_feature_layer)
        return None if block is None else Tower(block, self.prefix_tokens[vision.model_type])

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        return maps

    def grey(self, call: MediaCall) -> list[Tensor] | None:
        vision = self.config.vision_config
        if vision.model_type not in self.normalisations:
            return None
        normalisation = self.normalisations[vision.model_type]
        return list(normalisation.grey(patches(self._pictures(call), vision.patch_size)))

    # -- for this family and those built on it

    @property
    def side(self) -> int:
        """Patches along a side of a view."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def _pictures(self, call: MediaCall) -> Tensor:
        """All views in the order of encoding: `[W, 3, height, width]`."""
        pixels: Tensor = call.arguments["pixel_values"]
        return pixels

    def _setting(self, call: MediaCall, name: str) -> Any:
        """A setting of the encoder call, or of the configuration where the call leaves it open."""
        value = call.arguments.get(name)
        return getattr(self.config, name) if value is None else value

    def _with_class_token(self, item: Item, call: MediaCall) -> Item:
        """Mark the class token, if the model leaves it among the features: it is no patch."""
        prefix = self.prefix_tokens.get(self.config.vision_config.model_type, 0)
        if prefix and self._setting(call, "vision_feature_select_strategy") == "full":
            return replace(item, real=functional.pad(item.real, (prefix, 0), value=False))
        return item

    def _block(self, feature_layer: int | list[int]) -> nn.Module | None:
        """The block behind `hidden_states[feature_layer]`, whose entry 0 is the embeddings."""
        tower: Any = self.base_model.vision_tower
        # Some releases of transformers wrap the tower once more.
        layers = getattr(tower, "vision_model", tower).encoder.layers
        chosen = feature_layer if isinstance(feature_layer, list | tuple) else [feature_layer]
        # The features of several layers are concatenated: the deepest has seen the most.
        last = max(layer if layer >= 0 else len(layers) + 1 + layer for layer in chosen)
        block: nn.Module | None = layers[last - 1] if last > 0 else None
        return block
