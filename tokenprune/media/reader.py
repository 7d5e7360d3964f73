"""`VideoReader`, `read_video` and `stream_video`: from a file to frames."""

import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokenprune.errors import DecodeError, MediaError
from tokenprune.media.backends import LIBRARIES, Backend, LibraryDecoder, check_backend
from tokenprune.media.decode.demux import IndexMismatch
from tokenprune.media.decode.plan import worker_count
from tokenprune.media.decode.pool import FrameDecoder, Group, WorkerKind
from tokenprune.media.index.index import Ints, PacketIndex, VideoInfo, index_video
from tokenprune.media.sampling import SizeRule, choose_ranks, resolve_size
from tokenprune.media.video import Timings, Video

Size = tuple[int, int] | SizeRule | None

WINDOW_GROUPS = 3  # groups in memory beside the one delivered
FIRST_GROUP = 4  # frames: what comes first should come soon
TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a file; see `read_video`."""

    frames: int | None
    fps: float | None
    indices: Sequence[int] | None
    seconds: Sequence[float] | None
    start: float | None
    end: float | None
    size: Size

    def ranks(self, index: PacketIndex) -> Ints:
        """Presentation ranks `[F]` of the frames asked for, in the order asked."""
        return choose_ranks(
            index,
            frames=self.frames,
            fps=self.fps,
            indices=self.indices,
            seconds=self.seconds,
            start=self.start,
            end=self.end,
        )


class VideoReader:
    """A video file, indexed once, from which frames can be read as often as wanted.

    ```python
    reader = VideoReader("match.mp4")
    few = reader.read(frames=8)
    late = reader.read(fps=2, start=60.0)  # the file is not indexed again
    ```

    It holds no open file and no workers: those live as long as a call, or a stream.

    Args:
        path: a local file.
        workers: how many decode at a time; None means one for each core we may use.
        worker_kind: "thread" (the default), or "process" for callers that run much Python while
            they consume a stream: a decoding thread would have to wait for the interpreter's lock
            several times a packet. Processes take some tenths of a second to start.
        backend: "pyav", our own decoder, or a library to compare it with: "decord" or
            "torchcodec", which decode in the caller's thread, and give only what they are known to
            give right: others than plain MP4 and Matroska files are refused.
        timeout_seconds: give up when no worker gets on for so long; indexing, and other backends,
            are not timed.

    Attributes:
        info: what the file holds.
        index: the packet index.
        index_seconds: the time it took to index the file.

    Raises:
        MediaError: the file cannot be used, or an argument is not valid.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        workers: int | None = None,
        worker_kind: WorkerKind | None = None,
        backend: Backend = "pyav",
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._workers = worker_count(workers)
        self._kind = _check_kind(worker_kind)
        if worker_kind is not None and backend in LIBRARIES:
            raise MediaError(
                f"worker_kind={worker_kind!r} is for our own decoder, but {backend} decodes in the "
                "caller's thread; leave it out"
            )
        check_backend(backend)
        self._backend = backend
        if not timeout_seconds > 0:
            raise MediaError(f"timeout_seconds must be above 0, got {timeout_seconds!r}")
        self._timeout = timeout_seconds
        self._index(path)

    def _index(self, path: str | os.PathLike[str], *, scan: bool = False) -> None:
        begin = time.perf_counter()
        self.index = index_video(path, scan=scan)
        self.index_seconds = time.perf_counter() - begin

    @property
    def info(self) -> VideoInfo:
        """What the file holds."""
        return self.index.info

    def __len__(self) -> int:
        return self.info.frame_count

    def __repr__(self) -> str:
        info = self.info
        return (
            f"VideoReader({info.path!r}, frames={info.frame_count},"
            f" seconds={info.duration_seconds:.3f}, size={info.height}x{info.width})"
        )

    def read(
        self,
        *,
        frames: int | None = None,
        fps: float | None = None,
        indices: Sequence[int] | None = None,
        seconds: Sequence[float] | None = None,
        start: float | None = None,
        end: float | None = None,
        size: Size = None,
    ) -> Video:
        """Decode chosen frames; the arguments are those of `read_video`."""
        request = Request(
            frames=frames,
            fps=fps,
            indices=indices,
            seconds=seconds,
            start=start,
            end=end,
            size=size,
        )
        begin, index = time.perf_counter(), self.index
        asked = request.ranks(index)
        (video,) = self._groups(request, index, lambda count: np.array([0, count]))
        if self.index is not index:
            asked = request.ranks(self.index)
        if np.array_equal(asked, video.indices):
            return video
        back = torch.from_numpy(np.searchsorted(video.indices.numpy(), asked))
        return Video(
            frames=video.frames[back],
            pts_seconds=video.pts_seconds[back],
            indices=video.indices[back],
            info=video.info,
            substituted=video.substituted[back],
            pictures_decoded=video.pictures_decoded,
            timings=Timings(self.index_seconds, time.perf_counter() - begin, video.timings.effort),
            bytes_read=video.bytes_read,
        )

    def stream(
        self,
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
    ) -> Generator[Video, None, None]:
        """Decode chosen frames in groups; the arguments are those of `stream_video`."""
        first = min(FIRST_GROUP, group) if first_group is None else first_group
        if group < 1:
            raise MediaError(f"group must be at least 1 frame, got {group}")
        if not 1 <= first <= group:
            raise MediaError(f"first_group must be from 1 to group ({group}), got {first}")
        request = Request(
            frames=frames,
            fps=fps,
            indices=indices,
            seconds=seconds,
            start=start,
            end=end,
            size=size,
        )
        index = self.index
        if (np.diff(request.ranks(index)) <= 0).any():
            raise MediaError(
                "stream_video delivers frames in order, each once; ask for them like that"
            )
        return self._groups(request, index, lambda count: group_bounds(count, group, first))

    def _groups(
        self, request: Request, index: PacketIndex, cut: Callable[[int], Ints]
    ) -> Generator[Video, None, None]:
        """The groups of what is asked for, in order of presentation, each frame once."""
        asked = request.ranks(index)
        size = resolve_size(request.size, index.info, len(asked))
        return self._decode(request, index, np.unique(asked), size, cut)

    def _decode(
        self,
        request: Request,
        index: PacketIndex,
        ranks: Ints,
        size: tuple[int, int],
        cut: Callable[[int], Ints],
    ) -> Generator[Video, None, None]:
        given = pictures = size_read = 0
        while given < len(ranks):
            bounds, rest = cut(len(ranks)), ranks[given:]
            decoder = self._decoder(index, rest, size, bounds[bounds >= given] - given)
            try:
                with decoder:
                    for part in decoder.groups():
                        yield self._video(index, decoder, part, rest, pictures, size_read)
                        given += len(part.frames)
            except IndexMismatch:
                if index.scanned:
                    raise
                # The file's table was wrong: a scan knows better.
                pictures += decoder.pictures_decoded
                size_read += decoder.bytes_read
                if not self.index.scanned:
                    self._index(index.info.path, scan=True)
                known, index = index, self.index
                asked, delivered = request.ranks(index), ranks[:given]
                ranks = np.unique(asked)
                if given:
                    _check_delivered(known, index, delivered, ranks)
                else:
                    size = resolve_size(request.size, index.info, len(asked))

    def _decoder(
        self, index: PacketIndex, ranks: Ints, size: tuple[int, int], bounds: Ints
    ) -> FrameDecoder | LibraryDecoder:
        if self._backend != "pyav":
            library = LIBRARIES[self._backend]
            return library(index, ranks, size, bounds=bounds, workers=self._workers)
        return FrameDecoder(
            index,
            ranks,
            size,
            bounds=bounds,
            window=WINDOW_GROUPS * int(np.diff(bounds).max()),
            workers=self._workers,
            worker_kind=self._kind,
            timeout_seconds=self._timeout,
        )

    def _video(
        self,
        index: PacketIndex,
        decoder: FrameDecoder | LibraryDecoder,
        part: Group,
        ranks: Ints,
        pictures: int,
        size_read: int,
    ) -> Video:
        """The frames of a part; what decoders before this one did is counted as well."""
        here = ranks[part.first : part.first + len(part.frames)]
        return Video(
            frames=part.frames,
            pts_seconds=torch.from_numpy(index.seconds[here]),
            indices=torch.from_numpy(here),
            info=index.info,
            substituted=part.substituted,
            pictures_decoded=pictures + decoder.pictures_decoded,
            timings=Timings(
                0.0 if part.first else self.index_seconds, part.wait_seconds, part.effort
            ),
            bytes_read=size_read + decoder.bytes_read,
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
    size: Size = None,
    workers: int | None = None,
    worker_kind: WorkerKind | None = None,
    backend: Backend = "pyav",
    timeout_seconds: float = TIMEOUT_SECONDS,
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
            them: `PixelLimits`, `VolumeLimits` and `ShortestEdge` are such rules. None keeps the
            source's size. Frames are scaled in the decoder (bilinear).
        workers: how many decode at a time; None means one for each core we may use.
        worker_kind: "thread" (the default) or "process", see `VideoReader`.
        backend: what decodes: "pyav", "decord" or "torchcodec", see `VideoReader`.
        timeout_seconds: give up when no worker gets on for so long.

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
    )
    return reader.read(
        frames=frames, fps=fps, indices=indices, seconds=seconds, start=start, end=end, size=size
    )


def stream_video(
    path: str | os.PathLike[str],
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


def group_bounds(count: int, group: int, first: int) -> Ints:
    """`[G + 1]` where groups of `count` frames begin, and where the last one ends."""
    return np.array([0, *range(first, count, group), count], np.int64)


def _check_delivered(known: PacketIndex, index: PacketIndex, delivered: Ints, ranks: Ints) -> None:
    """Check that the frames delivered by a wrong table begin those that a scan would deliver.

    Raises:
        DecodeError: they do not.
    """
    same = np.array_equal(ranks[: len(delivered)], delivered)
    if not (same and np.array_equal(known.times_of(delivered), index.times_of(delivered))):
        raise DecodeError(
            f"the table of packets in {index.info.path!r} is wrong, which was found out after"
            f" {len(delivered)} frames; let a tool write the file anew, or use read_video"
        )


def _check_kind(kind: WorkerKind | None) -> WorkerKind:
    if kind not in (None, "thread", "process"):
        raise MediaError(f'worker_kind must be "thread" or "process", got {kind!r}')
    if kind == "process" and os.name != "posix":
        raise MediaError('worker_kind="process" needs Linux or macOS; use "thread"')
    return kind or "thread"
