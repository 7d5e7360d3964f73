"""Colours: what the scaler cannot convert, and high dynamic range brought to that of screens."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import DecodeError
from tokenprune.media.index.index import hdr_transfer

__all__ = ["DEPTH", "ToneMapper", "check_matrix"]

DEPTH = 10  # bits of the planes that a `ToneMapper` takes
WHITE_NITS = 203.0  # of paper in HDR, by ITU-R BT.2408; it becomes nearly the white of a screen
PEAK = 1000.0 / WHITE_NITS  # the brightest that is told apart
KNEE = 0.5  # up to here nothing changes; highlights are pressed into what is above
GAMMA = 2.4  # of a screen, by ITU-R BT.1886

_RESERVED = 3  # as a colour matrix says nothing
_UNSPECIFIED = 2
_RANGES = (0, 1, 2)
_MATRICES = {  # by number in ITU-T H.273: those that swscale cannot convert
    8: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "SMPTE 2085",
    12: "a matrix derived from its primaries",
    13: "a matrix derived from its primaries, with constant luminance",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
_BT709, _BT2020, _P3 = 1, 9, 12
_PRIMARIES = {  # x and y of red, green, blue; their white is that of daylight, D65
    _BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    _BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    _P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)
_LEVELS = 4096  # of linear light, each looked up


def check_matrix(frame: Any, path: str) -> None:
    """Check that the colours of a frame can be converted; tags that say nothing are taken away.

    Raises:
        DecodeError: the scaler does not know their matrix.
    """
    if frame.format.name.startswith(("gbr", "rgb", "bgr", "gray")):
        return
    if frame.color_range not in _RANGES:
        frame.color_range = 0
    matrix = int(frame.colorspace)
    if matrix in _MATRICES:
        raise DecodeError(
            f"the colours of {path!r} are coded as {_MATRICES[matrix]}, which cannot be converted "
            "to RGB here; convert the file, to H.264 with BT.709 say"
        )
    if matrix == _RESERVED or matrix > max(_MATRICES):
        frame.colorspace = _UNSPECIFIED


class ToneMapper:
    """Brings frames of high dynamic range to the range and the primaries of BT.709.

    Light is made linear, with the white of paper as 1; what is brighter than half of that is
    pressed by one smooth curve, equally in all channels, so that hues stay; colours that BT.709
    lacks are cut.
    """

    def __call__(self, frame: Any, planes: NDArray[np.uint16]) -> NDArray[np.uint8]:
        """Tone-map `[3, H, W]` RGB of `DEPTH` bits, as the frame's transfer and primaries say."""
        kind = hdr_transfer(frame)
        light = _linear(kind)[planes]  # [3, H, W]
        if kind == "hlg":  # its light is that of the scene; a screen shows it with more contrast
            weights = np.array([0.2627, 0.6780, 0.0593], np.float32)
            luminance = np.einsum("c,chw->hw", weights, light)
            light *= PEAK * np.maximum(luminance, 1e-6) ** np.float32(0.2)
        brightest = np.maximum(light.max(axis=0), 1e-6)  # [H, W]
        light *= _pressed(brightest) / brightest
        light = np.einsum("dc,chw->dhw", _to_bt709(int(frame.color_primaries)), light)
        levels = (light.clip(0, 1) * (_LEVELS - 1) + 0.5).astype(np.int32)
        shown: NDArray[np.uint8] = _encoded()[levels]
        return shown


@cache
def _linear(kind: str | None) -> NDArray[np.float32]:
    """`[2 ** DEPTH]` linear light of each code: of PQ with paper as 1, of HLG from 0 to 1."""
    code = np.linspace(0, 1, 1 << DEPTH)
    if kind == "pq":  # SMPTE ST 2084
        root = code ** (1 / 78.84375)
        ratio = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
        light = 10000 / WHITE_NITS * ratio ** (1 / 0.1593017578125)
    else:  # ARIB STD-B67
        high = (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12
        light = np.where(code <= 0.5, code**2 / 3, high)
    return light.astype(np.float32)


def _pressed(light: NDArray[np.float32]) -> NDArray[np.float32]:
    """The curve: the same up to the knee, and from there on, as smoothly, to 1 at the peak."""
    room = (PEAK - KNEE) * (1 - KNEE) / (PEAK - 1)
    above = np.maximum(light - KNEE, 0)
    pressed: NDArray[np.float32] = np.minimum(light, KNEE) + above * room / (room + above)
    return pressed


@cache
def _encoded() -> NDArray[np.uint8]:
    """`[_LEVELS]` what a screen is sent for linear light."""
    return (255 * np.linspace(0, 1, _LEVELS) ** (1 / GAMMA) + 0.5).astype(np.uint8)


@cache
def _to_bt709(primaries: int) -> NDArray[np.float32]:
    """`[3, 3]` from linear RGB of some primaries to that of BT.709."""
    source = _to_xyz(primaries if primaries in _PRIMARIES else _BT2020)
    return (np.linalg.inv(_to_xyz(_BT709)) @ source).astype(np.float32)


def _to_xyz(primaries: int) -> NDArray[np.float64]:
    """`[3, 3]` from linear RGB to CIE XYZ."""
    columns = np.array([_xyz(*one) for one in _PRIMARIES[primaries]]).T
    scaled: NDArray[np.float64] = columns * np.linalg.solve(columns, _xyz(*_D65))
    return scaled


def _xyz(x: float, y: float) -> NDArray[np.float64]:
    return np.array([x / y, 1.0, (1 - x - y) / y])
