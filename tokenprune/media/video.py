"""`read_video` and `stream_video`: from a file to frames."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import MediaError
from tokenprune.media.decode import FrameDecoder
from tokenprune.media.index import Ints, PacketIndex, VideoInfo, index_video
from tokenprune.media.plan import worker_count
from tokenprune.media.sample import SizeRule, choose_ranks, resolve_size

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

WINDOW_GROUPS = 3  # groups in memory beside the one delivered


@dataclass(frozen=True)
class Timings:
    """Where the time went.

    Attributes:
        index_seconds: the packet scan.
        decode_seconds: decoding and resizing; in a stream, the time waited for the group.
    """

    index_seconds: float
    decode_seconds: float


@dataclass(frozen=True, eq=False, repr=False)
class Video:
    """Frames of a video, or one group of them.

    Attributes:
        frames: uint8 RGB `[F, 3, H, W]`, upright.
        pts_seconds: float64 `[F]` when each is shown, counted from the video's first frame.
        indices: int64 `[F]` presentation rank of each: 0 is the first frame of the video.
        metadata: the whole video.
        substituted: bool `[F]`, True where a damaged frame is replaced by the nearest earlier one
            that can be decoded.
        pictures_decoded: pictures that the decoders gave, in a stream up to this group.
        timings: where the time went.
    """

    frames: Tensor
    pts_seconds: Tensor
    indices: Tensor
    metadata: VideoInfo
    substituted: Tensor
    pictures_decoded: int
    timings: Timings

    def __post_init__(self) -> None:
        count = len(self.frames)
        if self.frames.dim() != 4 or self.frames.shape[1] != 3:
            raise MediaError(f"frames must be [F, 3, H, W], got {list(self.frames.shape)}")
        for name in ("pts_seconds", "indices", "substituted"):
            if getattr(self, name).shape != (count,):
                raise MediaError(f"{name} must be [{count}], got {list(getattr(self, name).shape)}")

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        return (
            f"Video({self.metadata.path!r}, frames={list(self.frames.shape)},"
            f" damaged={self.damaged}, pictures_decoded={self.pictures_decoded})"
        )

    @property
    def damaged(self) -> int:
        """How many frames are substitutes."""
        return int(self.substituted.sum())

    def hf_metadata(self) -> "VideoMetadata":
        """What transformers' processors want to know; use it with `do_sample_frames=False`."""
        from transformers.video_utils import VideoMetadata

        return VideoMetadata(
            total_num_frames=self.metadata.frame_count,
            fps=self.metadata.average_fps,
            width=self.frames.shape[3],
            height=self.frames.shape[2],
            duration=self.metadata.duration_seconds,
            video_backend="tokenprune",
            frames_indices=self.indices.tolist(),
        )


def read_video(
    path: str | os.PathLike[str],
    *,
    frames: int | None = None,
    fps: float | None = None,
    indices: Sequence[int] | None = None,
    seconds: Sequence[float] | None = None,
    start: float | None = None,
    end: float | None = None,
    size: tuple[int, int] | SizeRule | None = None,
    workers: int | None = None,
) -> Video:
    """Decode chosen frames of a video file, exactly those, with little else decoded.

    Give one of `frames`, `fps`, `indices` and `seconds`; without any, 64 frames are taken.

    Args:
        path: a local file.
        frames: how many, evenly spread, the first and the last of the range included. If the
            range has fewer, each of its frames once.
        fps: frames per second from `start` on: at each time the frame on screen, each frame once.
        indices: presentation ranks, in any order, repeats allowed.
        seconds: times from the video's first frame: at each the frame on screen.
        start: seconds where the range begins, with `frames` or `fps`.
        end: seconds where it ends (exclusive); past the end of the video means its end.
        size: height and width of the frames, or a rule that makes them from the source's height,
            its width, and the number of frames, since some models share a budget of pixels over
            them; None keeps the source's size. Frames are scaled in the decoder (bilinear).
        workers: threads; None means one for each core we may use.

    Raises:
        MediaError: the file cannot be used, or what is asked of it is not in it.
    """
    count = worker_count(workers)
    index, spent = _timed_index(path)
    asked = choose_ranks(
        index, frames=frames, fps=fps, indices=indices, seconds=seconds, start=start, end=end
    )
    height_width = resolve_size(size, index.info, len(asked))
    ranks, back = np.unique(asked, return_inverse=True)
    begin = time.perf_counter()
    many = len(ranks)
    with FrameDecoder(
        index, ranks, height_width, group=many, window=many, workers=count
    ) as decoder:
        (group,) = decoder.groups()
    taken = group.frames, group.substituted
    if not np.array_equal(asked, ranks):
        taken = group.frames[torch.from_numpy(back)], group.substituted[torch.from_numpy(back)]
    timings = Timings(spent, time.perf_counter() - begin)
    return _video(index, asked, *taken, decoder.pictures_decoded, timings)


def stream_video(
    path: str | os.PathLike[str],
    *,
    group: int = 8,
    frames: int | None = None,
    fps: float | None = None,
    indices: Sequence[int] | None = None,
    seconds: Sequence[float] | None = None,
    start: float | None = None,
    end: float | None = None,
    size: tuple[int, int] | SizeRule | None = None,
    workers: int | None = None,
) -> Iterator[Video]:
    """Decode chosen frames in groups, in order, while the caller works on those before.

    Takes the arguments of `read_video`, but frames must be asked for in order, each once. At most
    four groups are in memory. Closing the iterator, or leaving it, stops the workers.

    Args:
        path: a local file.
        group: frames in each group; the last may be smaller.

    Raises:
        MediaError: as `read_video`; what is asked is checked at once, before the first group.
    """
    if group < 1:
        raise MediaError(f"group must be at least 1 frame, got {group}")
    count = worker_count(workers)
    index, spent = _timed_index(path)
    ranks = choose_ranks(
        index, frames=frames, fps=fps, indices=indices, seconds=seconds, start=start, end=end
    )
    if (np.diff(ranks) <= 0).any():
        raise MediaError("stream_video delivers frames in order, each once; ask for them like that")
    height_width = resolve_size(size, index.info, len(ranks))
    return _stream(index, ranks, height_width, group, count, spent)


def _stream(
    index: PacketIndex, ranks: Ints, size: tuple[int, int], group: int, workers: int, spent: float
) -> Iterator[Video]:
    window = group * WINDOW_GROUPS
    with FrameDecoder(index, ranks, size, group=group, window=window, workers=workers) as decoder:
        for part in decoder.groups():
            here = ranks[part.first : part.first + len(part.frames)]
            timings = Timings(spent if part.first == 0 else 0.0, part.wait_seconds)
            pictures = decoder.pictures_decoded
            yield _video(index, here, part.frames, part.substituted, pictures, timings)


def _timed_index(path: str | os.PathLike[str]) -> tuple[PacketIndex, float]:
    begin = time.perf_counter()
    index = index_video(path)
    return index, time.perf_counter() - begin


def _video(
    index: PacketIndex,
    ranks: Ints,
    frames: Tensor,
    substituted: Tensor,
    pictures: int,
    timings: Timings,
) -> Video:
    return Video(
        frames=frames,
        pts_seconds=torch.from_numpy(index.seconds[ranks]),
        indices=torch.from_numpy(ranks),
        metadata=index.info,
        substituted=substituted,
        pictures_decoded=pictures,
        timings=timings,
    )
