"""`VideoReader`: a video file, indexed once, from which frames are read."""

import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokenprune.errors import DecodeError, MediaError
from tokenprune.media.backends import LIBRARIES, Backend, LibraryDecoder, check_backend
from tokenprune.media.decode.cores import worker_count
from tokenprune.media.decode.deinterlace import InterlacedFrames
from tokenprune.media.decode.demux import IndexMismatch
from tokenprune.media.decode.pool import DecodedGroup, FrameDecoder, WorkerKind
from tokenprune.media.index.index import Ints, PacketIndex, VideoInfo
from tokenprune.media.index.source import References, Rendering, Source
from tokenprune.media.kinds import PICTURE
from tokenprune.media.limits import check_clip, check_pixels
from tokenprune.media.local import LocalFile, MediaSource
from tokenprune.media.numbers import parse_number, parse_whole
from tokenprune.media.opening import index_video
from tokenprune.media.sampling import FrameRequest, Size, resolve_size
from tokenprune.media.video import Timings, Video

if TYPE_CHECKING:
    from tokenprune.media.animation import PictureDecoder
    from tokenprune.media.colours import Background

__all__ = ["TIMEOUT_SECONDS", "VideoReader", "group_bounds"]

WINDOW_GROUPS = 3  # groups in memory beside the one delivered
FIRST_GROUP = 4  # frames: what comes first should come soon
TIMEOUT_SECONDS = 60.0


class VideoReader:
    """A video file, indexed once, from which frames can be read as often as wanted.

    ```python
    reader = VideoReader("match.mp4")
    few = reader.read(frames=8)
    late = reader.read(fps=2, start=60.0)  # the file is not indexed again
    ```

    It holds no open file and no workers: those live as long as a call, or a stream.

    Args:
        path: a local file, by its path or a `file:` URI; or what it holds, as a `data:` URI, bytes
            or a file opened to read them.
        workers: how many decode at a time; None means one for each core we may use.
        worker_kind: "thread" (the default), or "process" for callers that run much Python while
            they consume a stream: a decoding thread would have to wait for the GIL several times a
            packet. Processes take some tenths of a second to start.
        backend: "pyav", our own decoder, or a library to compare it with: "decord" or
            "torchcodec", which decode in the caller's thread, and give only what they are known to
            give right: others than plain MP4 and Matroska files are refused.
        timeout_seconds: give up when no worker makes progress for so long (in our own decoder).
        stream: number of the video stream, from 0; None for the one that players take: of those
            marked as default, else of all, the largest, else the first.
        references: "folder" if it may refer to files in its folder and below, as playlists do.
        rendering: how frames are to look; None means as they are meant to be seen.
        background: what is laid under what is transparent in an animated picture.

    Attributes:
        info, index, index_seconds: what the file holds; its packet index, and the time that took.
    """

    def __init__(
        self,
        path: MediaSource,
        *,
        workers: int | None = None,
        worker_kind: WorkerKind | None = None,
        backend: Backend = "pyav",
        timeout_seconds: float = TIMEOUT_SECONDS,
        stream: int | None = None,
        references: References | None = None,
        rendering: Rendering | None = None,
        background: "Background" = "white",
    ) -> None:
        number = None if stream is None else parse_whole("stream", stream)
        self._source = Source(number, references, rendering or Rendering())
        self._background = background
        self._workers = worker_count(None if workers is None else parse_whole("workers", workers))
        self._kind = _check_kind(worker_kind)
        if worker_kind is not None and backend in LIBRARIES:
            raise MediaError(
                f"worker_kind={worker_kind!r} is for our own decoder, but {backend} decodes in the "
                "caller's thread; leave it out"
            )
        check_backend(backend)
        self._backend = backend
        self._timeout = parse_number(
            "timeout_seconds", timeout_seconds, above=0, infinite=True, rule="be above 0"
        )
        self._local = LocalFile(path)  # lives as long as the reader
        with self._local.naming():
            self._index(self._local.path)

    def _index(self, path: str | os.PathLike[str], *, scan: bool = False) -> None:
        begin = time.perf_counter()
        source = self._source
        self.index = index_video(
            path,
            scan=scan,
            stream=source.stream,
            references=source.references,
            rendering=source.rendering,
        )
        check_pixels(self.info.path, self.info.width, self.info.height)
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
        request = FrameRequest(frames, fps, indices, seconds, start, end, size)
        begin, index = time.perf_counter(), self.index
        asked = request.ranks(index)
        (video,) = self._deliver(request, index, lambda count: np.array([0, count]), whole=True)
        if self.index is not index:
            asked = request.ranks(self.index)
        if np.array_equal(asked, video.indices):
            return video
        timings = Timings(self.index_seconds, time.perf_counter() - begin, video.timings.effort)
        return _in_order(video, asked, timings)

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
        group = parse_whole("group", group)
        first = parse_whole(
            "first_group", min(FIRST_GROUP, group) if first_group is None else first_group
        )
        if group < 1:
            raise MediaError(f"group must be at least 1 frame, got {group}")
        if not 1 <= first <= group:
            raise MediaError(f"first_group must be from 1 to group ({group}), got {first}")
        request = FrameRequest(frames, fps, indices, seconds, start, end, size)
        index = self.index
        if (np.diff(request.ranks(index)) <= 0).any():
            raise MediaError(
                "stream_video delivers frames in order, each once; ask for them like that"
            )
        return self._deliver(request, index, lambda count: group_bounds(count, group, first))

    def _deliver(
        self,
        request: FrameRequest,
        index: PacketIndex,
        bounds_of: Callable[[int], Ints],
        *,
        whole: bool = False,
    ) -> Generator[Video, None, None]:
        """The groups of what is asked for, in presentation order, each frame once.

        Args:
            request: what is asked for; it is checked before the first group is asked for.
            index: the packet index by which it is understood.
            bounds_of: gives `[G + 1]` where groups of so many frames begin.
            whole: whether all frames are held at once.
        """
        asked = request.ranks(index)
        size = resolve_size(request.size, index.info, len(asked))
        if whole:
            check_clip(index.info.path, len(asked), *size)
        return self._decode(request, index, np.unique(asked), size, bounds_of)

    def _decode(
        self,
        request: FrameRequest,
        index: PacketIndex,
        ranks: Ints,
        size: tuple[int, int],
        bounds_of: Callable[[int], Ints],
    ) -> Generator[Video, None, None]:
        """Decode groups; where a packet contradicts the sample table, go on by a scan."""
        delivered = decoded_before = bytes_before = 0
        while delivered < len(ranks):
            bounds, rest = bounds_of(len(ranks)), ranks[delivered:]
            decoder = self._decoder(index, rest, size, bounds[bounds >= delivered] - delivered)
            try:
                with decoder:
                    for part in decoder.groups():
                        yield self._video(index, decoder, part, rest, decoded_before, bytes_before)
                        delivered += len(part.frames)
            except InterlacedFrames:  # those delivered were not
                decoded_before += decoder.pictures_decoded
                bytes_before += decoder.bytes_read
                index = self.index = replace(index, info=replace(index.info, interlaced=True))
            except IndexMismatch:
                if index.scanned:
                    raise
                decoded_before += decoder.pictures_decoded
                bytes_before += decoder.bytes_read
                if not self.index.scanned:
                    self._index(index.info.path, scan=True)
                believed, index = index, self.index
                asked, done = request.ranks(index), ranks[:delivered]
                ranks = np.unique(asked)
                if delivered:
                    _check_delivered(believed, index, done, ranks)
                else:
                    size = resolve_size(request.size, index.info, len(asked))

    def _decoder(
        self, index: PacketIndex, ranks: Ints, size: tuple[int, int], bounds: Ints
    ) -> "FrameDecoder | LibraryDecoder | PictureDecoder":
        if index.info.container == PICTURE and self._backend == "pyav":
            from tokenprune.media.animation import PictureDecoder

            return PictureDecoder(index, ranks, size, bounds, self._background)
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
        decoder: "FrameDecoder | LibraryDecoder | PictureDecoder",
        part: DecodedGroup,
        ranks: Ints,
        decoded_before: int,
        bytes_before: int,
    ) -> Video:
        """A group as a `Video`; what decoders before this one did is counted as well."""
        here = ranks[part.first : part.first + len(part.frames)]
        return Video(
            frames=part.frames,
            pts_seconds=torch.from_numpy(index.seconds[here]),
            indices=torch.from_numpy(here),
            info=index.info,
            substituted=part.substituted,
            pictures_decoded=decoded_before + decoder.pictures_decoded,
            timings=Timings(
                0.0 if part.first else self.index_seconds, part.wait_seconds, part.effort
            ),
            bytes_read=bytes_before + decoder.bytes_read,
        )


def group_bounds(count: int, group: int, first: int) -> Ints:
    """`[G + 1]` where groups of `count` frames begin, and where the last one ends."""
    return np.array([0, *range(first, count, group), count], np.int64)


def _check_delivered(
    believed: PacketIndex, index: PacketIndex, delivered: Ints, ranks: Ints
) -> None:
    """Check that the frames delivered by a wrong table begin those that a scan would deliver.

    Raises:
        DecodeError: they do not.
    """
    same = np.array_equal(ranks[: len(delivered)], delivered)
    if not (same and np.array_equal(believed.times_of(delivered), index.times_of(delivered))):
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


def _in_order(video: Video, asked: Ints, timings: Timings) -> Video:
    """The frames of ranks `[F]` as they were asked for, of a video that has each once."""
    back = torch.from_numpy(np.searchsorted(video.indices.numpy(), asked))
    return replace(
        video,
        frames=video.frames[back],
        pts_seconds=video.pts_seconds[back],
        indices=video.indices[back],
        substituted=video.substituted[back],
        timings=timings,
    )
