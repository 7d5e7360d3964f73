"""Demuxing packets for the index: all of them, or the first few to check a sample table."""

from array import array
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from tokenprune.media.index.container import is_hidden, packets_of
from tokenprune.media.index.index import NO_PTS, Bools, Ints
from tokenprune.media.index.intra_refresh import is_intra_refresh
from tokenprune.media.index.mp4 import SampleTable

__all__ = ["Columns", "PacketScan"]

MOST_CHECKED = 64  # packets that are compared with a table until a frame can be decoded


@dataclass(frozen=True, eq=False)
class Columns:
    """What is known of each packet `[P]`, in decode order; `shown` `[N]` numbers those shown."""

    pts: Ints
    dts: Ints
    size: Ints
    duration: Ints
    keyframe: Bools
    shown: Ints


class PacketScan:
    """Reads packets from the start of a file, and decodes until the first frame comes out.

    Args:
        stream: the PyAV video stream.

    Attributes:
        first_frame: the first that could be decoded, or None.
        error: why the scan ended before the end of the file, or None.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._pts, self._dts, self._size = array("q"), array("q"), array("q")
        self._duration, self._shown, self._keyframe = array("q"), array("q"), array("b")
        self.first_frame: Any = None
        self.error: str | None = None

    def check(self, container: Any, table: SampleTable) -> Columns | None:
        """The columns from a sample table; None if its first packets are not the file's."""
        try:
            for packet in packets_of(container, self._stream):
                self._add(packet)
                if self.first_frame is not None or len(self._size) == MOST_CHECKED:
                    break
            else:
                self._decode(None)
        except av.error.FFmpegError:
            return None
        seen = len(self._size)
        if self.first_frame is None or len(table.size) < seen or NO_PTS in self._pts:
            return None
        columns = Columns(
            pts=table.dts + table.shift + (self._pts[0] - table.dts[0] - table.shift[0]),
            dts=table.dts,
            size=table.size,
            duration=table.duration,
            keyframe=table.keyframe,
            shown=np.flatnonzero(~table.discard),
        )
        for name in ("pts", "dts", "size", "duration", "keyframe"):
            if getattr(columns, name)[:seen].tolist() != getattr(self, f"_{name}").tolist():
                return None
        shown = columns.shown[columns.shown < seen].tolist()
        return columns if self._shown.tolist() == shown else None

    def read_all(self, container: Any) -> Columns:
        """The columns from all packets, to the end of the file or to where it cannot be read on."""
        try:
            for packet in packets_of(container, self._stream):
                self._add(packet)
        except av.error.FFmpegError as error:
            self.error = error.strerror
        if self.first_frame is None:
            self._decode(None)
        return Columns(
            pts=np.array(self._pts, np.int64),
            dts=np.array(self._dts, np.int64),
            size=np.array(self._size, np.int64),
            duration=np.array(self._duration, np.int64),
            keyframe=np.array(self._keyframe, bool),
            shown=np.array(self._shown, np.int64),
        )

    def _add(self, packet: Any) -> None:
        if self.first_frame is None:
            self._decode(packet)
        if not (packet.is_discard or is_hidden(self._stream, packet)):
            self._shown.append(len(self._size))
        pts, dts = packet.pts, packet.dts
        self._pts.append(NO_PTS if pts is None else pts)
        self._dts.append(self._pts[-1] if dts is None else dts)
        self._size.append(packet.size)
        self._duration.append(packet.duration or 0)
        refresh = packet.is_keyframe and is_intra_refresh(self._stream, memoryview(packet))
        self._keyframe.append(packet.is_keyframe and not refresh)

    def _decode(self, packet: Any) -> None:
        """Decode a packet; None, at the end of the file, flushes what the decoder holds back."""
        try:
            self.first_frame = next(iter(self._stream.codec_context.decode(packet)), None)
        except av.error.FFmpegError:
            return
