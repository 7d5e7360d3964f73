"""Reading videos as chat messages name them, with the keys of Qwen-VL's messages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from tokenprune.errors import MediaError
from tokenprune.media.decode.pool import WorkerKind
from tokenprune.media.index.index import Ints, PacketIndex
from tokenprune.media.reader import VideoReader
from tokenprune.media.size import MAX_TOKENS, MIN_TOKENS, PixelLimits
from tokenprune.media.video import Video

__all__ = ["read_message"]

FRAME_MULTIPLE = 2  # frames of a temporal patch
NUMBERS = (
    "fps",
    "nframes",
    "min_frames",
    "max_frames",
    "video_start",
    "video_end",
    "min_pixels",
    "max_pixels",
    "total_pixels",
    "resized_height",
    "resized_width",
)
TOTAL_TOKENS = 128_000 * 0.9
SET_TOKENS = 4, 16384  # of a frame whose size is set, at least and at most


@dataclass(frozen=True)
class _Part:
    """A video part of a message, checked."""

    path: str
    numbers: Mapping[str, float]

    def get(self, name: str, default: float) -> float:
        return self.numbers.get(name, default)


def read_message(
    part: Mapping[str, Any],
    *,
    multiple: int = 28,
    workers: int | None = None,
    worker_kind: WorkerKind | None = None,
) -> Video:
    """Read the video that a part of a chat message names, as the message says.

    `{"type": "video", "video": "clip.mp4", "fps": 1.0, "max_pixels": 100_000}` for example. The
    keys mean what they mean to Qwen-VL: `fps` (2 by default) or `nframes` says how many frames are
    spread evenly over the range, an even number, from `min_frames` (4) to `max_frames` (768);
    `video_start` and `video_end` give the range in seconds; `min_pixels`, `max_pixels` and
    `total_pixels` limit the size (see `PixelLimits`), `resized_height` and `resized_width` set it.
    As there, `max_pixels` cannot raise a frame above 768 tokens, unless `min_pixels` asks for it.
    Times are those of the frames themselves, also where their rate varies.

    Args:
        part: the message's part.
        multiple: sides are multiples of this: 28 in Qwen2-VL and Qwen2.5-VL, 32 in Qwen3-VL.
        workers: see `read_video`.
        worker_kind: see `read_video`.

    Returns:
        The frames in order, at the size that the message asks for; a processor is to be told
        `do_resize=False` and `do_sample_frames=False`, and given `metadata`.

    Raises:
        MediaError: a key is unknown or has no sense, or the file cannot be used.
    """
    checked = _check(part)
    reader = VideoReader(checked.path, workers=workers, worker_kind=worker_kind)
    first, last = _range(checked, reader.index)
    count = _count(checked, reader.index, last - first + 1)
    ranks: Ints = np.round(np.linspace(first, last, count)).astype(np.int64)
    return reader.read(indices=ranks.tolist(), size=_size(checked, multiple))


def _check(part: Mapping[str, Any]) -> _Part:
    unknown = part.keys() - {"type", "video", *NUMBERS}
    if unknown:
        raise MediaError(
            f"a message's video has no key {min(unknown)!r}; known: video, {', '.join(NUMBERS)}"
        )
    path = part.get("video")
    if not isinstance(path, str):
        raise MediaError(f"a message's video must be the path of a file, got {path!r:.80}")
    if "://" in path and not path.startswith("file://"):
        raise MediaError(f"only local files are read, got {path!r}; download it first")
    numbers = {name: part[name] for name in NUMBERS if part.get(name) is not None}
    for name, value in numbers.items():
        known = isinstance(value, int | float) and not isinstance(value, bool)
        least = 0 if name in ("video_start", "video_end") else 1e-9
        if not known or not least <= value < math.inf:
            raise MediaError(f"{name} must be a number above 0, got {value!r}")
    if "fps" in numbers and "nframes" in numbers:
        raise MediaError("give fps or nframes, got both")
    if ("resized_height" in numbers) != ("resized_width" in numbers):
        raise MediaError("give resized_height and resized_width together, got one of them")
    return _Part(path.removeprefix("file://"), cast(Mapping[str, float], numbers))


def _range(part: _Part, index: PacketIndex) -> tuple[int, int]:
    """The first and the last frame that begin in the range."""
    start, end = part.get("video_start", 0.0), part.get("video_end", math.inf)
    first = int(np.searchsorted(index.seconds, start - 1e-6, "left"))
    last = int(np.searchsorted(index.seconds, end + 1e-6, "right")) - 1
    if first >= last and len(index.seconds) > 1:
        raise MediaError(
            f"video_start and video_end must leave at least two frames of {index.info.path!r}"
            f" ({index.info.duration_seconds:.3f} seconds), got {start:g} and {end:g}"
        )
    return min(first, last), last


def _count(part: _Part, index: PacketIndex, available: int) -> int:
    """How many frames to take: an even number, if there are two."""
    even = available // FRAME_MULTIPLE * FRAME_MULTIPLE
    if "nframes" in part.numbers:
        count = round(part.numbers["nframes"] / FRAME_MULTIPLE) * FRAME_MULTIPLE
        if not FRAME_MULTIPLE <= count <= max(available, FRAME_MULTIPLE):
            raise MediaError(
                f"nframes must be from {FRAME_MULTIPLE} to {even}, the frames in the range, got"
                f" {part.numbers['nframes']:g}"
            )
        return min(count, available)
    least = math.ceil(part.get("min_frames", 4) / FRAME_MULTIPLE) * FRAME_MULTIPLE
    most = math.floor(part.get("max_frames", 768) / FRAME_MULTIPLE) * FRAME_MULTIPLE
    if "min_frames" not in part.numbers:
        least = min(least, most)
    if not least <= most:
        raise MediaError(f"min_frames must not exceed max_frames, got {least} and {most}")
    # A little more, since a file's rate is rounded to ticks of its clock.
    count = math.floor(available / index.info.average_fps * part.get("fps", 2.0) + 1e-6)
    count = min(max(count, least), most, available)
    return max(count // FRAME_MULTIPLE * FRAME_MULTIPLE, min(available, FRAME_MULTIPLE))


def _size(part: _Part, multiple: int) -> PixelLimits | tuple[int, int]:
    token = multiple**2
    if "resized_height" in part.numbers:
        sides = (part.numbers[f"resized_{side}"] for side in ("height", "width"))
        height, width = (max(1, int(side)) for side in sides)
        few, many = (count * token for count in SET_TOKENS)
        return PixelLimits(multiple, few, many)(height, width, 1)
    least = int(part.get("min_pixels", MIN_TOKENS * token))
    cap = max(MAX_TOKENS * token, int(least * 1.05))
    most = min(int(part.get("max_pixels", cap)), cap)
    return PixelLimits(
        multiple=multiple,
        min_pixels=min(least, most) if "min_pixels" not in part.numbers else least,
        max_pixels=most,
        total_pixels=int(part.get("total_pixels", TOTAL_TOKENS * token)),
    )
