"""The packet index, from a file's own table or a pass over its packets: it fixes what is where.

Frame i of a video is the i-th shown packet in order of presentation time, whatever the container
declares about counts, duration or rate.
"""

import os
from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import DecodeError
from tokenprune.media.index.container import (
    geometry,
    is_hidden,
    is_skippable,
    open_media,
    packets_of,
    video_stream,
)
from tokenprune.media.index.intra_refresh import is_gradual
from tokenprune.media.index.mp4 import SampleTable, sample_table

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NO_TIME = -(1 << 62)
TIMELESS = {"h264", "hevc", "m4v", "mpegvideo"}  # raw streams: their times are guesses
DECODE_TIMED = {"avi", "asf"}  # these store when pictures are decoded, not when they are shown
JOINABLE = {"mpegts", "mpeg"}  # files of these kinds are joined end to end, clocks and all


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Attributes:
        path: the file.
        duration_seconds: from the first frame to the end of the last one.
        frame_count: number of shown frames, counted, not declared.
        average_fps: `frame_count / duration_seconds`.
        width: pixels of a row as displayed, after rotation.
        height: pixels of a column as displayed, after rotation.
        codec: name of the video decoder, such as `h264`.
        container: FFmpeg's name of the file format, such as `mov,mp4,m4a,3gp,3g2,mj2`.
        has_audio: whether there is a sound track.
        rotation: degrees by which stored pictures are turned counterclockwise: 0, 90, 180, 270.
        start_seconds: the first frame's time on the file's own clock; all other times of this
            package count from that frame.
    """

    path: str
    duration_seconds: float
    frame_count: int
    average_fps: float
    width: int
    height: int
    codec: str
    container: str
    has_audio: bool
    rotation: int
    start_seconds: float


_HELD_AT_BREAK = 2  # packets that a demuxer may hold
_LOOKS = 64  # packets among which the first picture comes, or a file is scanned


@dataclass(frozen=True, eq=False, repr=False)
class PacketIndex:
    """All packets of a file's video stream, in decode order.

    `P` packets, `N` frames shown. A *place* orders all packets by presentation, those that are
    never shown (cut away by an edit list) included; a *rank* orders the shown ones.

    Attributes:
        info: what the file holds.
        pts: `[P]` presentation time, in ticks of the stream.
        dts: `[P]` decode time, in ticks.
        size: `[P]` bytes.
        keyframe: `[P]` whether decoding can begin there.
        place: `[P]` position in presentation order.
        epoch: `[P]` grows where the file's clock breaks; no picture refers across such a break.
        order: `[N]` rank to packet.
        seconds: `[N]` presentation time by rank, from 0.
        timed: whether timestamps identify frames; otherwise they are counted from the start.
        skippable: whether leaving out pictures that no other refers to is known to be exact.
        error: why the scan ended before the end of the file, or None.
        scanned: whether all packets were read; otherwise the file's own table was believed, and
            each packet is compared with it when it is decoded.
    """

    info: VideoInfo
    pts: Ints
    dts: Ints
    size: Ints
    keyframe: Bools
    place: Ints
    epoch: Ints
    order: Ints
    seconds: NDArray[np.float64]
    timed: bool
    skippable: bool
    error: str | None
    scanned: bool = True

    def __repr__(self) -> str:
        info = self.info
        return f"PacketIndex({info.path!r}, frames={info.frame_count}, packets={len(self.pts)})"

    @cached_property
    def starts(self) -> Ints:
        """`[G]` packets where decoding can begin: the keyframes, and the first packet."""
        starts = np.flatnonzero(self.keyframe)
        return starts if len(starts) and starts[0] == 0 else np.concatenate([[0], starts])

    @property
    def seekable(self) -> bool:
        """Whether a time on the clock names one point of the file."""
        return self.timed and int(self.epoch[-1]) == 0

    def times_of(self, ranks: Ints) -> Ints:
        """Presentation times of frames, in ticks."""
        return self.pts[self.order[ranks]]

    def before_break(self, packet: int) -> bool:
        """Whether the file's clock breaks right after this packet.

        Where two transport streams are joined, their packet counters seldom fit, and the demuxer
        marks the packets it holds at that moment as corrupt, though nothing is missing. What is
        really cut off there still fails in the decoder.
        """
        after = min(packet + _HELD_AT_BREAK, len(self.epoch) - 1)
        return bool(self.epoch[after] != self.epoch[packet])


def index_video(path: str | os.PathLike[str], *, scan: bool = False) -> PacketIndex:
    """Index the packets of a video file; only its first picture is decoded, for its size and turn.

    Args:
        path: a local file.
        scan: read all packets even if the file has a table of them.

    Raises:
        MediaError: the file is missing, empty, not media, without video, or without frames.
    """
    with open_media(path) as container:
        stream = video_stream(container)
        table = None if scan else sample_table(container.name, stream)
        look = _Look(stream)
        columns = look.scan(container) if table is None else look.compare(container, table)
        if columns is None:
            return index_video(path, scan=True)
        if not len(columns.shown):
            raise DecodeError(f"{container.name!r} has a video stream but no frames in it")
        index = _build(container, stream, look, columns, scanned=table is None)
    if not index.info.width or not index.info.height:
        raise DecodeError(
            f"{index.info.path!r}: no picture of its video can be decoded; convert it, to H.264 say"
        )
    return index


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Say what a video file holds, by its packet index.

    Raises:
        MediaError: as `index_video`.
    """
    return index_video(path).info


@dataclass(frozen=True, eq=False)
class _Columns:
    """What is known of each packet, in decode order; `shown` are the numbers of those shown."""

    pts: Ints
    dts: Ints
    size: Ints
    duration: Ints
    keyframe: Bools
    shown: Ints


class _Look:
    """A look at the packets: at all of them, or at the first few, to compare them with a table.

    Attributes:
        first_picture: the first that could be decoded, or None.
        error: why the look ended before the end of the file, or None.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.pts, self.dts, self.size = array("q"), array("q"), array("q")
        self.duration, self.shown, self.keyframe = array("q"), array("q"), array("b")
        self.first_picture: Any = None
        self.error: str | None = None

    def compare(self, container: Any, table: SampleTable) -> _Columns | None:
        """What the table tells; None if its first packets are not the file's."""
        try:
            for packet in packets_of(container, self.stream):
                self._add(packet)
                if self.first_picture is not None or len(self.size) == _LOOKS:
                    break
            else:
                self._look(None)
        except av.error.FFmpegError:
            return None
        seen = len(self.size)
        if self.first_picture is None or len(table.size) < seen or NO_TIME in self.pts:
            return None
        columns = _Columns(
            pts=table.dts + table.shift + (self.pts[0] - table.dts[0] - table.shift[0]),
            dts=table.dts,
            size=table.size,
            duration=table.duration,
            keyframe=table.keyframe,
            shown=np.flatnonzero(~table.discard),
        )
        for name in ("pts", "dts", "size", "duration", "keyframe"):
            if getattr(columns, name)[:seen].tolist() != getattr(self, name).tolist():
                return None
        known = columns.shown[columns.shown < seen].tolist()
        return columns if self.shown.tolist() == known else None

    def scan(self, container: Any) -> _Columns:
        """What all packets tell, to the end of the file or to where it cannot be read on."""
        try:
            for packet in packets_of(container, self.stream):
                self._add(packet)
        except av.error.FFmpegError as error:
            self.error = error.strerror
        if self.first_picture is None:
            self._look(None)
        return _Columns(
            pts=np.array(self.pts, np.int64),
            dts=np.array(self.dts, np.int64),
            size=np.array(self.size, np.int64),
            duration=np.array(self.duration, np.int64),
            keyframe=np.array(self.keyframe, bool),
            shown=np.array(self.shown, np.int64),
        )

    def _add(self, packet: Any) -> None:
        if self.first_picture is None:
            self._look(packet)
        if not (packet.is_discard or is_hidden(self.stream, packet)):
            self.shown.append(len(self.size))
        pts, dts = packet.pts, packet.dts
        self.pts.append(NO_TIME if pts is None else pts)
        self.dts.append(self.pts[-1] if dts is None else dts)
        self.size.append(packet.size)
        self.duration.append(packet.duration or 0)
        gradual = packet.is_keyframe and is_gradual(self.stream, memoryview(packet))
        self.keyframe.append(packet.is_keyframe and not gradual)

    def _look(self, packet: Any) -> None:
        """Decode a packet; for None, at the end of the file, what the decoder holds back."""
        try:
            self.first_picture = next(iter(self.stream.codec_context.decode(packet)), None)
        except av.error.FFmpegError:
            return


def _build(
    container: Any, stream: Any, look: _Look, columns: _Columns, *, scanned: bool
) -> PacketIndex:
    pts, dts, shown, keyframe = columns.pts, columns.dts, columns.shown, columns.keyframe
    tick = float(stream.time_base)
    joinable = container.format.name in JOINABLE
    falls = _falls(pts, dts, keyframe, tick, joinable)
    era = np.cumsum(falls).astype(np.int64)
    everything = np.lexsort((pts, era))
    visible = np.zeros(len(pts), bool)
    visible[shown] = True
    in_turn = everything[visible[everything]]
    timed = _is_timed(container, stream, pts[in_turn], era[in_turn])

    everything = everything if timed else np.arange(len(pts))
    place = np.empty(len(pts), np.int64)
    place[everything] = np.arange(len(pts))
    order = shown[np.argsort(place[shown])]
    rate = float(stream.guessed_rate or stream.average_rate or 25)
    seconds, step = _seconds(pts[order], era[order], tick, rate)
    last = int(columns.duration[order[-1]]) * tick
    duration = float(seconds[-1]) + (last if timed and last > 0 else step)

    leaps = np.zeros(len(dts), bool)
    if joinable and len(dts) > 1:
        steps = np.diff(dts) * tick
        leaps[1:] = steps > max(10.0, 20 * float(np.median(steps)))
    width, height, rotation = geometry(stream, look.first_picture)
    info = VideoInfo(
        path=container.name,
        duration_seconds=duration,
        frame_count=len(order),
        average_fps=len(order) / duration,
        width=width,
        height=height,
        codec=stream.codec_context.name,
        container=container.format.name,
        has_audio=len(container.streams.audio) > 0,
        rotation=rotation,
        start_seconds=float(pts[order[0]] * tick) if pts[order[0]] != NO_TIME else 0.0,
    )
    return PacketIndex(
        info=info,
        pts=pts,
        dts=dts,
        size=columns.size,
        keyframe=keyframe,
        place=place,
        epoch=np.cumsum(falls | leaps),
        order=order,
        seconds=seconds,
        timed=timed,
        skippable=timed and is_skippable(stream),
        error=look.error,
        scanned=scanned,
    )


def _falls(pts: Ints, dts: Ints, keyframe: Bools, tick: float, joinable: bool) -> Bools:
    """`[P]` where the file's clock starts anew, at an earlier time.

    Elsewhere than in joined streams decode times may be guesses that waver. There the sign is a
    keyframe shown before pictures of the group before: no other than a new clock allows that.
    """
    if joinable:
        return np.diff(dts, prepend=dts[:1]) * tick < -1.0
    falls = np.zeros(len(pts), bool)
    starts = np.flatnonzero(keyframe)
    if len(starts) > 1:
        latest = np.maximum.reduceat(pts, starts)
        falls[starts[1:]] = (latest[:-1] - pts[starts[1:]]) * tick > 1.0
    return falls


def _is_timed(container: Any, stream: Any, pts: Ints, era: Ints) -> bool:
    """Whether every shown packet has a presentation time of its own; they come in that order."""
    codec, form = stream.codec_context.name, container.format.name
    if form in TIMELESS or (form in DECODE_TIMED and codec in {"h264", "hevc"}):
        return False
    twins = (pts[1:] == pts[:-1]) & (era[1:] == era[:-1])
    return bool((pts != NO_TIME).all() and not twins.any())


def _seconds(pts: Ints, era: Ints, tick: float, rate: float) -> tuple[NDArray[np.float64], float]:
    """Times `[N]` from 0, each era set after the one before; and the usual step, in seconds."""
    if (pts == NO_TIME).any():
        return np.arange(len(pts)) / rate, 1 / rate
    steps = np.diff(pts) * tick
    steps = steps[(np.diff(era) == 0) & (steps > 0)]
    step = float(np.median(steps)) if len(steps) else 1 / rate
    seconds = np.empty(len(pts))
    start = 0.0
    for number in np.unique(era):
        here = era == number
        ticks = np.sort(pts[here])
        seconds[here] = start + (ticks - ticks[0]) * tick
        start = float(seconds[here][-1]) + step
    return seconds, step
