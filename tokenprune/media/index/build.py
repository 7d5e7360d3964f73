"""Building the packet index, from an MP4's sample table or by demuxing the whole file."""

import os
from dataclasses import replace
from typing import Any

import numpy as np

from tokenprune.errors import DecodeError
from tokenprune.media.index.clock import (
    clock_jumps,
    clock_rate,
    clock_resets,
    frame_seconds,
    is_timed,
    usual_step,
)
from tokenprune.media.index.container import is_skippable, open_video
from tokenprune.media.index.geometry import geometry
from tokenprune.media.index.index import (
    NO_PTS,
    Bools,
    Ints,
    PacketIndex,
    VideoInfo,
    hdr_transfer,
)
from tokenprune.media.index.mp4 import check_data_is_here, sample_table
from tokenprune.media.index.scan import Columns, PacketScan
from tokenprune.media.index.source import References, Rendering, Source
from tokenprune.media.index.streams import list_streams

__all__ = ["index_video", "probe"]


def index_video(
    path: str | os.PathLike[str],
    *,
    scan: bool = False,
    stream: int | None = None,
    references: References | None = None,
    rendering: Rendering | None = None,
) -> PacketIndex:
    """Index the packets of a video file; only its first frame is decoded, for size and rotation.

    Args:
        path: a local file.
        scan: demux all packets even if the file has a table of them.
        stream: see `VideoReader`.
        references: see `VideoReader`.
        rendering: see `VideoReader`.

    Raises:
        MediaError: the file is missing, empty, not media, without video, or without frames.
    """
    return _index(path, Source(stream, references, rendering or Rendering()), scan=scan)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Say what a video file holds, by its packet index.

    Raises:
        MediaError: as `index_video`.
    """
    return index_video(path).info


def _index(path: str | os.PathLike[str], source: Source, *, scan: bool) -> PacketIndex:
    with open_video(path, source) as (container, stream):
        if source.references is None:
            check_data_is_here(container, stream)
        table = None if scan or source.references else sample_table(container.name, stream)
        packets = PacketScan(stream)
        columns = packets.read_all(container) if table is None else packets.check(container, table)
        if columns is None:
            return _index(path, source, scan=True)
        if not len(columns.shown):
            raise DecodeError(f"{container.name!r} has a video stream but no frames in it")
        index = _build(container, stream, packets, columns, source, scanned=table is None)
    if not index.info.width or not index.info.height:
        raise DecodeError(
            f"{index.info.path!r}: no frame of its video can be decoded; convert it, to H.264 say"
        )
    return index


def _build(
    container: Any,
    stream: Any,
    packets: PacketScan,
    columns: Columns,
    source: Source,
    *,
    scanned: bool,
) -> PacketIndex:
    pts, dts, shown, keyframe = columns.pts, columns.dts, columns.shown, columns.keyframe
    tick, form = float(stream.time_base), container.format.name
    resets = clock_resets(pts, dts, keyframe, tick, form)
    section = _count(resets)  # [P]
    # [P] place to packet; one key is sorted much faster than two
    by_time = np.lexsort((pts, section)) if section[-1] else np.argsort(pts, kind="stable")
    visible = np.zeros(len(pts), bool)
    visible[shown] = True
    shown_by_time = by_time[visible[by_time]]  # [N]
    timed = is_timed(container, stream, pts[shown_by_time], section[shown_by_time])

    by_place = by_time if timed else np.arange(len(pts))
    place = np.empty(len(pts), np.int64)
    place[by_place] = np.arange(len(pts))
    order = shown_by_time if timed else shown  # [N] rank to packet
    rate = float(stream.guessed_rate or stream.average_rate or 25)
    times = pts[order], section[order], tick, rate
    seconds = frame_seconds(*times)
    last = int(columns.duration[order[-1]]) * tick
    duration = float(seconds[-1]) + (last if timed and last > 0 else usual_step(*times))

    first = packets.first_frame
    sizes = geometry(stream, first, source.rendering.aspect)
    number = list(container.streams.video).index(stream)
    info = VideoInfo(
        path=container.name,
        duration_seconds=duration,
        frame_count=len(order),
        average_fps=len(order) / duration,
        width=sizes.width,
        height=sizes.height,
        codec=stream.codec_context.name,
        container=form,
        has_audio=len(container.streams.audio) > 0,
        rotation=sizes.orientation.rotation,
        start_seconds=float(pts[order[0]] * tick) if pts[order[0]] != NO_PTS else 0.0,
        mirrored=sizes.orientation.mirrored,
        stored_width=sizes.stored_width,
        stored_height=sizes.stored_height,
        pixel_aspect=sizes.pixel_aspect,
        stream=number,
        streams=list_streams(container),
        interlaced=first is not None and bool(first.interlaced_frame),
        clock_fps=clock_rate(seconds, len(order) / duration),
        hdr=None if first is None else hdr_transfer(first),
    )
    return PacketIndex(
        info=info,
        pts=pts,
        dts=dts,
        size=columns.size,
        keyframe=keyframe,
        place=place,
        epoch=_count(resets | clock_jumps(dts, tick, form)),
        order=order,
        seconds=seconds,
        timed=timed,
        skippable=timed and is_skippable(stream),
        error=packets.error,
        scanned=scanned,
        source=replace(source, stream=number),
    )


def _count(marks: Bools) -> Ints:
    """`[P]` how many marks there are up to each; most files have none."""
    return np.cumsum(marks).astype(np.int64) if marks.any() else np.zeros(len(marks), np.int64)
