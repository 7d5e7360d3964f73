"""Decoding one unit: once quickly, and again from further back where frames did not come."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenprune.errors import DecodeError
from tokenprune.media.decode.damage import DecodedFrame
from tokenprune.media.decode.deinterlace import InterlacedFrames, deinterlaced
from tokenprune.media.decode.demux import PacketReader
from tokenprune.media.decode.frames import PacketDecoder, Resizer, Substitute, fill
from tokenprune.media.decode.plan import DecodeUnit, earlier_start, neighbours
from tokenprune.media.decode.rows import RowSink
from tokenprune.media.index.index import Ints, PacketIndex

__all__ = ["UnitDecoder"]

EXACT_RETRIES = (0, 1)  # keyframes to begin again earlier, skipping nothing, for a missing frame
FURTHER = 4  # how many times as far each try looks for a frame that may stand for one


@dataclass(frozen=True)
class _Searched:
    """How far was searched for intact frames: none comes after `latest`, up to packet `last`."""

    last: int = -2
    latest: DecodedFrame | None = None


@dataclass(frozen=True)
class _StandIn:
    """What stands for all frames of a damaged stretch that has no intact frame before it.

    Attributes:
        first: place where the stretch begins.
        end: place of the first intact frame after it; beyond the last one if there is none.
        frame: a PyAV frame.
    """

    first: int
    end: int
    frame: Any


class _IntactFrames:
    """Iterates over decoded frames, and remembers the first and the latest intact one."""

    def __init__(self, frames: Iterator[DecodedFrame]) -> None:
        self._frames = frames
        self.first: DecodedFrame | None = None
        self.latest: DecodedFrame | None = None
        self.exhausted = False

    def __iter__(self) -> Iterator[DecodedFrame]:
        for found in self._frames:
            if not found.damaged:
                self.first = self.first or found
                self.latest = found
            yield found
        self.exhausted = True


class UnitDecoder:
    """What a worker owns: the open file, its decoder, and a second one for damaged units.

    Args:
        index: the packet index.
        size: height and width of the rows.
        threads: frame threads inside the codec.
        rows: where the rows are written.
        counters: `[2]`, kept up to date: frames that came out of the decoders, and bytes of the
            video's packets that were read.
    """

    def __init__(
        self, index: PacketIndex, size: tuple[int, int], threads: int, rows: RowSink, counters: Ints
    ) -> None:
        self._index, self._rows, self._counters = index, rows, counters
        self._resize = Resizer(size, index)
        self._expects_progressive = index.source.rendering.deinterlace and not index.deinterlaces
        self._reader = PacketReader(index, self._at_packet)
        self._decoder = PacketDecoder(index, threads, self._reader.codec_context)
        self._retry_decoder: PacketDecoder | None = None
        # Up to now, and up to the unit at work. Damage may be long, and is searched once.
        self._searched = self._searched_before = _Searched()
        self._stand_in: _StandIn | None = None
        self._written: Any = None  # the last frame that a run wrote

    def close(self) -> None:
        """Free the decoders and close the file."""
        self._reader.close()
        self._decoder.close()
        if self._retry_decoder:
            self._retry_decoder.close()

    def decode(self, unit: DecodeUnit) -> None:
        """Decode the wanted frames of a unit into their rows.

        Raises:
            DecodeError: no frame could be decoded that might stand for a wanted one.
            Stopped: nothing is to be written any more.
        """
        missing = list(range(unit.row, unit.row + len(unit.ranks)))
        skip_nonref = self._index.skippable
        missing = self._run(
            self._decoder, unit, missing, unit.first, unit.last, skip_nonref=skip_nonref
        )
        if not missing or self._filled(unit, missing):
            return
        self._searched_before = self._searched
        for first, last, substitute in self._retries(unit):
            # Without frame threading it is certain which packet was damaged.
            self._retry_decoder = self._retry_decoder or PacketDecoder(self._index, 1)
            missing = self._run(
                self._retry_decoder,
                unit,
                missing,
                first,
                last,
                skip_nonref=False,
                substitute=substitute,
            )
            self._note_searched(unit, first, last)
            if not missing:
                if substitute in ("later", "any"):
                    self._note_stand_in(unit)
                return
        rank, name = unit.ranks[missing[0] - unit.row], self._index.info.path
        raise DecodeError(f"{name!r} is damaged: nothing is left to stand for frame {rank}")

    def _filled(self, unit: DecodeUnit, missing: list[int]) -> bool:
        """Whether rows were filled with what stands for all of the stretch that they lie in."""
        known, ranks = self._stand_in, unit.ranks[np.array(missing) - unit.row]
        places = self._index.place[self._index.order[ranks]]
        if known is None or not (known.first <= places[0] and places[-1] < known.end):
            return False
        for row in missing:
            self._store(row, known.frame, is_substitute=True, waits=True)
        return True

    def _note_stand_in(self, unit: DecodeUnit) -> None:
        """Note that nothing before a unit is intact, nor anything up to what now stands for it."""
        if self._index.timed and self._written is not None:
            found = self._decoded.first
            end = len(self._index.pts) if found is None else found.place
            first = int(self._index.place[unit.first : unit.last + 1].min())
            self._stand_in = _StandIn(first, end, self._written)

    def _store(self, row: int, frame: Any, *, is_substitute: bool, waits: bool) -> bool:
        """Write a frame to its row; False if that lies outside the window, and shall not wait."""
        pixels = self._rows.offer(row, waits=waits)
        if pixels is None:
            return False
        self._resize(frame, pixels)
        self._count()  # before the caller, given the last row, asks
        self._rows.stored(row, is_substitute)
        return True

    def _retries(self, unit: DecodeUnit) -> Iterator[tuple[int, int, Substitute | None]]:
        """From which packet to which to decode again, and what may stand for a missing frame.

        First the frame itself; then a frame before it, looked for ever further back, but only where
        that was not done before; then one after it. Where frames are counted, those that come after
        the unit may still be its own.
        """
        for keyframes in EXACT_RETRIES:
            yield earlier_start(self._index, unit.first, keyframes), unit.last, None
        keyframes, first, origin = FURTHER, -1, self._origin(unit.first)
        end = len(self._index.pts) - 1
        while first != origin and self._index.timed:
            first = earlier_start(self._index, unit.first, keyframes)
            yield first, unit.last, "earlier"
            if self._was_searched(unit, first):
                break
            keyframes *= FURTHER
        keyframes, last = FURTHER, -1
        while last != end and self._index.timed:
            last = self._later_start(unit.last, keyframes)
            yield unit.first, last, "later"
            keyframes *= FURTHER
        yield origin, end, "any"

    def _origin(self, packet: int) -> int:
        """The first packet since the last discontinuity of the timestamps before a packet."""
        return earlier_start(self._index, packet, len(self._index.starts))

    def _was_searched(self, unit: DecodeUnit, first: int) -> bool:
        """Whether what lies before `first` was searched for an earlier unit."""
        before, epoch = self._searched_before, self._index.epoch
        return first - 1 <= before.last < unit.first and epoch[before.last] == epoch[unit.first]

    def _note_searched(self, unit: DecodeUnit, first: int, last: int) -> None:
        """Note up to where a run searched, and the latest intact frame there, if that is known."""
        before = self._searched_before.latest if self._was_searched(unit, first) else None
        found = [one for one in (before, self._decoded.latest) if one]
        latest = max(found, key=lambda one: one.place, default=None)
        if self._decoded.exhausted and (latest or first == self._origin(first)):
            self._searched = _Searched(last, latest)

    def _run(
        self,
        decoder: PacketDecoder,
        unit: DecodeUnit,
        rows: list[int],
        first: int,
        last: int,
        *,
        skip_nonref: bool,
        substitute: Substitute | None = None,
    ) -> list[int]:
        """Decode packets and write rows; returns the rows that were not written."""
        ranks = unit.ranks[np.array(rows) - unit.row]
        wanted = self._index.order[ranks]
        places = self._index.place[wanted] if self._index.timed else ranks
        packets = self._reader.packets(first, last)
        beside = neighbours(self._index, wanted) if self._index.deinterlaces else ()
        decoded = decoder.decode(
            packets, np.concatenate([wanted, *beside]), skip_nonref=skip_nonref
        )
        if beside:
            # Another frame may stand for a wanted one: then each must be fit to be shown.
            needed = None if substitute else [places, *(self._index.place[one] for one in beside)]
            shown = None if needed is None else frozenset(np.concatenate(needed).tolist())
            decoded = deinterlaced(decoded, self._index, shown)
        self._decoded = _IntactFrames(decoded)
        self._written = None
        due = 0

        def write(row: int, frame: Any, is_substitute: bool) -> bool:
            nonlocal due
            if frame.interlaced_frame and self._expects_progressive:
                raise InterlacedFrames(f"{self._index.info.path!r} has interlaced frames")
            # Behind a gap there is no waiting: the row awaited may be the one that is missing.
            is_next = row == rows[due]
            if not self._store(row, frame, is_substitute=is_substitute, waits=is_next):
                return False
            self._written = frame
            due = min(due + is_next, len(rows) - 1)
            return True

        missing = fill(
            self._decoded,
            places.tolist(),
            rows,
            write,
            counted=not self._index.timed,
            substitute=substitute,
            stand_in=self._searched_before.latest if self._was_searched(unit, first) else None,
        )
        self._count()
        return missing

    def _at_packet(self) -> None:
        self._rows.check()
        self._count()

    def _count(self) -> None:
        retried = self._retry_decoder.frames if self._retry_decoder else 0
        self._counters[:] = self._decoder.frames + retried, self._reader.bytes_read

    def _later_start(self, packet: int, keyframes: int) -> int:
        """The packet of the keyframe so many `keyframes` after a packet; or the last packet."""
        starts = self._index.starts
        at = int(np.searchsorted(starts, packet, "right")) + keyframes - 1
        return int(starts[at]) if at < len(starts) else len(self._index.pts) - 1
