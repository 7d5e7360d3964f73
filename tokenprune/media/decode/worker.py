"""Decoding one unit: once quickly, and again with more care where frames did not come."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenprune.errors import DecodeError
from tokenprune.media.decode.damage import Decoded
from tokenprune.media.decode.demux import PacketReader
from tokenprune.media.decode.pictures import PictureDecoder, Resizer, Substitute, fill
from tokenprune.media.decode.plan import Unit, earlier_start
from tokenprune.media.decode.rows import RowSink
from tokenprune.media.index.index import Ints, PacketIndex

EXACT_RETRIES = (0, 1)  # keyframes to begin again earlier, leaving nothing out, for a lost frame
FURTHER = 4  # how many times as far each try looks for a picture that may stand for one


@dataclass(frozen=True)
class _Barren:
    """What is known of a damaged stretch: up to packet `last` nothing sound follows `stand_in`."""

    last: int = -2
    stand_in: Decoded | None = None


class _Heard:
    """Pictures on their way, of which is noted which sound one was the latest."""

    def __init__(self, pictures: Iterator[Decoded]) -> None:
        self._pictures = pictures
        self.latest: Decoded | None = None
        self.all_of_them = False

    def __iter__(self) -> Iterator[Decoded]:
        for found in self._pictures:
            if not found.damaged:
                self.latest = found
            yield found
        self.all_of_them = True


class UnitDecoder:
    """What a worker owns: the open file, its decoder, and a second one for damaged units.

    Args:
        index: the packet index.
        size: height and width of the rows.
        threads: threads inside the codec.
        rows: where the rows are written.
        counters: `[2]`, kept up to date: pictures that came out of the decoders, and bytes of the
            video's packets that were read.
    """

    def __init__(
        self, index: PacketIndex, size: tuple[int, int], threads: int, rows: RowSink, counters: Ints
    ) -> None:
        self._index, self._rows, self._counters = index, rows, counters
        self._resize = Resizer(size, index.info.rotation)
        self._reader = PacketReader(index, self._at_packet)
        self._quick = PictureDecoder(index, threads)
        self._careful: PictureDecoder | None = None
        self._barren = self._known = _Barren()  # as of now, and before the unit at work

    def close(self) -> None:
        """Free the decoders and close the file."""
        self._reader.close()
        self._quick.close()
        if self._careful:
            self._careful.close()

    def decode(self, unit: Unit) -> None:
        """Decode the wanted frames of a unit into their rows.

        Raises:
            DecodeError: no picture could be decoded that might stand for a wanted one.
            Stopped: nothing is to be written any more.
        """
        missing = list(range(unit.row, unit.row + len(unit.ranks)))
        skip = self._index.skippable
        missing = self._run(self._quick, unit, missing, unit.first, unit.last, skip=skip)
        if not missing:
            return
        self._known = self._barren
        for first, last, substitute in self._retries(unit):
            # One thread tells best which packet was damaged.
            self._careful = self._careful or PictureDecoder(self._index, 1)
            missing = self._run(
                self._careful, unit, missing, first, last, skip=False, substitute=substitute
            )
            self._learn(unit, first, last)
            if not missing:
                return
        rank, name = unit.ranks[missing[0] - unit.row], self._index.info.path
        raise DecodeError(f"{name!r} is damaged: nothing is left to stand for frame {rank}")

    def _retries(self, unit: Unit) -> Iterator[tuple[int, int, Substitute | None]]:
        """From which packet to which to decode again, and what may stand for a lost frame.

        First the frame itself; then a picture before it, looked for ever further back, but only
        where that was not done before; then one after it. Where pictures are counted, those that
        come after the unit may still be its own.
        """
        for keyframes in EXACT_RETRIES:
            yield earlier_start(self._index, unit.first, keyframes), unit.last, None
        keyframes, first, origin = FURTHER, -1, self._origin(unit.first)
        end = len(self._index.pts) - 1
        while first != origin and self._index.timed:
            first = earlier_start(self._index, unit.first, keyframes)
            yield first, unit.last, "earlier"
            if self._reaches_known(unit, first):
                break
            keyframes *= FURTHER
        keyframes, last = FURTHER, -1
        while last != end and self._index.timed:
            last = self._after(unit.last, keyframes)
            yield unit.first, last, "later"
            keyframes *= FURTHER
        yield origin, end, "any"

    def _origin(self, packet: int) -> int:
        """Where the stretch of the clock begins in which a packet lies."""
        return earlier_start(self._index, packet, len(self._index.starts))

    def _reaches_known(self, unit: Unit, first: int) -> bool:
        """Whether what lies before `first` was searched for an earlier unit."""
        known, epoch = self._known, self._index.epoch
        return first - 1 <= known.last < unit.first and epoch[known.last] == epoch[unit.first]

    def _learn(self, unit: Unit, first: int, last: int) -> None:
        """Note what a run told about where there is nothing sound: damage may be long."""
        known = self._known.stand_in if self._reaches_known(unit, first) else None
        found = [one for one in (known, self._heard.latest) if one]
        latest = max(found, key=lambda one: one.place, default=None)
        if self._heard.all_of_them and (latest or first == self._origin(first)):
            self._barren = _Barren(last, latest)

    def _run(
        self,
        decoder: PictureDecoder,
        unit: Unit,
        rows: list[int],
        first: int,
        last: int,
        *,
        skip: bool,
        substitute: Substitute | None = None,
    ) -> list[int]:
        """Decode and write; gives the rows that were not written."""
        ranks = unit.ranks[np.array(rows) - unit.row]
        wanted = self._index.order[ranks]
        places = self._index.place[wanted] if self._index.timed else ranks
        self._heard = _Heard(decoder.decode(self._reader.packets(first, last), wanted, skip=skip))
        due = 0

        def write(row: int, picture: Any, is_substitute: bool) -> bool:
            nonlocal due
            # Behind a gap there is no waiting: the row awaited may be the one that is missing.
            is_next = row == rows[due]
            place = self._rows.offer(row, waits=is_next)
            if place is None:
                return False
            self._resize(picture, place)
            self._count()  # before the caller, given the last row, asks
            self._rows.stored(row, is_substitute)
            due = min(due + is_next, len(rows) - 1)
            return True

        lost = fill(
            self._heard,
            places.tolist(),
            rows,
            write,
            counted=not self._index.timed,
            substitute=substitute,
            stand_in=self._known.stand_in if self._reaches_known(unit, first) else None,
        )
        self._count()
        return lost

    def _at_packet(self) -> None:
        self._rows.check()
        self._count()

    def _count(self) -> None:
        careful = self._careful.pictures if self._careful else 0
        self._counters[:] = self._quick.pictures + careful, self._reader.bytes_read

    def _after(self, packet: int, keyframes: int) -> int:
        """The packet that begins the group so many `keyframes` after this one; or the last one."""
        starts = self._index.starts
        at = int(np.searchsorted(starts, packet, "right")) + keyframes - 1
        return int(starts[at]) if at < len(starts) else len(self._index.pts) - 1
