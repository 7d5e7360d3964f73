"""The packet index: for each packet of a video stream its times, size, and place in the order.

Frame i of a video is the i-th shown packet in presentation order (by PTS), whatever the container
declares about counts, duration or rate.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokenprune.media.index.source import Source
from tokenprune.media.index.streams import StreamInfo

__all__ = ["NO_PTS", "Bools", "Hdr", "Ints", "PacketIndex", "VideoInfo", "hdr_transfer"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NO_PTS = -(1 << 62)  # stands for a missing timestamp
Hdr = Literal["pq", "hlg"]
_HDR: dict[int, Hdr] = {16: "pq", 18: "hlg"}  # by transfer characteristics in ITU-T H.273
DEMUXER_DELAY = 2  # packets that a demuxer may hold back


def hdr_transfer(frame: Any) -> Hdr | None:
    """The transfer of a PyAV frame of high dynamic range; None for other frames."""
    return _HDR.get(int(frame.color_trc))


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Attributes:
        path: the file.
        duration_seconds: from the first frame to the end of the last one.
        frame_count: number of shown frames, counted, not declared.
        average_fps: `frame_count / duration_seconds`.
        width: pixels of a row as displayed: turned upright, and of square pixels.
        height: pixels of a column as displayed.
        codec: name of the video decoder, such as `h264`.
        container: FFmpeg's name of the file format, such as `mov,mp4,m4a,3gp,3g2,mj2`.
        has_audio: whether there is an audio track.
        rotation: degrees by which coded frames are turned counterclockwise: 0, 90, 180, 270.
        start_seconds: PTS of the first frame, in seconds of the file's own clock; all other times
            of this package count from that frame.
        mirrored: whether coded frames are mirrored, left to right, before they are turned.
        stored_width: pixels of a row as coded.
        stored_height: pixels of a column as coded.
        pixel_aspect: width of a coded pixel by its height.
        stream: number of the stream that is read, among the file's video streams.
        streams: all video and audio streams of the file.
        interlaced: whether frames are flagged as interlaced.
        hdr: "pq" or "hlg" where frames are of high dynamic range, by that transfer; else None.
        clock_fps: the rate by which the time of each frame is a whole number, to a millisecond or
            two: the average, where frames come evenly; 1000 where they do not. None: the average.
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
    mirrored: bool = False
    stored_width: int = 0
    stored_height: int = 0
    pixel_aspect: float = 1.0
    stream: int = 0
    streams: tuple[StreamInfo, ...] = ()
    interlaced: bool = False
    hdr: Hdr | None = None
    clock_fps: float | None = None

    @property
    def clock(self) -> tuple[float, int]:
        """The rate by which frames are timed, and how many frames of that rate the video lasts."""
        if self.clock_fps is None:
            return self.average_fps, self.frame_count
        return self.clock_fps, max(1, round(self.duration_seconds * self.clock_fps))


@dataclass(frozen=True, eq=False, repr=False)
class PacketIndex:
    """All packets of a file's video stream, in decode order.

    `P` packets, `N` frames shown. A *place* numbers all packets in presentation order, those that
    are never shown (cut away by an edit list, or hidden) included; a *rank* numbers the shown ones.

    Attributes:
        info: what the file holds.
        pts: `[P]` presentation timestamp, in ticks of the stream's time base.
        dts: `[P]` decode timestamp, in ticks.
        size: `[P]` bytes.
        keyframe: `[P]` whether decoding can begin there: an IDR frame or other true random access
            point. A round of intra refresh is none, though the file marks it as a keyframe.
        place: `[P]` position in presentation order.
        epoch: `[P]` grows at each discontinuity of the timestamps; no frame refers across one.
        order: `[N]` rank to packet.
        seconds: `[N]` presentation time by rank, from 0.
        timed: whether timestamps identify frames; otherwise they are counted from the start.
        skippable: whether leaving out non-reference frames is known to be exact.
        error: why the scan ended before the end of the file, or None.
        scanned: whether all packets were demuxed; otherwise the file's own sample table was
            believed, and each packet is compared with it when it is decoded.
        source: which stream this is, and how its frames are to look.
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
    source: Source = Source()

    def __repr__(self) -> str:
        info = self.info
        return f"PacketIndex({info.path!r}, frames={info.frame_count}, packets={len(self.pts)})"

    @cached_property
    def starts(self) -> Ints:
        """`[G]` first packets of the GOPs: the keyframes, and the first packet of all."""
        starts = np.flatnonzero(self.keyframe)
        return starts if len(starts) and starts[0] == 0 else np.concatenate([[0], starts])

    @cached_property
    def by_place(self) -> Ints:
        """`[P]` place to packet."""
        return np.argsort(self.place)

    @cached_property
    def by_pts(self) -> Ints:
        """`[P]` packets by their PTS."""
        return np.argsort(self.pts, kind="stable")

    @cached_property
    def offsets(self) -> Ints:
        """`[P + 1]` bytes of all packets before each."""
        return np.concatenate([[0], np.cumsum(self.size)])

    @property
    def deinterlaces(self) -> bool:
        """Whether its frames are to be deinterlaced."""
        return self.info.interlaced and self.source.rendering.deinterlace

    @property
    def seekable(self) -> bool:
        """Whether a timestamp names one point of the file."""
        return self.timed and int(self.epoch[-1]) == 0

    def times_of(self, ranks: Ints) -> Ints:
        """PTS of frames, in ticks."""
        return self.pts[self.order[ranks]]

    def may_flag_intact(self, packet: int) -> bool:
        """Whether the demuxer may call this packet corrupt though nothing is missing.

        That is so in the segments of a playlist, whose continuity counters may start anew, and
        where the timestamps break right after it. Where two transport streams are joined, their
        continuity counters seldom fit, and the demuxer flags the packets it holds at that moment as
        corrupt, though nothing is missing. What is really cut off there still fails in the decoder.
        """
        if self.info.container == "hls":
            return True
        after = min(packet + DEMUXER_DELAY, len(self.epoch) - 1)
        return bool(self.epoch[after] != self.epoch[packet])
