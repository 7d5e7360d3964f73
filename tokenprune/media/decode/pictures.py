"""Decoding runs of packets, and putting the wanted pictures where they belong."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from tokenprune.media.decode.damage import Counter, Decoded, Sieve
from tokenprune.media.decode.plan import has_leading
from tokenprune.media.index.container import open_media, packets_of, video_stream
from tokenprune.media.index.h264 import slices
from tokenprune.media.index.index import Ints, PacketIndex

Write = Callable[[int, Any, bool], bool]
Substitute = Literal["earlier", "later", "any"]
GBR = (1, 2, 0)  # planes of swscale's planar RGB, as channels


class Resizer:
    """Scales a picture, converts it to RGB and turns it upright, writing `[3, H, W]` in place."""

    def __init__(self, size: tuple[int, int], rotation: int) -> None:
        self._quarters = rotation // 90
        self._height, self._width = size if self._quarters % 2 == 0 else size[::-1]
        self._reformatter = VideoReformatter()

    def __call__(self, picture: Any, out: NDArray[np.uint8]) -> None:
        planar: Any = self._reformatter.reformat(
            picture,
            width=self._width,
            height=self._height,
            format="gbrp",
            interpolation=Interpolation.BILINEAR,
            threads=1,
        )
        for plane, channel in zip(planar.planes, GBR, strict=True):
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            upright = rows[: self._height, : self._width]
            out[channel] = np.rot90(upright, self._quarters) if self._quarters else upright


class PictureDecoder:
    """One worker's decoder: a codec context of its own, kept for all of its runs."""

    def __init__(self, index: PacketIndex, threads: int) -> None:
        self._index = index
        self._stack = ExitStack()
        container = self._stack.enter_context(open_media(index.info.path))
        stream = video_stream(container)
        if threads > 1 and not _threads_tell_of_damage(container, stream, index):
            threads = 1
        self._context = stream.codec_context
        self._context.thread_type = "FRAME" if threads > 1 else "NONE"
        self._context.thread_count = threads
        if threads > 1:
            self._context.options = {"err_detect": "crccheck+explode"}
        self._delay = threads - 1
        self.pictures = 0  # that came out of the decoder so far

    def close(self) -> None:
        """Free the decoder."""
        self._stack.close()

    def decode(
        self, packets: Iterable[tuple[int, Any]], wanted: Ints, *, skip: bool
    ) -> Iterator[Decoded]:
        """The pictures of a run of packets, in presentation order.

        Args:
            packets: packets in decode order with their numbers in the index.
            wanted: numbers of the packets whose pictures are wanted.
            skip: leave out pictures that neither are wanted nor serve another.
        """
        keep = set(wanted.tolist())
        sieve = Sieve(self._index, self._delay) if self._index.timed else Counter()
        self._context.flush_buffers()
        self._context.skip_frame = "DEFAULT"
        for number, packet in packets:
            if skip:
                self._context.skip_frame = "DEFAULT" if number in keep else "NONREF"
            # A decoder hands a packet's time on to its picture. Let that be the packet's place.
            place = int(self._index.place[number])
            packet.pts = packet.dts = place
            sieve.feed(number, place, packet.is_corrupt and not self._index.before_break(number))
            for picture in self._step(packet, sieve):
                yield from sieve.take(picture)
        for picture in self._step(None, sieve):
            yield from sieve.take(picture)
        yield from sieve.rest()

    def _step(self, packet: Any, sieve: Sieve | Counter) -> list[Any]:
        try:
            pictures = list(self._context.decode(packet))
        except av.error.FFmpegError:
            sieve.fail()
            return []
        self.pictures += len(pictures)
        return pictures


def _threads_tell_of_damage(container: Any, stream: Any, index: PacketIndex) -> bool:
    """Whether no damage is lost, and none imagined, if pictures are decoded beside each other.

    A thread may hand out a picture before another, which decodes it, has marked it as damaged. But
    errors come in order; so damage should be one, and it can be if no picture is made of pieces,
    of which one might lack without an error. In H.264 it is an error, too, that the pictures of the
    group before lack where decoding begins in an open group.
    """
    first = next(packets_of(container, stream), None)
    if first is None or stream.codec_context.name == "mpeg4":
        return False
    if stream.codec_context.name != "h264":
        return True
    header = stream.codec_context.extradata or b""
    return slices(bytes(first), header) == 1 and not has_leading(index)


def fill(
    pictures: Iterable[Decoded],
    places: Iterable[int],
    rows: Iterable[int],
    write: Write,
    *,
    counted: bool,
    substitute: Substitute | None,
    stand_in: Decoded | None = None,
) -> list[int]:
    """Write the pictures that are wanted to their rows.

    Args:
        pictures: decoded pictures in presentation order.
        places: places of the wanted ones, increasing.
        rows: their rows in the output.
        write: takes a row, the picture for it, and whether that is a substitute; False if the row
            cannot be written now.
        counted: places are counted, so damaged pictures are written as they come.
        substitute: where a wanted picture does not come, or is damaged, write the nearest "earlier"
            sound one; or, if there is none, the next sound one, which is "later"; or else "any".
        stand_in: a sound picture that is known from before.

    Returns:
        The rows that were not written.
    """
    due = deque(zip(places, rows, strict=True))
    lost: list[int] = []
    sound, latest = stand_in, None
    for found in pictures:
        place, picture, damaged = found
        while due and (due[0][0] < place or (due[0][0] == place and damaged and not counted)):
            row = due.popleft()[1]
            if not (substitute and sound and write(row, sound.picture, True)):
                lost.append(row)
        if not damaged and (sound is None or sound.place < place):
            sound = found
            if substitute in ("later", "any"):  # before the row that is due: rows come in order
                lost = _write_all(lost, picture, write)
        if due and due[0][0] == place:
            if not write(due[0][1], picture, damaged):
                # Behind a gap, and outside the window; so are all that follow.
                return lost + [row for _, row in due]
            due.popleft()
        latest = picture
        if not due and not (lost and substitute in ("later", "any")):
            return lost
    rest = [row for _, row in due]
    if substitute is None or (sound is None and substitute != "any"):
        return lost + rest
    last = latest if sound is None else sound.picture
    if substitute == "earlier":  # what was lost came before it
        return lost + _write_all(rest, last, write)
    return _write_all(lost + rest, last, write)


def _write_all(rows: list[int], picture: Any, write: Write) -> list[int]:
    """Write a substitute to all rows; gives those left, which are all when there is none."""
    return [row for row in rows if picture is None or not write(row, picture, True)]
