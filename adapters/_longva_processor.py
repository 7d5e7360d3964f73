"""The processors of LongVA, which transformers lacks: images in tiles without a view of the whole.

PerceptionLM takes images in one tensor, of equally many tiles each. Those of one prompt that have
not are handed over as one, and separated by the text between their placeholders, which the chat
template writes. Those of a batch of prompts are refused.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

__all__ = ["LongVAImageProcessor", "LongVAProcessor"]


class LongVAImageProcessor(transformers.LlavaNextImageProcessor):  # type: ignore[misc]
    """Cuts images into tiles as LongVA does: padded to the best grid, no view of the whole."""

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def preprocess(self, images: Any, *args: Any, **settings: Any) -> Any:
        """Images to `pixel_values`: `[tiles, 3, H, W]` each."""
        kind = settings.pop("return_tensors", None)
        found = super().preprocess(images, *args, **{**settings, "do_pad": False})
        tiles = [one[1:] for one in found["pixel_values"]]  # the first is the view of the whole
        return transformers.BatchFeature({"pixel_values": tiles}, tensor_type=kind)

    def tiles(self, picture: Tensor) -> Tensor:
        """What the tiles show of a picture `[3, h, w]` uint8: `[tiles, 3, H, W]` uint8."""
        plain = {"do_rescale": False, "do_normalize": False}
        found: Tensor = self.preprocess([picture], **plain)["pixel_values"][0]
        return found.to(torch.uint8)

    def columns(self, height: int, width: int) -> int:
        """How many tiles of a picture of this size lie side by side."""
        best = select_best_resolution((height, width), self.image_grid_pinpoints)
        return int(best[1] // self.crop_size["width"])


class LongVAProcessor(transformers.PerceptionLMProcessor):  # type: ignore[misc]
    """PerceptionLM's, for images of one prompt that need not have equally many tiles."""

    @classmethod
    def of(cls, plain: Any) -> LongVAProcessor:
        """This processor, made of the parts of PerceptionLM's."""
        return cls(
            video_processor=plain.video_processor,
            image_processor=plain.image_processor,
            tokenizer=plain.tokenizer,
            patch_size=plain.patch_size,
            pooling_ratio=plain.pooling_ratio,
            chat_template=plain.chat_template,
        )

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, **settings: Any
    ) -> Any:
        """Inputs of the model; `pixel_values` is `[images, tiles, 3, H, W]`.

        Of images with different numbers of tiles it is `[1, tiles of all, 3, H, W]`.

        Raises:
            ValueError: Such images are of several prompts.
        """
        kind = settings.pop("return_tensors", None)
        found = dict(super().__call__(images=images, text=text, videos=videos, **settings))
        pixels = found.get("pixel_values")
        if pixels is not None and len(counts := {len(one) for one in pixels}) > 1:
            if len(found["input_ids"]) > 1:
                raise ValueError(
                    "images of several prompts must have equally many tiles, got "
                    f"{sorted(counts)}; give the prompts one by one"
                )
            found["pixel_values"] = [torch.cat(list(pixels))]
        return transformers.BatchFeature(found, tensor_type=kind)

    def to_dict(self, *args: Any, **settings: Any) -> dict[str, Any]:
        """What is saved: the name is that of PerceptionLM's, which transformers looks for."""
        found: dict[str, Any] = super().to_dict(*args, **settings)
        return found | {"processor_class": transformers.PerceptionLMProcessor.__name__}


class _Tiled(transformers.PerceptionLMConfig):  # type: ignore[misc]
    """Stands in the registry for checkpoints that are found by the name of their processor."""


class _Named(dict[str, type]):
    """As transformers keeps image processors, with the name by which it looks for other kinds."""

    __name__ = ""


transformers.AutoImageProcessor.register(
    _Tiled, image_processor_classes=_Named(torchvision=LongVAImageProcessor)
)
