"""The clips, encoded once for all tests of this folder."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.media import clips


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], clips.Clip]:
    """Gives the clip of a kind."""

    @cache
    def make(name: str) -> clips.Clip:
        return clips.make(name, tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="session")
def truth(clip: Callable[[str], clips.Clip]) -> Callable[[str], NDArray[np.uint8]]:
    """Gives all frames `[N, 3, H, W]` of a kind, upright, by a plain sequential decode."""

    @cache
    def decode(name: str) -> NDArray[np.uint8]:
        flagged = name == "h264_interlaced"
        frames = clips.decode_sequentially(clip(name).path, deinterlace=flagged)
        return np.rot90(frames, -1, (2, 3)) if name == "h264_rotated" else frames

    return decode
