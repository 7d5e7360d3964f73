"""Demuxing the packets of a decode unit, by reading on or by a seek that is checked."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import av
import numpy as np

from tokenprune.errors import DecodeError
from tokenprune.media.index.clock import MPEG_SYSTEMS
from tokenprune.media.index.container import open_video, packets_of
from tokenprune.media.index.index import NO_PTS, PacketIndex
from tokenprune.media.index.intra_refresh import is_intra_refresh

__all__ = ["IndexMismatch", "PacketReader"]

SEEK_GAP_BYTES = 1 << 20  # below this, reading on is quicker than a seek
MOST_SKIPPED = 4096  # packets to read after a seek until the index knows one


class IndexMismatch(DecodeError):
    """A packet of the file is not the one that its index names."""


class PacketReader:
    """A demuxer that hands out packets by their number in the index; each worker has its own.

    Each packet is compared with the index, so that a bad seek, or a file that changed, cannot go
    unnoticed.

    Args:
        index: the packet index.
        at_each: called for each packet that is read, also for those passed over; it may raise.

    Attributes:
        bytes_read: bytes of video packets read so far, those passed over included.
    """

    def __init__(self, index: PacketIndex, at_each: Callable[[], None] = lambda: None) -> None:
        self._index, self._at_each = index, at_each
        self.bytes_read = 0
        self._may_seek = index.seekable
        self._stack = ExitStack()
        self._pushed_back: Any = None
        self._open()

    @property
    def codec_context(self) -> Any:
        """The codec context of the stream, for one decoder; it outlives this reader's file."""
        return self._stream.codec_context

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def packets(self, first: int, last: int) -> Iterator[tuple[int, Any]]:
        """The packets `first` to `last` with their numbers, read as they are asked for.

        Raises:
            IndexMismatch: the file is not what its index says.
        """
        self._go_to(first)
        resume = first
        while self._at <= last:
            packet = self._next()
            if packet is None or not self._is_expected(packet):
                if not self._sought:
                    name = self._index.info.path
                    raise IndexMismatch(f"{name!r} changed since it was opened; open it again")
                self._may_seek = False  # this file's seeks cannot be trusted: read from packet 0
                resume = max(resume, self._at)
                self._reopen()
                continue
            number = self._at
            self._at += 1  # before the caller may leave
            if number >= resume:
                yield number, packet

    def _go_to(self, first: int) -> None:
        """Position the demuxer at or before packet `first`."""
        offsets = self._index.offsets
        gap = offsets[first] - offsets[min(self._at, len(offsets) - 1)]
        if 0 <= gap <= SEEK_GAP_BYTES and self._at <= first:
            return
        if self._may_seek and self._seek(first):
            return
        if self._at > first:
            self._reopen()

    def _seek(self, first: int) -> bool:
        """Seek to or before `first`, stepping back from keyframe to keyframe if need be."""
        starts = self._index.starts
        at = int(np.searchsorted(starts, first, "right")) - 1
        for back in (0, 1, 2, 4):
            if self._land(int(starts[max(0, at - back)]), first):
                return True
        self._may_seek = False
        self._reopen()
        return False

    def _land(self, target: int, first: int) -> bool:
        """Seek to a keyframe; True if the packet found is in the index, and not after `first`."""
        # MPEG transport and program streams have no index: FFmpeg bisects the file by DTS, and a
        # PTS could lead past the keyframe. Elsewhere it takes the time for a PTS: Matroska's cues
        # hold PTS, and MP4's DTS are offset to be compared with it. A DTS, which lies before the
        # keyframe's PTS, would lead to the keyframe before.
        by_dts = self._index.info.container in MPEG_SYSTEMS
        times = self._index.dts if by_dts else self._index.pts
        try:
            self._container.seek(int(times[target]), stream=self._stream)
        except av.error.FFmpegError:
            return False
        self._packets = packets_of(self._container, self._stream)
        self._pushed_back = None
        self._sought = True
        for _ in range(MOST_SKIPPED):
            packet = self._next()
            if packet is None:
                return False
            found = self._find(packet)
            if found is not None:
                self._at, self._pushed_back = found, packet
                return found <= first
        return False

    def _find(self, packet: Any) -> int | None:
        """The number of a packet, by its PTS and size; None if the index has no such packet."""
        if packet.pts is None:
            return None
        by_pts = self._index.by_pts
        row = int(np.searchsorted(self._index.pts, packet.pts, sorter=by_pts))
        for number in by_pts[row : row + 2]:
            if self._matches(int(number), packet):
                return int(number)
        return None

    def _is_expected(self, packet: Any) -> bool:
        if not self._index.timed:  # read from the start only, in the order of the scan
            return bool(packet.size == self._index.size[self._at])
        if not self._index.scanned and packet.is_keyframe:
            refresh = is_intra_refresh(self._stream, memoryview(packet))
            if self._index.keyframe[self._at] and refresh:  # the sample table hid it
                return False
        return self._matches(self._at, packet)

    def _matches(self, number: int, packet: Any) -> bool:
        pts = NO_PTS if packet.pts is None else packet.pts
        return bool(self._index.pts[number] == pts and self._index.size[number] == packet.size)

    def _next(self) -> Any:
        if self._pushed_back is not None:
            packet, self._pushed_back = self._pushed_back, None
            return packet
        try:
            packet = next(self._packets, None)
        except av.error.FFmpegError:  # there the scan for the index ended, too
            return None
        self.bytes_read += packet.size if packet is not None else 0
        self._at_each()
        return packet

    def _reopen(self) -> None:
        self._stack.close()
        self._open()

    def _open(self) -> None:
        opened = open_video(self._index.info.path, self._index.source)
        self._container, self._stream = self._stack.enter_context(opened)
        self._packets = packets_of(self._container, self._stream)
        self._pushed_back = None
        self._sought = False
        self._at = 0
