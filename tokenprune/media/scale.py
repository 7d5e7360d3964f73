"""Scaling pictures as the decoder scales frames."""

from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

__all__ = ["Scaler"]

GBR = (1, 2, 0)  # channels of the planes


class Scaler:
    """Scales pictures `[H, W, 3]` uint8 to frames `[3, H, W]`, bilinear, as for videos.

    Args:
        size: height and width of what is delivered.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self._reformatter = VideoReformatter()

    def __call__(self, picture: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        """Write a picture `[H, W, 3]`, scaled, to memory `[3, H, W]`."""
        if picture.shape[:2] == self._size:
            out[:] = picture.transpose(2, 0, 1)
            return
        height, width = self._size
        planar: Any = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"),
            width=width,
            height=height,
            format="gbrp",
            interpolation=Interpolation.BILINEAR,
            threads=1,
        )
        for plane, channel in zip(planar.planes, GBR, strict=True):
            lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            out[channel] = lines[:height, :width]  # lines are padded
