"""Pixels: patches of a picture, and grey levels from normalised values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["CLIP", "HALF", "IMAGENET", "Normalisation", "patches"]


@dataclass(frozen=True)
class Normalisation:
    """How a processor normalises a picture of 0..1: `(picture - mean) / std` a channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def grey(self, pixels: Tensor) -> Tensor:
        """Grey levels, the mean of red, green and blue.

        Args:
            pixels: `[..., 3, pixels]`, normalised.

        Returns:
            `[..., pixels]` float32, whole numbers 0..255.
        """
        pixels = pixels.float()
        mean = pixels.new_tensor(self.mean)[:, None]
        std = pixels.new_tensor(self.std)[:, None]
        levels = ((pixels * std + mean) * 255).clamp(0, 255)
        return levels.mean(dim=-2).round()


CLIP = Normalisation(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)
HALF = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
IMAGENET = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def patches(pictures: Tensor, side: int) -> Tensor:
    """Cut pictures `[W, 3, height, width]` into patches `[W, Nv, 3, pixels]`, row by row."""
    views, channels, height, width = pictures.shape
    rows, columns = height // side, width // side
    pictures = pictures[:, :, : rows * side, : columns * side]
    blocks = pictures.reshape(views, channels, rows, side, columns, side)
    blocks = blocks.permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(views, rows * columns, channels, side * side)
