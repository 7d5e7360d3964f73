"""How coded frames are to be shown: turned, mirrored, and with square pixels."""

import struct
import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

__all__ = ["Aspect", "Geometry", "Orientation", "geometry", "orientation"]

Aspect = Literal["displayed", "stored"]
"""Whether frames are widened to square pixels, or have the pixels that are stored."""

_MATRIX = struct.Struct("=9i")  # a b u, c d v, x y w: x' = ax + cy, y' = bx + dy
_SKEW = 0.01  # less than this beside the axes may be rounding
_WIDEST_PIXEL = 16  # more, or less than one part of it, is damage
_LARGEST_SIDE = 16384


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways in which a picture may lie.

    Attributes:
        mirrored: whether columns are reversed, left to right, before all else.
        rotation: degrees by which it is then turned counterclockwise: 0, 90, 180, 270.
    """

    mirrored: bool = False
    rotation: int = 0


@dataclass(frozen=True)
class Geometry:
    """Sizes of a stream's frames.

    Attributes:
        width: of a frame as delivered.
        height: of a frame as delivered.
        stored_width: of a coded frame.
        stored_height: of a coded frame.
        pixel_aspect: width of a stored pixel by its height.
        orientation: how a coded frame is to be turned.
    """

    width: int
    height: int
    stored_width: int
    stored_height: int
    pixel_aspect: float
    orientation: Orientation


def geometry(stream: Any, frame: Any, aspect: Aspect) -> Geometry:
    """Sizes and orientation, from the first frame if one could be decoded.

    Args:
        stream: the PyAV stream.
        frame: its first frame, or None.
        aspect: whether pixels are to be square.

    Warns:
        UserWarning: the display matrix is none of the eight orientations.
    """
    shown = stream.codec_context if frame is None else frame
    width, height = stored = int(shown.width), int(shown.height)
    matrix = None if frame is None else frame.side_data.get("DISPLAYMATRIX")
    turn: Orientation | None = Orientation()
    if matrix is not None and matrix.buffer_size >= _MATRIX.size:
        turn = orientation(_MATRIX.unpack(bytes(matrix)[: _MATRIX.size]))
    if turn is None:
        warnings.warn(
            f"{stream.container.name!r} asks for frames to be skewed, or turned by a part of a "
            "right angle; they come as they are stored",
            stacklevel=2,
        )
    # FFmpeg makes scales of the matrix part of the container's pixel aspect, skewed ones too.
    square = _pixel_aspect(stream.codec_context if turn is None else stream)
    turn = turn or Orientation()
    if aspect == "displayed":
        width = min(max(1, round(width * square)), max(_LARGEST_SIDE, width))
    if turn.rotation in (90, 270):
        width, height = height, width
    return Geometry(width, height, *stored, float(square), turn)


def orientation(matrix: tuple[int, ...]) -> Orientation | None:
    """The orientation that a display matrix `[9]` means; None if it is none of the eight."""
    a, b, u, c, d, v = matrix[:6]
    straight, turned = (abs(a), abs(d)), (abs(b), abs(c))
    along, across = (straight, turned) if min(straight) > min(turned) else (turned, straight)
    if not min(along) or max(across) > _SKEW * min(along) or u or v:
        return None
    mirrored = a * d < b * c
    a, b = (-a, -b) if mirrored else (a, b)
    if abs(a) > abs(b):
        return Orientation(mirrored, 0 if a > 0 else 180)
    return Orientation(mirrored, 90 if b < 0 else 270)


def _pixel_aspect(told_by: Any) -> Fraction:
    """Width of a pixel by its height, as a stream or its codec tells it; 1 if unknown."""
    found = told_by.sample_aspect_ratio
    ratio = Fraction(found) if found else Fraction(1)
    return ratio if Fraction(1, _WIDEST_PIXEL) <= ratio <= _WIDEST_PIXEL else Fraction(1)
