"""The sizes to which models want their frames brought, as rules that the decoder applies."""

import math
from dataclasses import dataclass

from tokenprune.errors import MediaError

TOKEN_PIXELS = 28 * 28  # pixels that Qwen-VL makes a token of, two frames deep


@dataclass(frozen=True)
class PixelLimits:
    """The rule of Qwen-VL: sides in whole tokens, about the source's shape, so many pixels.

    Attributes:
        multiple: sides are multiples of this: the side of a patch times the merge, 28 in Qwen2-VL
            and Qwen2.5-VL, 32 in Qwen3-VL.
        min_pixels: of a frame; smaller ones are enlarged.
        max_pixels: of a frame; larger ones are reduced.
        total_pixels: that the frames share, two of them counted as one since they make one token;
            None for no such limit. Alone it never pushes a frame below 1.05 times `min_pixels`.

    Raises:
        MediaError: the limits contradict each other; or, when called, the picture is more than 200
            times as long as wide.
    """

    multiple: int = 28
    min_pixels: int = 128 * TOKEN_PIXELS
    max_pixels: int = 768 * TOKEN_PIXELS
    total_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise MediaError(f"multiple must be at least 1, got {self.multiple}")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise MediaError(
                "min_pixels and max_pixels must satisfy 0 < min_pixels <= max_pixels, got"
                f" {self.min_pixels} and {self.max_pixels}"
            )
        if self.total_pixels is not None and self.total_pixels < 1:
            raise MediaError(f"total_pixels must be at least 1, got {self.total_pixels}")

    def __call__(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """Height and width for frames of a source of this size."""
        if max(height, width) > 200 * min(height, width):
            raise MediaError(
                f"frames may be at most 200 times as long as wide, got {height}x{width}"
            )
        most: float = self.max_pixels
        if self.total_pixels is not None:
            share = self.total_pixels * 2 / frames
            most = min(most, max(share, int(self.min_pixels * 1.05)))
        unit = self.multiple
        rows, columns = round(height / unit), round(width / unit)
        area = rows * columns * unit * unit
        if area > most:
            shrink = math.sqrt(height * width / most)
            rows, columns = (math.floor(side / shrink / unit) for side in (height, width))
        elif area < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
        return max(1, rows) * unit, max(1, columns) * unit


@dataclass(frozen=True)
class ShortestEdge:
    """The rule of LLaVA-NeXT-Video before it crops: the shorter side has a length, the shape stays.

    Families that squeeze every frame into a square, as LLaVA-OneVision does (384 x 384), need no
    rule: `size=(384, 384)`.
    """

    pixels: int = 336

    def __post_init__(self) -> None:
        if self.pixels < 1:
            raise MediaError(f"pixels must be at least 1, got {self.pixels}")

    def __call__(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """Height and width for frames of a source of this size."""
        longer = int(self.pixels * max(height, width) / min(height, width))
        return (self.pixels, longer) if height <= width else (longer, self.pixels)
