"""ViP-LLaVA: as LLaVA, on the features of several layers of the tower, never its class token."""

from __future__ import annotations

from typing import ClassVar

from tokenprune.adapters.base import Item, MediaCall
from tokenprune.adapters.llava import Llava
from tokenprune.core.layout import Modality

__all__ = ["VipLlava"]


class VipLlava(Llava):
    """ViP-LLaVA. Its map is that of the deepest of its feature layers."""

    model_types = ("vipllava",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)

    @property
    def _feature_layer(self) -> int | list[int]:
        # Releases of transformers differ in the name.
        newer = hasattr(self.config, "vision_feature_layer")
        name = "vision_feature_layer" if newer else "vision_feature_layers"
        layers: int | list[int] = getattr(self.config, name)
        return layers

    def _with_class_token(self, item: Item, call: MediaCall) -> Item:
        return item
