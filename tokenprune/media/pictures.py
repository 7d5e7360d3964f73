"""Decoding one run of packets into the rows of its wanted frames."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from tokenprune.media.files import open_media, video_stream
from tokenprune.media.index import PacketIndex
from tokenprune.media.plan import Unit

Write = Callable[[int, Any, bool], None]
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
            out[channel] = np.rot90(rows[: self._height, : self._width], self._quarters)


class PictureDecoder:
    """One worker's decoder: a codec context of its own, kept for all of its runs."""

    def __init__(self, index: PacketIndex, threads: int) -> None:
        self._index = index
        self._stack = ExitStack()
        container = self._stack.enter_context(open_media(index.info.path))
        self._context = video_stream(container).codec_context
        self._context.thread_type = "FRAME" if threads > 1 else "NONE"
        self._context.thread_count = threads
        self.pictures = 0  # that came out of the decoder so far

    def close(self) -> None:
        """Free the decoder."""
        self._stack.close()

    def run(
        self,
        packets: Iterable[tuple[int, Any]],
        unit: Unit,
        rows: list[int],
        write: Write,
        *,
        skip: bool = False,
        substitute: bool = False,
    ) -> list[int]:
        """Decode packets until every wanted frame has been written.

        Args:
            packets: the packets with their numbers in the index.
            unit: the run that they belong to.
            rows: the rows of the unit still wanted, increasing.
            write: takes a row, the decoded picture for it, and whether that is a substitute.
            skip: leave out pictures that neither are wanted nor serve another.
            substitute: write the nearest earlier picture (or, before the first, the next one)
                where a wanted one does not come.

        Returns:
            The rows of wanted frames that did not come.
        """
        timed = self._index.timed
        ranks = unit.ranks[np.array(rows) - unit.row]
        targets = self._index.order[ranks]
        places = self._index.place[targets] if timed else ranks
        run = _Run(list(zip(places.tolist(), rows, strict=True)), write, substitute)
        wanted = set(targets.tolist())
        self._context.flush_buffers()
        self._context.skip_frame = "DEFAULT"
        for number, packet in packets:
            if skip:
                self._context.skip_frame = "DEFAULT" if number in wanted else "NONREF"
            if timed:  # the decoder hands a time on to the picture: let it be its place
                packet.pts = packet.dts = int(self._index.place[number])
            if run.take(self._decode(packet), timed):
                return run.missing
        run.take(self._decode(None), timed)
        run.finish()
        return run.missing

    def _decode(self, packet: Any) -> list[Any]:
        try:
            pictures = list(self._context.decode(packet))
        except av.error.FFmpegError:  # a damaged packet gives no picture; its frame will be missed
            return []
        self.pictures += len(pictures)
        return pictures


class _Run:
    """Matches decoded pictures with the wanted frames, both in presentation order."""

    def __init__(self, wanted: list[tuple[int, int]], write: Write, substitute: bool) -> None:
        self.missing: list[int] = []
        self._wanted = wanted[::-1]  # the next one last
        self._write = write
        self._substitute = substitute
        self._previous: Any = None
        self._count = 0

    def take(self, pictures: list[Any], timed: bool) -> bool:
        """Use the pictures; True when nothing more is wanted."""
        for picture in pictures:
            place = picture.pts if timed else self._count
            self._count += 1
            if place is None:
                continue
            while self._wanted and self._wanted[-1][0] < place:
                self._miss(picture if self._previous is None else self._previous)
            if self._wanted and self._wanted[-1][0] == place:
                self._write(self._wanted.pop()[1], picture, False)
            self._previous = picture
        return not self._wanted

    def finish(self) -> None:
        """No more pictures come: what is still wanted is missed."""
        while self._wanted:
            self._miss(self._previous)

    def _miss(self, instead: Any) -> None:
        row = self._wanted.pop()[1]
        if self._substitute and instead is not None:
            self._write(row, instead, True)
        else:
            self.missing.append(row)
