"""Which frames to take: by count, rate, rank or time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tokenprune.errors import MediaError
from tokenprune.media.index.index import Ints, PacketIndex, VideoInfo
from tokenprune.media.limits import check_frames, check_pixels
from tokenprune.media.numbers import numbers_of, parse_number, parse_whole, plain

__all__ = ["FrameRequest", "Size", "SizeRule", "check_amount", "parse_size", "resolve_size"]

SizeRule = Callable[[int, int, int], tuple[int, int]]
"""From height and width of the source and the number of frames to height and width."""

Size = tuple[int, int] | SizeRule | None
"""Height and width, a rule, or the source's size."""

DEFAULT_FRAMES = 64
LARGEST_SIDE = 16384
HIGHEST_RATE = 1000.0  # frames a second


@dataclass(frozen=True)
class FrameRequest:
    """The frames asked for, and their size; see `read_video` for what each argument means."""

    frames: int | None = None
    fps: float | None = None
    indices: Sequence[int] | None = None
    seconds: Sequence[float] | None = None
    start: float | None = None
    end: float | None = None
    size: Size = None

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if value is not None:
                parse_number(name, value, infinite=True, rule="be a number of seconds")
                object.__setattr__(self, name, plain(value))

    def ranks(self, index: PacketIndex) -> Ints:
        """Presentation ranks `[F]` of the frames, in the order asked.

        Raises:
            MediaError: arguments contradict each other, or lie outside the video.
        """
        self._check()
        ranks = self._ranks(index)
        check_frames(index.info.path, len(ranks))
        return ranks

    def _ranks(self, index: PacketIndex) -> Ints:
        if self.indices is not None:
            return _by_index(index, self.indices)
        if self.seconds is not None:
            return _by_time(index, self.seconds)
        begin, stop = _range(index.info, self.start, self.end)
        if self.fps is not None:
            return _by_rate(index, parse_number("fps", self.fps), begin, stop)
        frames = DEFAULT_FRAMES if self.frames is None else parse_whole("frames", self.frames)
        return _by_count(index, frames, begin, stop)

    def _check(self) -> None:
        ways = ("frames", "fps", "indices", "seconds")
        chosen = [name for name in ways if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise MediaError(
                f"give one of frames, fps, indices and seconds, got {' and '.join(chosen)}"
            )
        listed = self.indices is not None or self.seconds is not None
        if listed and (self.start is not None or self.end is not None):
            raise MediaError(
                f"start and end go with frames or fps, not with {chosen[0]}; omit them"
            )
        check_amount(self.frames, self.fps)


def check_amount(frames: int | None, fps: float | None) -> None:
    """Check how many frames are asked for, by number or by rate.

    Raises:
        MediaError: a number that no video could give.
    """
    if frames is not None:
        parse_whole("frames", frames, least=1)
    if fps is not None:
        parse_number("fps", fps, above=0, rule="be a number above 0")


def resolve_size(size: Size, info: VideoInfo, frames: int) -> tuple[int, int]:
    """Height and width to deliver: the source's, those given, or what the rule says.

    Raises:
        MediaError: not two whole numbers from 1 to 16384.
    """
    if size is None:
        return info.height, info.width
    pair = size(info.height, info.width, frames) if callable(size) else size
    try:
        height, width = (parse_whole("size", side, least=1) for side in numbers_of("size", pair))
    except (MediaError, ValueError):  # not two of them
        height = width = 0
    if not all(1 <= side <= LARGEST_SIDE for side in (height, width)):
        raise MediaError(
            f"size must be (height, width), whole numbers from 1 to {LARGEST_SIDE}, got {pair!r}"
        )
    check_pixels(f"size for {info.path}", width, height)
    return height, width


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from text such as `224x384`.

    Raises:
        MediaError: it is not of that form.
    """
    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise MediaError(f"size must be height x width, such as 224x384, got {text!r}")
    return int(height), int(width)


def _by_count(index: PacketIndex, frames: int, begin: float, stop: float) -> Ints:
    shown = _on_screen(index, np.array([begin]))[0]
    first = int(np.searchsorted(index.seconds, index.seconds[shown]))  # others may begin with it
    last = _before(index, stop)
    last = max(first, last)
    count = min(int(frames), int(last - first) + 1)
    return np.floor(np.linspace(first, last, count) + 0.5).astype(np.int64)


def _by_rate(index: PacketIndex, fps: float, begin: float, stop: float) -> Ints:
    if fps > HIGHEST_RATE:  # more often than frames change: all of them
        first = int(_on_screen(index, np.array([begin]))[0])
        return np.arange(first, max(first, _before(index, stop)) + 1)
    count = max(1, math.ceil((stop - begin) * fps - 1e-6))
    return np.unique(_on_screen(index, begin + np.arange(count) / fps))


def _by_index(index: PacketIndex, indices: Sequence[int]) -> Ints:
    total = index.info.frame_count
    rule = f"be whole numbers from 0 to {total - 1} in {index.info.path!r} ({total} frames)"
    ranks = [
        parse_whole("indices", value, least=0, rule=rule)
        for value in numbers_of("indices", indices)
    ]
    if not ranks:
        raise MediaError("indices must name at least one frame, got none")
    if max(ranks) >= total:
        raise MediaError(f"indices must {rule}, got {max(ranks)!r}")
    return np.array(ranks, np.int64)


def _by_time(index: PacketIndex, seconds: Sequence[float]) -> Ints:
    duration = index.info.duration_seconds
    rule = f"lie from 0 to {duration:.3f} in {index.info.path!r}"
    given = numbers_of("seconds", seconds)
    if not given:
        raise MediaError("seconds must name at least one time, got none")
    times = [parse_number("seconds", value, least=0, most=duration, rule=rule) for value in given]
    return _on_screen(index, np.array(times, np.float64))


def _range(info: VideoInfo, start: float | None, end: float | None) -> tuple[float, float]:
    begin = 0.0 if start is None else float(start)
    stop = info.duration_seconds if end is None else float(end)
    if not 0 <= begin < min(stop, info.duration_seconds):
        raise MediaError(
            f"start and end must satisfy 0 <= start < end and start < {info.duration_seconds:.3f}"
            f" (the length of {info.path!r} in seconds), got start={start!r} end={end!r}"
        )
    return begin, min(stop, info.duration_seconds)


def _on_screen(index: PacketIndex, seconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Ints:
    """The frame shown at each time: the last one that began by then."""
    slack = 1e-6  # a time computed in floating point still means the frame that begins there
    ranks = np.searchsorted(index.seconds, seconds + slack, "right") - 1
    return np.maximum(ranks, 0).astype(np.int64)


def _before(index: PacketIndex, stop: float) -> int:
    """The last frame that begins before a time."""
    return int(np.searchsorted(index.seconds, stop - 1e-6, "left")) - 1
