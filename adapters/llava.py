"""LLaVA 1.5: one square view an image, on a CLIP or SigLIP tower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.adapters._pixels import CLIP, HALF, Normalisation, patches
from tokenprune.adapters.base import Adapter, Item, MediaCall, Tower
from tokenprune.core.layout import Modality

__all__ = ["Llava"]


class Llava(Adapter):
    """LLaVA 1.5. On a Pixtral tower pictures of any size share a sequence: each is a view."""

    model_types = ("llava",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    normalisations: ClassVar[dict[str, Normalisation]] = {
        "clip_vision_model": CLIP,
        "pixtral": CLIP,
        "siglip_vision_model": HALF,
    }
    """By tower: what the released processors do."""
    prefix_tokens: ClassVar[dict[str, int]] = {
        "clip_vision_model": 1,
        "pixtral": 0,
        "siglip_vision_model": 0,
    }
    """By tower: tokens of a view that are no patches."""

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        items = [Item.grid(1, rows, columns, video=False) for rows, columns in self._grids(call)]
        return [self._with_class_token(item, call) for item in items]

    def tower(self, modality: Modality) -> Tower | None:
        vision = self.config.vision_config
        if vision.model_type not in self.prefix_tokens:
            return None
        block = self._block(self._feature_layer, self._encoder(modality))
        return None if block is None else Tower(block, self.prefix_tokens[vision.model_type])

    def view_lengths(self, call: MediaCall) -> list[int] | None:
        if self.config.vision_config.model_type != "pixtral":
            return None
        return [rows * columns for rows, columns in self._grids(call)]

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        return maps

    def grey(self, call: MediaCall) -> list[Tensor] | None:
        vision = self.config.vision_config
        if vision.model_type not in self.normalisations:
            return None
        normalisation, patch = self.normalisations[vision.model_type], vision.patch_size
        pictures = self._pictures(call)
        if vision.model_type != "pixtral":
            return list(normalisation.grey(patches(pictures, patch)))
        return [  # smaller pictures are padded
            normalisation.grey(
                patches(picture[None, :, : rows * patch, : columns * patch], patch)[0]
            )
            for picture, (rows, columns) in zip(pictures, self._grids(call), strict=True)
        ]

    # -- for this family and those built on it

    @property
    def side(self) -> int:
        """Patches along a side of a view."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size)

    @property
    def _feature_layer(self) -> int | list[int]:
        """Which of the tower's hidden states become the features."""
        layer: int | list[int] = self.config.vision_feature_layer
        return layer

    def _encoder(self, modality: Modality) -> nn.Module:
        """The tower of a modality."""
        tower: nn.Module = self.base_model.get_submodule("vision_tower")
        return tower

    def _grids(self, call: MediaCall) -> list[tuple[int, int]]:
        """Rows and columns of patches of each picture."""
        patch = self.config.vision_config.patch_size
        pictures = self._pictures(call)
        sizes = call.arguments.get("image_sizes")
        if sizes is None:
            sizes = torch.tensor([pictures.shape[-2:]] * len(pictures))
        return [
            (height // patch, width // patch) for height, width in torch.as_tensor(sizes).tolist()
        ]

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

    def _block(
        self, feature_layer: int | list[int], tower: nn.Module | None = None
    ) -> nn.Module | None:
        """The block behind `hidden_states[feature_layer]`, whose entry 0 is the embeddings.

        Args:
            tower: None for the one called `vision_tower`.
        """
        found: Any = self.base_model.get_submodule("vision_tower") if tower is None else tower
        # Some releases of transformers wrap the tower once more.
        found = getattr(found, "vision_model", found)
        layers = (found.transformer if hasattr(found, "transformer") else found.encoder).layers
        chosen = feature_layer if isinstance(feature_layer, list | tuple) else [feature_layer]
        # The features of several layers are concatenated: the deepest has seen the most.
        last = max(layer if layer >= 0 else len(layers) + 1 + layer for layer in chosen)
        block: nn.Module | None = layers[last - 1] if last > 0 else None
        return block
