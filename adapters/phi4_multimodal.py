"""Phi-4-multimodal: tiles and the whole of an image, and 12.5 tokens a second of audio."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.adapters._audio import MEL_SECONDS, even_audio
from tokenprune.adapters._maps import pool_grid
from tokenprune.adapters._pixels import HALF, Normalisation, patches
from tokenprune.adapters.base import Adapter, Item, MediaCall, Tower
from tokenprune.core.layout import Modality

__all__ = ["Phi4Multimodal"]

_MEDIA = (
    "image_pixel_values",
    "image_sizes",
    "image_attention_mask",
    "audio_input_features",
    "audio_embed_sizes",
    "audio_attention_mask",
)


class _Tiles(NamedTuple):
    """Rows and columns of an image's tiles, and of the tokens of them that are no padding."""

    rows: int
    columns: int
    useful_rows: int
    useful_columns: int


class Phi4Multimodal(Adapter):
    """Phi-4-multimodal. Canvas 1 of an image is its tiles without padding, canvas 0 all of it.

    Maps are of attention in both directions, as the tower was trained. Where no patch of a call is
    padding, transformers 5.23 runs this tower with a causal mask (not with eager attention).

    The encoder of sounds attends to padding, too, if a little less; views are sounds, or 40 seconds
    of a longer one.
    """

    model_types = ("phi4_multimodal",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "audio")
    normalisation: ClassVar[Normalisation] = HALF

    def token_ids(self) -> dict[Modality, int]:
        return {
            "image": self.config.vision_config.image_token_id,
            "audio": self.config.audio_config.audio_token_id,
        }

    def encoders(self) -> dict[str, Modality]:
        return {
            "embed_tokens_extend.image_embed.forward": "image",
            "embed_tokens_extend.audio_embed.forward": "audio",
        }

    def embed(self, prompt: dict[str, Any]) -> Tensor:
        # The language model mixes media into the embeddings itself, where none are given.
        model: Any = self.language_model
        ids = prompt.pop("input_ids")
        media = {name: prompt.pop(name) for name in _MEDIA if name in prompt}
        embedded: Tensor = model.embed_tokens_extend(ids, model.embed_tokens(ids), **media)
        return embedded

    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        if call.modality == "audio":
            return self._audio(call)
        return [_image(tiles, self._side()) for tiles in self._tiles(call)]

    def tower(self, modality: Modality) -> Tower | None:
        base: Any = self.base_model
        if modality == "audio":
            return Tower(base.embed_tokens_extend.audio_embed.encoder.encoders[-1], biased=True)
        layers = base.embed_tokens_extend.image_embed.img_processor.encoder.layers
        # Entry 0 of the hidden states is the embeddings.
        layer = self.config.vision_config.feature_layer
        last = layer if layer >= 0 else len(layers) + 1 + layer
        return Tower(layers[last - 1]) if last > 0 else None

    def padding(self, call: MediaCall) -> Tensor | None:
        mask: Tensor | None = call.arguments.get("image_attention_mask")  # [images, views, h, w]
        return None if mask is None else ~mask.bool().flatten(0, 1).flatten(1)

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        if call.modality == "audio":
            # Long sounds are cut into several views.
            sounds = torch.stack(maps).reshape(len(call.items), -1, *maps[0].shape[1:])
            return [one[: len(item.real)] for one, item in zip(sounds, call.items, strict=True)]
        count, side, tiling = self._patches(), self._side(), self._tiles(call)
        views = pool_grid(torch.stack(maps), (count, count), _pool)  # [W, side * side, ...]
        images = views.reshape(len(tiling), -1, side, side, *views.shape[2:])
        return [_cut(image, tiles) for image, tiles in zip(images, tiling, strict=True)]

    def grey(self, call: MediaCall) -> list[Tensor] | None:
        pixels: Tensor = call.arguments["image_pixel_values"].flatten(0, 1)
        return list(self.normalisation.grey(patches(pixels, self.config.vision_config.patch_size)))

    def _audio(self, call: MediaCall) -> list[Item]:
        audio = self.config.audio_config
        step = audio.time_reduction * audio.downsample_rate * MEL_SECONDS
        sizes = torch.as_tensor(call.arguments["audio_embed_sizes"]).flatten().tolist()
        return [even_audio(tokens, step) for tokens in sizes]

    def _patches(self) -> int:
        """Patches along a side of a view."""
        vision = self.config.vision_config
        return int(vision.crop_size // vision.patch_size)

    def _side(self) -> int:
        """Tokens along a side of a view: four patches are one."""
        return -(-self._patches() // 2)

    def _tiles(self, call: MediaCall) -> list[_Tiles]:
        """How each image of a call was tiled."""
        crop, side = self.config.vision_config.crop_size, self._side()
        sizes = torch.as_tensor(call.arguments["image_sizes"]).view(-1, 2).tolist()
        masks: Tensor | None = call.arguments.get("image_attention_mask")
        found = []
        for number, (height, width) in enumerate(sizes):
            rows, columns = height // crop, width // crop
            useful = torch.ones(rows * side, columns * side)
            if masks is not None:
                tiles = masks[number, 1 : rows * columns + 1, ::2, ::2].float()
                useful = _mosaic(tiles, rows, columns)
            found.append(_Tiles(rows, columns, int(useful[:, 0].sum()), int(useful[0, :].sum())))
        return found


def _pool(pictures: Tensor) -> Tensor:
    """Average patches `[W, C, rows, columns]` two by two; an odd side is reflected."""
    if pictures.shape[-1] % 2:
        pictures = functional.pad(pictures, (0, 1, 0, 1), mode="reflect")
    return functional.avg_pool2d(pictures, 2)


def _mosaic(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Lay tiles `[rows * columns, h, w, ...]` side by side: `[rows * h, columns * w, ...]`."""
    _, height, width, *channels = tiles.shape
    grid = tiles.reshape(rows, columns, height, width, *channels).transpose(1, 2)
    return grid.reshape(rows * height, columns * width, *channels)


def _cut(views: Tensor, tiles: _Tiles) -> Tensor:
    """An entry for each token of an image, `[N, ...]`, from its views `[W, side, side, ...]`."""
    whole = _mosaic(views[1 : tiles.rows * tiles.columns + 1], tiles.rows, tiles.columns)
    useful = whole[: tiles.useful_rows, : tiles.useful_columns]
    return torch.cat([useful.flatten(0, 1), views[0].flatten(0, 1)])


def _image(tiles: _Tiles, side: int) -> Item:
    """Its tiles, a separator, and the view of all of it; each line ends in a separator."""
    detail = Item.grid(1, tiles.useful_rows, tiles.useful_columns, video=False)
    detail = replace(detail, canvas=torch.ones_like(detail.canvas))
    parts = [detail, Item.grid(1, side, side, video=False)]
    columns = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])
        for field in fields(Item)
    }
    real = [_lines(tiles.useful_rows, tiles.useful_columns), _SEPARATOR, _lines(side, side)]
    return Item(**{**columns, "real": torch.cat(real)})


_SEPARATOR = torch.zeros(1, dtype=torch.bool)


def _lines(rows: int, columns: int) -> Tensor:
    """`[rows * (columns + 1)]` bool, False at the separator that ends each line."""
    line = torch.cat([torch.ones(columns, dtype=torch.bool), _SEPARATOR])
    return line.repeat(rows)
