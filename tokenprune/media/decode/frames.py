"""Decoding packets to frames, and writing the wanted frames to their rows."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Literal, TypeVar

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from tokenprune.media.decode.color import DEPTH, ToneMapper, check_matrix
from tokenprune.media.decode.damage import CountingTracker, DamageTracker, DecodedFrame
from tokenprune.media.decode.plan import has_open_gops
from tokenprune.media.index.container import open_video, packets_of
from tokenprune.media.index.h264 import slice_count
from tokenprune.media.index.index import Ints, PacketIndex, hdr_transfer

__all__ = ["PacketDecoder", "Resizer", "Substitute", "Write", "fill"]

Write = Callable[[int, Any, bool], bool]
Substitute = Literal["earlier", "later", "any"]
Pixel = TypeVar("Pixel", np.uint8, np.uint16)


class Resizer:
    """Scales a decoded frame, converts it to RGB and turns it upright, into `[3, H, W]`.

    Args:
        size: height and width of what is delivered.
        index: says how frames are to be turned and rendered.
    """

    def __init__(self, size: tuple[int, int], index: PacketIndex) -> None:
        info = index.info
        self._path, self._tone_maps = info.path, index.source.rendering.tone_map
        self._quarters, self._mirrored = info.rotation // 90, info.mirrored
        self._height, self._width = size if self._quarters % 2 == 0 else size[::-1]
        self._reformatter = VideoReformatter()
        self._tone_mapper = ToneMapper()

    def __call__(self, frame: Any, out: NDArray[np.uint8]) -> None:
        """Write a frame.

        Raises:
            DecodeError: its colours cannot be converted.
        """
        check_matrix(frame, self._path)
        if self._tone_maps and hdr_transfer(frame):
            deep = np.stack(self._planes(frame, f"gbrp{DEPTH}le", np.uint16))
            planes = list(self._tone_mapper(frame, deep))
        else:
            planes = self._planes(frame, "gbrp", np.uint8)
        for channel, plane in zip(out, planes, strict=True):
            upright = plane[:, ::-1] if self._mirrored else plane
            channel[:] = np.rot90(upright, self._quarters) if self._quarters else upright

    def _planes(self, frame: Any, form: str, kind: type[Pixel]) -> list[NDArray[Pixel]]:
        """The frame, scaled, as planes `[H, W]` of red, green and blue."""
        planar: Any = self._reformatter.reformat(
            frame,
            width=self._width,
            height=self._height,
            format=form,
            interpolation=Interpolation.BILINEAR,
            threads=1,
        )
        green, blue, red = (  # lines are padded
            np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size).view(kind)
            for plane in planar.planes
        )
        return [one[: self._height, : self._width] for one in (red, green, blue)]


class PacketDecoder:
    """Decodes packets with a codec context of its own, kept for all units of a worker.

    Args:
        index: the packet index.
        threads: for frame threading in the codec; one is used where threads would hide damage.
        context: a codec context that nobody else uses; without one, the file is opened for it.

    Attributes:
        frames: the number of frames that came out so far.
    """

    def __init__(self, index: PacketIndex, threads: int, context: Any = None) -> None:
        self._index = index
        self._stack = ExitStack()
        if context is None or threads > 1:
            opened = open_video(index.info.path, index.source)
            container, stream = self._stack.enter_context(opened)
            if threads > 1 and not _frame_threads_report_damage(container, stream, index):
                threads = 1
            context = stream.codec_context
        self._context = context
        self._context.thread_type = "FRAME" if threads > 1 else "NONE"
        self._context.thread_count = threads
        if threads > 1:
            self._context.options = {"err_detect": "crccheck+explode"}
        self._delay = threads - 1  # packets: frame threading delays output by so many
        self.frames = 0

    def close(self) -> None:
        """Free the decoder."""
        self._stack.close()

    def decode(
        self, packets: Iterable[tuple[int, Any]], wanted: Ints, *, skip_nonref: bool
    ) -> Iterator[DecodedFrame]:
        """Decode packets, from a keyframe on, to frames in presentation order.

        Args:
            packets: packets in decode order with their numbers in the index.
            wanted: numbers of the packets whose frames are wanted.
            skip_nonref: leave out non-reference frames that are not wanted.
        """
        keep = set(wanted.tolist())
        tracker = (
            DamageTracker(self._index, self._delay) if self._index.timed else CountingTracker()
        )
        self._context.flush_buffers()
        self._context.skip_frame = "DEFAULT"
        for number, packet in packets:
            if skip_nonref:
                self._context.skip_frame = "DEFAULT" if number in keep else "NONREF"
            # A decoder copies a packet's PTS to its frame. Let that be the packet's place, which
            # is unique, where timestamps may repeat or start anew.
            place = int(self._index.place[number])
            packet.pts = packet.dts = place
            corrupt = packet.is_corrupt and not self._index.may_flag_intact(number)
            tracker.feed(number, place, corrupt)
            for frame in self._step(packet, tracker):
                yield from tracker.take(frame)
        for frame in self._step(None, tracker):  # flush what is held back for reordering
            yield from tracker.take(frame)
        yield from tracker.rest()

    def _step(self, packet: Any, tracker: DamageTracker | CountingTracker) -> list[Any]:
        try:
            frames = list(self._context.decode(packet))
        except av.error.FFmpegError:
            tracker.fail()
            return []
        self.frames += len(frames)
        return frames


def _frame_threads_report_damage(container: Any, stream: Any, index: PacketIndex) -> bool:
    """Whether frame threading reports all damage of a stream, and none that is not there.

    With frame threading the codec decodes several frames at once, and may hand out one before the
    thread that decodes a frame it refers to has flagged that one as corrupt. Errors, though, are
    returned in order. So every damage should be an error, which `err_detect=explode` makes of it,
    unless a frame has several slices: one that is missing raises no error. In H.264 it does raise
    one that the leading frames of an open GOP lack their references where decoding begins there.
    """
    first = next(packets_of(container, stream), None)
    if first is None or stream.codec_context.name == "mpeg4":
        return False
    if stream.codec_context.name != "h264":
        return True
    extradata = stream.codec_context.extradata or b""
    return slice_count(bytes(first), extradata) == 1 and not has_open_gops(index)


def fill(
    frames: Iterable[DecodedFrame],
    places: Iterable[int],
    rows: Iterable[int],
    write: Write,
    *,
    counted: bool,
    substitute: Substitute | None,
    stand_in: DecodedFrame | None = None,
) -> list[int]:
    """Write the wanted ones of some decoded frames to their rows.

    Args:
        frames: decoded frames in presentation order.
        places: places of the wanted ones, increasing.
        rows: their rows in the output.
        write: takes a row, the PyAV frame for it, and whether that is a substitute; False if the
            row cannot be written now.
        counted: places are counted, so damaged frames are written as they come.
        substitute: where a wanted frame does not come, or is damaged, write the nearest "earlier"
            intact one; or, if there is none, the next intact one, which is "later"; or else "any".
        stand_in: an intact frame that is known from before.

    Returns:
        The rows that were not written.
    """
    due = deque(zip(places, rows, strict=True))
    missing: list[int] = []
    intact, latest = stand_in, None
    for found in frames:
        place, frame, damaged = found
        while due and (due[0][0] < place or (due[0][0] == place and damaged and not counted)):
            row = due.popleft()[1]
            if not (substitute and intact and write(row, intact.frame, True)):
                missing.append(row)
        if not damaged and (intact is None or intact.place < place):
            intact = found
            if substitute in ("later", "any"):  # before the row that is due: rows come in order
                missing = _write_all(missing, frame, write)
        if due and due[0][0] == place:
            if not write(due[0][1], frame, damaged):
                # Behind a gap, and outside the window; so are all that follow.
                return missing + [row for _, row in due]
            due.popleft()
        latest = frame
        if not due and not (missing and substitute in ("later", "any")):
            return missing
    rest = [row for _, row in due]
    if substitute is None or (intact is None and substitute != "any"):
        return missing + rest
    last = latest if intact is None else intact.frame
    if substitute == "earlier":  # the missing ones came before it
        return missing + _write_all(rest, last, write)
    return _write_all(missing + rest, last, write)


def _write_all(rows: list[int], frame: Any, write: Write) -> list[int]:
    """Write a substitute to all rows; returns those left, which are all when there is none."""
    return [row for row in rows if frame is None or not write(row, frame, True)]
