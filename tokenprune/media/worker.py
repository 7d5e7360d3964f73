"""Decoding one unit: once quickly, and again with more care where frames did not come."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tokenprune.errors import DecodeError
from tokenprune.media.demux import PacketReader
from tokenprune.media.index import PacketIndex
from tokenprune.media.pictures import PictureDecoder, fill
from tokenprune.media.plan import Unit, earlier_start

Packets = list[tuple[int, Any]]
Store = Callable[[int, Any, bool, bool], None]
RETRY_KEYFRAMES = (0, 1, 4)  # how far back to begin again, leaving nothing out, for a lost frame


class UnitDecoder:
    """What a worker owns: its decoder, and a second one for damaged units.

    Args:
        index: the packet index.
        reader: gives more packets for another try.
        threads: threads inside the codec.
    """

    def __init__(self, index: PacketIndex, reader: PacketReader, threads: int) -> None:
        self._index, self._reader = index, reader
        self._quick = PictureDecoder(index, threads)
        self._careful: PictureDecoder | None = None

    @property
    def pictures(self) -> int:
        """Pictures that came out of the decoders so far."""
        return self._quick.pictures + (self._careful.pictures if self._careful else 0)

    def close(self) -> None:
        """Free the decoders."""
        self._quick.close()
        if self._careful:
            self._careful.close()

    def decode(self, unit: Unit, packets: Packets, store: Store) -> None:
        """Decode the wanted frames of a unit.

        Args:
            unit: the unit.
            packets: its packets with their numbers.
            store: takes a row, the picture for it, whether that is a substitute, and whether all
                rows before it in the unit have been stored.

        Raises:
            DecodeError: no picture could be decoded that might stand for a wanted one.
        """
        due = unit.row

        def write(row: int, picture: Any, is_substitute: bool) -> None:
            nonlocal due
            store(row, picture, is_substitute, row == due)
            due += row == due

        rows = list(range(unit.row, unit.row + len(unit.ranks)))
        skip = self._index.skippable
        missing = self._run(self._quick, unit, rows, packets, write, skip=skip, substitute=False)
        for keyframes in RETRY_KEYFRAMES:
            if not missing:
                return
            last_try = keyframes == RETRY_KEYFRAMES[-1]
            first = earlier_start(self._index, unit.first, keyframes)
            packets = self._reader.read(first, self._after(unit.last) if last_try else unit.last)
            # One thread tells best which packet was damaged.
            self._careful = self._careful or PictureDecoder(self._index, 1)
            missing = self._run(
                self._careful, unit, missing, packets, write, skip=False, substitute=last_try
            )
        if missing:
            rank, name = unit.ranks[missing[0] - unit.row], self._index.info.path
            raise DecodeError(f"{name!r} is damaged: nothing near frame {rank} can be decoded")

    def _run(
        self,
        decoder: PictureDecoder,
        unit: Unit,
        rows: list[int],
        packets: Packets,
        write: Callable[[int, Any, bool], None],
        *,
        skip: bool,
        substitute: bool,
    ) -> list[int]:
        """Decode and write; gives the rows that were not written."""
        ranks = unit.ranks[np.array(rows) - unit.row]
        wanted = self._index.order[ranks]
        places = self._index.place[wanted] if self._index.timed else ranks
        pictures = decoder.decode(packets, wanted, skip=skip)
        counted = not self._index.timed
        return fill(pictures, places.tolist(), rows, write, substitute=substitute, counted=counted)

    def _after(self, packet: int) -> int:
        """A packet so far after this one that a picture can be decoded before it."""
        starts = self._index.starts
        at = int(np.searchsorted(starts, packet, "right")) + 1
        return int(starts[at]) if at < len(starts) else len(self._index.pts) - 1
