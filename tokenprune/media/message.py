"""Reading videos as chat messages name them, with the keys of Qwen-VL's messages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenprune.errors import MediaError
from tokenprune.media.decode.pool import WorkerKind
from tokenprune.media.given import FrameList, is_frame_list, read_frames
from tokenprune.media.index.index import Ints
from tokenprune.media.local import Fetch, decode_base64, local_file
from tokenprune.media.numbers import parse_number, parse_whole
from tokenprune.media.reader import VideoReader
from tokenprune.media.size import MAX_TOKENS, MIN_TOKENS, PixelLimits
from tokenprune.media.video import Clip

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
    "sample_fps",
    "raw_fps",
)
FROM_ZERO = ("video_start", "video_end")
LIST_FPS = 2.0  # of a list of frames whose rate is not told
TOTAL_TOKENS = 128_000 * 0.9
SET_TOKENS = 4, 16384  # of a frame whose size is set, at least and at most


@dataclass(frozen=True)
class _Part:
    """A video part of a message, checked."""

    video: object
    numbers: Mapping[str, float]

    def get(self, name: str, default: float) -> float:
        return self.numbers.get(name, default)


@dataclass(frozen=True)
class _Frames:
    """What there is to choose from.

    Attributes:
        name: of the file.
        seconds: `[N]` when each frame begins.
        duration_seconds: when the last one ends.
    """

    name: str
    seconds: NDArray[np.float64]
    duration_seconds: float

    @property
    def average_fps(self) -> float:
        return len(self.seconds) / self.duration_seconds


def read_message(
    part: Mapping[str, Any],
    *,
    multiple: int = 28,
    fetch: Fetch | None = None,
    workers: int | None = None,
    worker_kind: WorkerKind | None = None,
) -> Clip:
    """Read the video that a part of a chat message names, as the message says.

    `{"type": "video", "video": "clip.mp4", "fps": 1.0, "max_pixels": 100_000}` for example. The
    keys mean what they mean to Qwen-VL: `fps` (2 by default) or `nframes` says how many frames are
    spread evenly over the range, an even number, from `min_frames` (4) to `max_frames` (768);
    `video_start` and `video_end` give the range in seconds; `min_pixels`, `max_pixels` and
    `total_pixels` limit the size (see `PixelLimits`), `resized_height` and `resized_width` set it.
    As there, `max_pixels` cannot raise a frame above 768 tokens, unless `min_pixels` asks for it.
    With `max_frames` of 1 there is one frame. Times are those of the frames themselves, also where
    their rate varies.

    The video is a path, a `file:` or `data:` URI, the bytes of a file, or an open file. Or it is a
    list of frames (or an array `[F, ...]`): pictures of Pillow, their files or bytes, arrays or
    tensors. `sample_fps` (2 by default, or what `fps` says) is the rate at which they were taken
    from a video of `raw_fps`. All of them are used, unless `nframes`, `max_frames`, a range, or an
    `fps` beside `sample_fps` asks for fewer.

    Args:
        part: the message's part.
        multiple: sides are multiples of this: 28 in Qwen2-VL and Qwen2.5-VL, 32 in Qwen3-VL.
        fetch: gets what a URL names: its bytes, an open file, or the path where it was saved.
            Without it URLs are refused: what is read should not depend on a network.
        workers: see `read_video`.
        worker_kind: see `read_video`.

    Returns:
        A `Video`, or of a list a `FrameList`: the frames in order, at the size that the message
        asks for; a processor is to be told `do_resize=False` and `do_sample_frames=False`, and
        given `metadata`.

    Raises:
        MediaError: a key is unknown or has no sense, or the file cannot be used.
    """
    checked = _check(part)
    multiple = parse_whole("multiple", multiple, least=1)
    listed = _listed(checked.video)
    if listed is not None:
        return _read_list(listed, checked, multiple, fetch)
    _check_no_list(checked)
    with local_file(checked.video, fetch) as path:  # type: ignore[arg-type]  # it is checked there
        reader = VideoReader(path, workers=workers, worker_kind=worker_kind)
        info = reader.info
        frames = _Frames(info.path, reader.index.seconds, info.duration_seconds)
        return reader.read(indices=_ranks(checked, frames).tolist(), size=_size(checked, multiple))


def _ranks(part: _Part, frames: _Frames) -> Ints:
    first, last = _range(part, frames)
    count = _count(part, frames, last - first + 1)
    ranks: Ints = np.round(np.linspace(first, last, count)).astype(np.int64)
    return ranks


# -- lists of frames


def _listed(video: object) -> Sequence[Any] | None:
    """The frames of a list; None for a file."""
    if is_frame_list(video):
        return video  # type: ignore[return-value]
    head = "data:video/jpeg;base64,"  # frames as JPEGs, with commas between
    if isinstance(video, str) and video[: len(head)].lower() == head:
        return [decode_base64(one) for one in video[len(head) :].split(",")]
    return None


def _read_list(listed: Sequence[Any], part: _Part, multiple: int, fetch: Fetch | None) -> FrameList:
    if not len(listed):
        raise MediaError("a list of frames must hold at least one, got none")
    both = "fps" in part.numbers and "sample_fps" in part.numbers
    rate = part.get("sample_fps", part.get("fps", LIST_FPS))
    raw = part.get("raw_fps", rate)
    if raw < rate:
        raise MediaError(f"raw_fps must be at least sample_fps ({rate:g}), got {raw:g}")
    seconds = np.arange(len(listed)) / rate
    frames = _Frames("a list of frames", seconds, len(listed) / rate)
    if both or "nframes" in part.numbers:
        ranks = _ranks(part, frames)
    else:
        first, last = _range(part, frames)
        most = math.floor(_most(part)) if "max_frames" in part.numbers else len(listed)
        count = min(last - first + 1, most)
        ranks = np.round(np.linspace(first, last, count)).astype(np.int64)
    return FrameList(
        frames=read_frames(listed, ranks, _size(part, multiple), fetch=fetch),
        pts_seconds=torch.from_numpy(seconds[ranks]),
        indices=torch.from_numpy(np.round(ranks * (raw / rate)).astype(np.int64)),
        rate=raw,
    )


def _check_no_list(part: _Part) -> None:
    for name in ("sample_fps", "raw_fps"):
        if name in part.numbers:
            raise MediaError(
                f"{name} is for a list of frames, got a file; it has its own rate: say fps"
            )


# -- keys


def _check(part: Mapping[str, Any]) -> _Part:
    unknown = part.keys() - {"type", "video", *NUMBERS}
    if unknown:
        raise MediaError(
            f"a message's video has no key {min(unknown)!r}; known: video, {', '.join(NUMBERS)}"
        )
    if part.get("video") is None:
        raise MediaError(
            "a message's video must be a path, a file: or data: URI, bytes, an open file or a list"
            " of frames, got None"
        )
    numbers = {
        name: parse_number(
            name,
            part[name],
            least=0 if name in FROM_ZERO else 1e-9,
            rule="be a number above 0",
        )
        for name in NUMBERS
        if part.get(name) is not None
    }
    if "fps" in numbers and "nframes" in numbers:
        raise MediaError("give fps or nframes, got both")
    if ("resized_height" in numbers) != ("resized_width" in numbers):
        raise MediaError("give resized_height and resized_width together, got one of them")
    return _Part(part["video"], numbers)


def _range(part: _Part, frames: _Frames) -> tuple[int, int]:
    """The first and the last frame that begin in the range."""
    start, end = part.get("video_start", 0.0), part.get("video_end", math.inf)
    first = int(np.searchsorted(frames.seconds, start - 1e-6, "left"))
    last = int(np.searchsorted(frames.seconds, end + 1e-6, "right")) - 1
    if first >= last and len(frames.seconds) > 1:
        raise MediaError(
            f"video_start and video_end must leave at least two frames of {frames.name!r}"
            f" ({frames.duration_seconds:.3f} seconds), got {start:g} and {end:g}"
        )
    return min(first, last), last


def _count(part: _Part, frames: _Frames, available: int) -> int:
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
    most = math.floor(_most(part) / FRAME_MULTIPLE) * FRAME_MULTIPLE or 1
    if "min_frames" not in part.numbers:
        least = min(least, most)
    if not least <= most:
        raise MediaError(f"min_frames must not exceed max_frames, got {least} and {most}")
    # A little more, since a file's rate is rounded to ticks of its clock.
    count = math.floor(available / frames.average_fps * part.get("fps", 2.0) + 1e-6)
    count = min(max(count, least), most, available)
    return max(count // FRAME_MULTIPLE * FRAME_MULTIPLE, min(available, most, FRAME_MULTIPLE))


def _most(part: _Part) -> float:
    most = part.get("max_frames", 768)
    if most < 1:
        raise MediaError(f"max_frames must be at least 1, got {most:g}")
    return most


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
