"""Animated pictures as videos: their frames with their own times, decoded by Pillow.

A still picture is a video of one frame here, for callers who want a video.
"""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenprune.errors import DecodeError, MediaError, first_line
from tokenprune.media.colours import orientation_of, parse_background, to_rgb
from tokenprune.media.decode.pool import DecodedGroup
from tokenprune.media.index.clock import clock_rate
from tokenprune.media.index.index import Ints, PacketIndex, VideoInfo
from tokenprune.media.kinds import PICTURE
from tokenprune.media.limits import check_frames, check_pixels
from tokenprune.media.scale import Scaler
from tokenprune.media.stills import (
    is_animated,
    open_picture,
    reading,
)

__all__ = ["PictureDecoder", "index_pictures"]

TICKS = 100_000  # a second, as FFmpeg counts them in APNG
STILL = TICKS // 25
SHORTEST = TICKS // 100  # programs that show animations take less, and this, for no time at all
USUAL = TICKS // 10  # what they show such frames for
EXACT = {"AVIF", "FLI"}  # whose times they believe


def index_pictures(path: str | os.PathLike[str]) -> PacketIndex | None:
    """Index an animated picture, or a still one; None if a file is for FFmpeg.

    Args:
        path: a local file.

    Raises:
        MediaError: it is no media file, a broken picture, or one that is larger than the limits.
    """
    with open_picture(path) as picture:
        if picture is None:
            return None
        name = os.fspath(path)
        error = None
        if is_animated(picture):
            began, end, error = _times(name, picture)
        else:
            began, end = [0], STILL
        with reading(path):
            width, height = _upright_size(picture)
        form = picture.format.lower()
    count, duration = len(began), end / TICKS
    ticks = np.array(began, np.int64)
    places = np.arange(count)
    info = VideoInfo(
        path=name,
        duration_seconds=duration,
        frame_count=count,
        average_fps=count / duration,
        width=width,
        height=height,
        codec=form,
        container=PICTURE,
        has_audio=False,
        rotation=0,
        start_seconds=0.0,
        stored_width=width,
        stored_height=height,
        clock_fps=clock_rate(ticks / TICKS, count / duration),
    )
    return PacketIndex(
        info=info,
        pts=ticks,
        dts=ticks,
        size=np.zeros(count, np.int64),
        keyframe=places == 0,
        place=places,
        epoch=np.zeros(count, np.int64),
        order=places,
        seconds=ticks / TICKS,
        timed=True,
        skippable=False,
        error=error,
    )


def _times(name: str, picture: Any) -> tuple[list[int], int, str | None]:
    """When each frame begins, when the last one ends, and why not all frames are there."""
    began: list[int] = []
    due = late = 0  # by how much frames without a time delay those that follow
    try:
        for _ in _frames(picture):
            check_pixels(name, *picture.size)
            check_frames(name, len(began) + 1)
            told = picture.info.get("timestamp")  # in milliseconds, where it is told
            began.append(due if told is None else int(told) * TICKS // 1000 + late)
            # A rate such as 30 a second comes as a float of milliseconds.
            stored = math.floor(float(picture.info.get("duration") or 0) * TICKS / 1000 + 1e-6)
            shown = USUAL if stored <= (0 if picture.format in EXACT else SHORTEST) else stored
            due, late = began[-1] + shown, late + shown - stored
    except MediaError:
        raise
    except Exception as error:  # Pillow raises many kinds
        if not began:
            raise DecodeError(
                f"cannot read {name!r} as an animation: {first_line(error)}; give one that other"
                " programs open"
            ) from error
        return began, due, first_line(error)
    return began, due, None


def _frames(picture: Any) -> Iterator[None]:
    """Go from frame to frame, each decoded."""
    at = 1 if picture.info.get("default_image") else 0  # which is no part of an APNG's animation
    while True:
        try:
            picture.seek(at)
        except EOFError:
            return
        picture.load()
        yield
        at += 1


def _upright_size(picture: Any) -> tuple[int, int]:
    """Width and height once the picture is turned upright."""
    if picture.format == "TIFF":  # which Pillow turns when it is decoded
        picture.load()
    width, height = picture.size
    turned = picture.format != "HEIC" and orientation_of(picture) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


@dataclass
class PictureDecoder:
    """Decodes frames of a picture by rank, in the caller's thread, group by group.

    Attributes:
        index: as `index_pictures` makes it.
        ranks: `[F]` presentation ranks, strictly increasing.
        size: height and width of the frames.
        bounds: `[G + 1]` rows at which groups begin, and F.
        background: what is laid under what is transparent.
        pictures_decoded: how many came out of Pillow so far.
        bytes_read: 0, since Pillow does not report it.
    """

    index: PacketIndex
    ranks: Ints
    size: tuple[int, int]
    bounds: Ints
    background: str | tuple[int, int, int]
    pictures_decoded: int = 0
    bytes_read: int = 0

    def __enter__(self) -> "PictureDecoder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def groups(self) -> Iterator[DecodedGroup]:
        """The groups, in order.

        Raises:
            DecodeError: the file is not what it was when it was indexed.
        """
        frames, scale = self._wanted(), Scaler(self.size)
        for first, last in zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True):
            begin = time.perf_counter()
            out = torch.empty((last - first, 3, *self.size), dtype=torch.uint8)
            for row in out.numpy():
                rgb = next(frames, None)
                if rgb is None:
                    raise DecodeError(f"{self.index.info.path!r} has changed; index it again")
                scale(np.asarray(rgb), row)
            intact = torch.zeros(last - first, dtype=torch.bool)
            yield DecodedGroup(out, first, intact, time.perf_counter() - begin)

    def _wanted(self) -> Iterator[Image.Image]:
        """The frames of the ranks, upright, without what lies beyond the first frame's canvas."""
        wanted, last = set(self.ranks.tolist()), int(self.ranks[-1])
        colour = parse_background(self.background)
        info = self.index.info
        with open_picture(info.path) as picture, reading(info.path):
            if picture is None:
                return
            if not is_animated(picture):
                self.pictures_decoded += 1
                yield to_rgb(picture, colour)
                return
            for rank, _ in enumerate(_frames(picture)):
                self.pictures_decoded += 1
                if rank in wanted:
                    rgb = to_rgb(picture, colour)
                    here = (0, 0, info.width, info.height)
                    yield rgb if rgb.size == here[2:] else rgb.crop(here)
                if rank == last:
                    return
