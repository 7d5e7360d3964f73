"""`read_video` and `stream_video`: from a file to frames in one call."""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from tokenprune.media.backends import Backend
from tokenprune.media.decode.pool import WorkerKind
from tokenprune.media.index.source import References, Rendering
from tokenprune.media.local import MediaSource
from tokenprune.media.reader import TIMEOUT_SECONDS, VideoReader
from tokenprune.media.sampling import Size
from tokenprune.media.video import Video

if TYPE_CHECKING:
    from tokenprune.media.colours import Background

__all__ = ["read_video", "stream_video"]


def read_video(
    path: MediaSource,
    *,
    frames: int | None = None,
    fps: float | None = None,
    indices: Sequence[int] | None = None,
    seconds: Sequence[float] | None = None,
    start: float | None = None,
    end: float | None = None,
    size: Size = None,
    workers: int | None = None,
    worker_kind: WorkerKind | None = None,
    backend: Backend = "pyav",
    timeout_seconds: float = TIMEOUT_SECONDS,
    stream: int | None = None,
    references: References | None = None,
    rendering: Rendering | None = None,
    background: "Background" = "white",
) -> Video:
    """Decode chosen frames of a video file, exactly those, with little else decoded.

    Give one of `frames`, `fps`, `indices` and `seconds`; without any, 64 frames are taken.

    Args:
        path: a local file, or what it holds, see `VideoReader`.
        frames: how many, evenly spread, the first and the last of the range included. If the
            range has fewer, each of its frames once.
        fps: frames per second from `start` on: at each time the frame on screen, each frame once.
        indices: presentation ranks, in any order, repeats allowed.
        seconds: times from the video's first frame: at each the frame on screen.
        start: seconds where the range begins, with `frames` or `fps`.
        end: seconds where it ends (exclusive); past the end of the video means its end.
        size: height and width of the frames, or a rule that makes them from the source's height,
            its width, and the number of frames, since some models share a budget of pixels over
            them: `PixelLimits`, `VolumeLimits` and `ShortestEdge` are such rules. None keeps the
            source's size. Frames are scaled in the decoder (bilinear).
        workers: how many decode at a time; None means one for each core we may use.
        worker_kind: "thread" (the default) or "process", see `VideoReader`.
        backend: what decodes: "pyav", "decord" or "torchcodec", see `VideoReader`.
        timeout_seconds: give up when no worker makes progress for so long.
        stream: number of the video stream, see `VideoReader`.
        references: which other files the file may refer to, see `VideoReader`.
        rendering: how frames are to look; None means as they are meant to be seen.
        background: what is laid under what is transparent in an animated picture.

    Returns:
        The frames, in the order asked for, with their times and ranks; `damaged` says how many are
        substitutes.

    Raises:
        MediaError: the file cannot be used, or what is asked of it is not in it.
    """
    reader = VideoReader(
        path,
        workers=workers,
        worker_kind=worker_kind,
        backend=backend,
        timeout_seconds=timeout_seconds,
        stream=stream,
        references=references,
        rendering=rendering,
        background=background,
    )
    return reader.read(
        frames=frames, fps=fps, indices=indices, seconds=seconds, start=start, end=end, size=size
    )


def stream_video(
    path: MediaSource,
    *,
    group: int = 8,
    first_group: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    indices: Sequence[int] | None = None,
    seconds: Sequence[float] | None = None,
    start: float | None = None,
    end: float | None = None,
    size: Size = None,
    workers: int | None = None,
    worker_kind: WorkerKind | None = None,
    backend: Backend = "pyav",
    timeout_seconds: float = TIMEOUT_SECONDS,
    stream: int | None = None,
    references: References | None = None,
    rendering: Rendering | None = None,
    background: "Background" = "white",
) -> Generator[Video, None, None]:
    """Decode chosen frames in groups, in order, while the caller works on those before.

    Takes the arguments of `read_video`, but frames must be asked for in order, each once. At most
    four groups are in memory, and no more than two if each takes over 32 MiB: the workers wait when
    the caller is slow. Closing the iterator, or leaving it, stops them.

    Args:
        path: a local file.
        group: frames in each group; the last may be smaller.
        first_group: frames in the first group; None means 4, or `group` if that is less.

    Returns:
        An iterator over groups.

    Raises:
        MediaError: as `read_video`; what is asked is checked at once, before the first group.
    """
    reader = VideoReader(
        path,
        workers=workers,
        worker_kind=worker_kind,
        backend=backend,
        timeout_seconds=timeout_seconds,
        stream=stream,
        references=references,
        rendering=rendering,
        background=background,
    )
    return reader.stream(
        group=group,
        first_group=first_group,
        frames=frames,
        fps=fps,
        indices=indices,
        seconds=seconds,
        start=start,
        end=end,
        size=size,
    )
