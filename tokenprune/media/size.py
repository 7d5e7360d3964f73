"""Rules for the size of frames, as models want them; the decoder applies them."""

import math
from dataclasses import dataclass

from tokenprune.errors import MediaError
from tokenprune.media.numbers import parse_whole

__all__ = ["MAX_TOKENS", "MIN_TOKENS", "PixelLimits", "ShortestEdge", "VolumeLimits"]

MIN_TOKENS, MAX_TOKENS = 128, 768  # of a frame, by default; a token is `multiple` pixels a side
LONGEST = 200  # times as long as wide


@dataclass(frozen=True)
class PixelLimits:
    """Sides in whole tokens, and limits to the pixels of a frame: the rule of Qwen-VL's messages.

    The source's aspect ratio is kept as far as whole tokens allow.

    Qwen2-VL's and Qwen2.5-VL's processors have the same rule, without `total_pixels`. Qwen3-VL's
    has `VolumeLimits`; tell it `do_resize=False` to keep what this rule made.

    Attributes:
        multiple: sides are multiples of this: the side of a patch times the merge, 28 in Qwen2-VL
            and Qwen2.5-VL, 32 in Qwen3-VL.
        min_pixels: of a frame; smaller ones are enlarged. None means 128 tokens.
        max_pixels: of a frame; larger ones are reduced. None means 768 tokens.
        total_pixels: that the frames share, two of them counted as one since they make one token;
            None for no such limit. Alone it never pushes a frame below 1.05 times `min_pixels`.

    Raises:
        MediaError: the limits contradict each other; or, when called, the frame is more than 200
            times as long as wide.
    """

    multiple: int = 28
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None

    def __post_init__(self) -> None:
        _make_whole(self, "multiple", "min_pixels", "max_pixels", "total_pixels")
        _check_limits(self.multiple, *self._limits)
        if self.total_pixels is not None and self.total_pixels < 1:
            raise MediaError(f"total_pixels must be at least 1, got {self.total_pixels}")

    def __call__(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """Height and width for frames of a source of this size."""
        least, most = self._limits
        if self.total_pixels is not None:
            share = self.total_pixels * 2 / frames
            return _fit(
                height, width, self.multiple, least, min(most, max(share, int(least * 1.05)))
            )
        return _fit(height, width, self.multiple, least, most)

    @property
    def _limits(self) -> tuple[int, int]:
        token = self.multiple**2
        return (
            MIN_TOKENS * token if self.min_pixels is None else self.min_pixels,
            MAX_TOKENS * token if self.max_pixels is None else self.max_pixels,
        )


@dataclass(frozen=True)
class VolumeLimits:
    """As `PixelLimits`, but with limits to all frames together: the rule of Qwen3-VL's processor.

    Attributes:
        multiple: sides are multiples of this: the side of a patch times the merge.
        min_pixels: of all frames; `size["shortest_edge"]` of a checkpoint's video processor.
        max_pixels: of all frames; `size["longest_edge"]` there.

    Raises:
        MediaError: the limits contradict each other; or, when called, the frame is more than 200
            times as long as wide.
    """

    multiple: int = 32
    min_pixels: int = MIN_TOKENS * 32**2
    max_pixels: int = MAX_TOKENS * 32**2

    def __post_init__(self) -> None:
        _make_whole(self, "multiple", "min_pixels", "max_pixels")
        _check_limits(self.multiple, self.min_pixels, self.max_pixels)

    def __call__(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """Height and width for frames of a source of this size."""
        frames = max(2, frames)  # a single one is shown twice
        if min(height, width) < self.multiple:
            scale = self.multiple / min(height, width)
            height, width = int(height * scale), int(width * scale)
        # Two frames make a token; an odd one counts as none or two, whichever makes pairs even.
        paired = round(frames / 2) * 2
        least, most = self.min_pixels, self.max_pixels
        return _fit(height, width, self.multiple, least, most, frames, paired)


def _make_whole(rule: object, *names: str) -> None:
    """Make fields of a rule Python's whole numbers; None stays."""
    for name in names:
        value = getattr(rule, name)
        if value is not None:
            object.__setattr__(rule, name, parse_whole(name, value))


def _check_limits(multiple: int, least: int, most: int) -> None:
    if multiple < 1:
        raise MediaError(f"multiple must be at least 1, got {multiple}")
    if not 0 < least <= most:
        raise MediaError(
            "min_pixels and max_pixels must satisfy 0 < min_pixels <= max_pixels, got"
            f" {least} and {most}"
        )


def _fit(
    height: int,
    width: int,
    unit: int,
    least: float,
    most: float,
    frames: int = 1,
    counted: int = 1,
) -> tuple[int, int]:
    """Sides in whole units, near the aspect ratio given, from `least` to `most` pixels in all.

    Args:
        frames: how many share the limits.
        counted: how many count where the result is held against the limits.
    """
    if max(height, width) > LONGEST * min(height, width):
        raise MediaError(
            f"frames may be at most {LONGEST} times as long as wide, got {height}x{width}"
        )
    rows, columns = max(1, round(height / unit)), max(1, round(width / unit))
    area = rows * columns * unit * unit * counted
    if area > most:
        shrink = math.sqrt(frames * height * width / most)
        rows, columns = (math.floor(side / shrink / unit) for side in (height, width))
    elif area < least:
        grow = math.sqrt(least / (frames * height * width))
        rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
    return max(1, rows) * unit, max(1, columns) * unit


@dataclass(frozen=True)
class ShortestEdge:
    """A length of the shorter side, at the same aspect ratio: LLaVA-NeXT-Video before it crops.

    Families that squeeze every frame into a square, as LLaVA-OneVision does (384 x 384), need no
    rule: `size=(384, 384)`.
    """

    pixels: int = 336

    def __post_init__(self) -> None:
        _make_whole(self, "pixels")
        if self.pixels < 1:
            raise MediaError(f"pixels must be at least 1, got {self.pixels}")

    def __call__(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """Height and width for frames of a source of this size."""
        longer = int(self.pixels * max(height, width) / min(height, width))
        return (self.pixels, longer) if height <= width else (longer, self.pixels)
