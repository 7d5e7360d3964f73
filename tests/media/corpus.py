"""Hard files: more codecs, containers and oddities than `clips.KINDS`, each frame still numbered.

Each builder takes a folder and a number of frames, so that the same file can be made short or long.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from tests.media.clips import OPEN, X265, Clip, draw, encode, x264

Picture = NDArray[np.uint8]
Build = Callable[[Path, int], Clip]

BFRAMES = "keyint=24:bframes=3:b-pyramid=2"
VPX = {"g": "24", "deadline": "realtime", "cpu-used": "8"}
ALTREF = {**VPX, "auto-alt-ref": "1", "lag-in-frames": "12"}
SVT = {"preset": "12", "g": "24", "svtav1-params": "lp=1"}


def _kind(name: str, codec: str = "libx264", **settings: Any) -> Build:
    """A clip of a codec in a file of that name; `settings` are those of `encode`."""

    def build(folder: Path, count: int) -> Clip:
        return encode(folder / name, codec, numbers=range(count), **settings)

    return build


def _h264(name: str, text: str = BFRAMES, **settings: Any) -> Build:
    return _kind(name, options=x264(text), **settings)


def _h265(name: str, text: str = "keyint=24:bframes=3", **settings: Any) -> Build:
    return _kind(name, "libx265", options={"x265-params": X265 + text}, **settings)


def _odd(picture: Picture) -> Picture:
    """Sides that no block of a codec divides."""
    return np.pad(picture, ((0, 1), (0, 1), (0, 0)), "edge")


def _smaller(picture: Picture) -> Picture:
    return _scaled(picture, 96, 56)


def _scaled(picture: Picture, width: int, height: int) -> Picture:
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    scaled = VideoReformatter().reformat(frame, width=width, height=height, interpolation="AREA")
    return scaled.to_ndarray()


def _joined(
    folder: Path, count: int, *, name: str, codec: str = "libx264", change: dict[str, Any]
) -> Clip:
    """Two files end to end, as `cat` joins them; `change` is what is different in the second."""
    settings: dict[str, Any] = {"options": x264("keyint=12:bframes=3")}
    if codec != "libx264":
        settings = {"bframes": 2, "options": {"g": "12", "qscale": "3"}}
    numbers = range(1000, 1000 + count)
    first = encode(folder / f"a{name}", codec, numbers=range(count), **settings)
    second = encode(folder / f"b{name}", codec, numbers=numbers, **{**settings, **change})
    path = folder / name
    path.write_bytes(first.path.read_bytes() + second.path.read_bytes())
    return Clip(path, [*first.numbers, *second.numbers])


def remux(
    source: Path,
    target: Path,
    change: Callable[[int, Any], bool] = lambda number, packet: True,
    mux: dict[str, str] | None = None,
) -> None:
    """Copy the packets of a video that `change` accepts; it may also change their times."""
    with (
        av.open(str(source)) as old,
        av.open(str(target), "w", options={"fflags": "+bitexact", **(mux or {})}) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            if change(number, packet):
                packet.stream = stream
                new.mux(packet)


def _spliced(folder: Path, count: int, *, name: str, codec: str, options: dict[str, str]) -> Clip:
    """One stream whose pictures change their size in the middle."""
    form = Path(name).suffix
    first = encode(folder / f"a{form}", codec, numbers=range(count), options=options)
    second = encode(
        folder / f"b{form}",
        codec,
        numbers=range(count, 2 * count),
        options=options,
        turn=_smaller,
    )
    path = folder / name
    with (
        av.open(str(first.path)) as one,
        av.open(str(second.path)) as two,
        av.open(str(path), "w") as both,
    ):
        stream = both.add_stream_from_template(one.streams.video[0])
        for part, source in enumerate((one, two)):
            for packet in source.demux(video=0):
                if packet.size:
                    later = round(part * count / 30 / packet.time_base)
                    packet.pts, packet.dts = packet.pts + later, packet.dts + later
                    packet.stream = stream
                    both.mux(packet)
    return Clip(path, first.numbers + second.numbers)


def _twins(folder: Path, count: int) -> Clip:
    """Frames in pairs of the same time: times tell no frame from its twin."""
    plain = encode(folder / "plain.mkv", numbers=range(count), options=x264("keyint=24:bframes=0"))

    def pair(number: int, packet: Any) -> bool:
        packet.pts = packet.dts = number // 2 * 66
        return True

    remux(plain.path, folder / "twins.mkv", pair)
    return Clip(folder / "twins.mkv", plain.numbers)


def _late_start(folder: Path, count: int) -> Clip:
    """The first keyframe is lost, as in a recording of a broadcast; nothing before the second
    can be decoded."""
    plain = encode(folder / "plain.ts", numbers=range(count), options=x264("keyint=24:bframes=0"))
    remux(plain.path, folder / "late.ts", lambda number, packet: number >= 24)
    return Clip(folder / "late.ts", plain.numbers[24:])


def _beside_a_cover(folder: Path, count: int) -> Clip:
    """A cover picture comes before the video."""
    plain = encode(folder / "plain.mp4", numbers=range(count), options=x264(BFRAMES))
    path = folder / "cover.mp4"
    with av.open(str(plain.path)) as old, av.open(str(path), "w") as new:
        cover = new.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 192, 112, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = new.add_stream_from_template(old.streams.video[0])
        new.mux(cover.encode(av.VideoFrame.from_ndarray(draw(999), format="rgb24")))
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    return Clip(path, plain.numbers)


def _two_videos(folder: Path, count: int) -> Clip:
    """Two video tracks, their packets in turn; the first is the video."""
    parts = [
        encode(folder / f"{n}.mp4", numbers=range(n, n + count), options=x264(BFRAMES))
        for n in (0, 5000)
    ]
    path = folder / "two.mkv"
    with (
        av.open(str(parts[0].path)) as one,
        av.open(str(parts[1].path)) as two,
        av.open(str(path), "w") as both,
    ):
        streams = [both.add_stream_from_template(part.streams.video[0]) for part in (one, two)]
        for pair in zip(one.demux(video=0), two.demux(video=0), strict=True):
            for stream, packet in zip(streams, pair, strict=True):
                if packet.size:
                    packet.stream = stream
                    both.mux(packet)
    return Clip(path, parts[0].numbers)


def _turned(degrees: int) -> Build:
    """Stored turned; the container's matrix tells players to turn it clockwise by `degrees`."""
    matrices = {
        90: [0, 1, 0, -1, 0, 0],
        180: [-1, 0, 0, 0, -1, 0],
    }

    def build(folder: Path, count: int) -> Clip:
        clip = encode(
            folder / f"{degrees}.mov",
            numbers=range(count),
            options=x264(BFRAMES),
            turn=lambda picture: np.rot90(picture, degrees // 90),
        )
        content = bytearray(clip.path.read_bytes())
        start = content.index(b"tkhd") + 4 + 40
        for cell, value in enumerate([*matrices[degrees], 0, 0]):
            here = start + 4 * cell
            content[here : here + 4] = (value << 16).to_bytes(4, "big", signed=True)
        clip.path.write_bytes(content)
        return clip

    return build


def _edits(folder: Path, count: int, *, parts: Sequence[tuple[int, int]], name: str) -> Clip:
    """An edit list of several parts: ranges of frames, shown one after the other.

    The table of the file lies at its end, so it can grow without moving a picture.
    """
    clip = encode(folder / name, numbers=range(count), options=x264("keyint=12:bframes=2"))
    content = bytearray(clip.path.read_bytes())
    entry = content.index(b"elst") + 12
    shift = int.from_bytes(content[entry + 4 : entry + 8], "big")  # of the first frame shown
    entries = b"".join(
        round((last - first) * 1000 / 30).to_bytes(4, "big")
        + (shift + first * 512).to_bytes(4, "big")
        + b"\0\1\0\0"
        for first, last in parts
    )
    content[entry - 4 : entry + 12] = len(parts).to_bytes(4, "big") + entries
    grown = len(entries) - 12
    for box in (b"elst", b"edts", b"trak", b"moov"):
        at = content.index(box) - 4
        size = int.from_bytes(content[at : at + 4], "big") + grown
        content[at : at + 4] = size.to_bytes(4, "big")
    clip.path.write_bytes(content)
    return Clip(clip.path, [number for first, last in parts for number in range(first, last)])


CORPUS: dict[str, Build] = {
    # H.264 in its kinds
    "h264_intra_refresh_mp4": _h264("refresh.mp4", "intra-refresh=1:keyint=20:bframes=0"),
    "h264_444": _h264("444.mp4", pixels="yuv444p"),
    "h264_422_10bit": _h264("422.mp4", pixels="yuv422p10le"),
    "h264_grey": _h264("grey.mp4", pixels="gray"),
    "h264_odd_sides": _h264("odd.mp4", pixels="yuv444p", turn=_odd),
    "h264_lossless": _h264("lossless.mp4", BFRAMES + ":qp=0", pixels="yuv444p"),
    "h264_wide_pixels": _h264("sar.mp4", BFRAMES + ":sar=4/3"),
    "h264_slices": _h264("slices.mp4", BFRAMES + ":slices=4"),
    "h264_bottom_field_first": _h264("bff.mp4", "bff=1:keyint=24:bframes=2"),
    "h264_many_references": _h264("refs.mp4", "keyint=48:bframes=8:ref=8:b-pyramid=2:b-adapt=0"),
    "h264_open_gop_one_in_two": _h264("o2.mkv", "open-gop=1:keyint=6:min-keyint=2:bframes=4"),
    # rates and clocks
    "h264_ntsc": _h264("ntsc.mp4", rate=Fraction(30000, 1001)),
    "h264_120_a_second": _h264("120.mkv", rate=120),
    "h264_one_a_second": _h264("1fps.mp4", rate=1),
    "h264_ts_offset_5": _h264("5.ts", OPEN, mux={"output_ts_offset": "5"}),
    "h264_mkv_offset": _h264("5.mkv", OPEN, mux={"output_ts_offset": "5"}),
    "h264_mp4_offset": _h264("5.mp4", OPEN, mux={"output_ts_offset": "5"}),
    "h264_ts_clock_forward": partial(
        _joined, name="forward.ts", change={"mux": {"output_ts_offset": "5000"}}
    ),
    "h264_ts_other_size": partial(_joined, name="size.ts", change={"turn": _smaller}),
    "mpeg2_ps_joined": partial(_joined, name="joined.mpg", codec="mpeg2video", change={}),
    "h264_twin_times": _twins,
    "h264_late_start": _late_start,
    # edit lists
    "h264_end_cut_by_edit": partial(_edits, parts=[(0, 31)], name="end.mp4"),
    "h264_both_ends_cut": partial(_edits, parts=[(17, 50)], name="ends.mp4"),
    "h264_edits_leave_a_gap": partial(_edits, parts=[(5, 20), (41, 60)], name="gap.mp4"),
    # containers of H.264
    "h264_mov": _h264("plain.mov"),
    "h264_table_first": _h264("front.mp4", mux={"movflags": "faststart"}),
    "h264_negative_offsets": _h264("cts.mp4", mux={"movflags": "negative_cts_offsets"}),
    "h264_fragment_each_frame": _h264(
        "frames.mp4", mux={"movflags": "frag_every_frame+empty_moov+default_base_moof"}
    ),
    "h264_dash_segments": _h264("dash.mp4", mux={"movflags": "dash+frag_keyframe"}),
    "h264_3gp": _h264("plain.3gp"),
    "h264_flv": _h264("plain.flv"),
    "h264_m2ts": _h264("plain.m2ts", OPEN, mux={"mpegts_m2ts_mode": "1"}),
    "h264_ts_sound": _h264("sound.ts", OPEN, sound=True),
    "h264_mkv_no_cues": _h264("pipe.mkv", OPEN, form="matroska", pipe=True),
    "h264_mkv_short_clusters": _h264("clusters.mkv", OPEN, mux={"cluster_time_limit": "100"}),
    "h264_nut": _h264("plain.nut"),
    "h264_asf": _h264("plain.asf"),
    "h264_beside_a_cover": _beside_a_cover,
    "h264_two_videos": _two_videos,
    "h264_turned_90": _turned(90),
    "h264_turned_180": _turned(180),
    # HEVC
    "hevc_hashed": _h265("hash.mp4", "keyint=24:bframes=3:hash=1"),
    "hevc_hashed_open_gop": _h265("hash.mkv", "keyint=18:min-keyint=18:bframes=4:hash=1"),
    "hevc_raw": _h265("raw.h265", form="hevc"),
    "hevc_ts": _h265("plain.ts", "keyint=18:min-keyint=18:bframes=4"),
    "hevc_one_keyframe": _h265("one.mp4", "keyint=-1:bframes=4:scenecut=0"),
    "hevc_all_intra": _h265("intra.mp4", "keyint=1"),
    "hevc_444_12bit": _h265("444.mkv", pixels="yuv444p12le"),
    "hevc_odd_sides": _h265("odd.mp4", pixels="yuv444p", turn=_odd),
    "hevc_layers_ts": _h265("layers.ts", "keyint=24:bframes=3:temporal-layers=3:b-pyramid=1"),
    # VP8, VP9, AV1
    "vp8_alt_ref": _kind("alt.webm", "libvpx", options=ALTREF),
    "vp8_ivf": _kind("v8.ivf", "libvpx", options=VPX),
    "vp8_other_size": partial(_spliced, name="size.webm", codec="libvpx", options=VPX),
    "vp9_mp4": _kind("v9.mp4", "libvpx-vp9", options=ALTREF),
    "vp9_ivf": _kind("v9.ivf", "libvpx-vp9", options=ALTREF),
    "vp9_no_cues": _kind("v9.webm", "libvpx-vp9", options=ALTREF, form="webm", pipe=True),
    "vp9_odd_sides": _kind("odd.webm", "libvpx-vp9", options=VPX, turn=_odd),
    "vp9_444": _kind("444.webm", "libvpx-vp9", options={**VPX, "profile": "1"}, pixels="yuv444p"),
    "vp9_other_size": partial(_spliced, name="size.webm", codec="libvpx-vp9", options=VPX),
    "av1_webm": _kind("a.webm", "libsvtav1", options=SVT),
    "av1_ivf": _kind("a.ivf", "libsvtav1", options=SVT),
    "av1_raw": _kind("a.obu", "libsvtav1", options=SVT),
    "av1_10bit": _kind("10.mkv", "libsvtav1", options=SVT, pixels="yuv420p10le"),
    # older codecs
    "mpeg1_raw": _kind("1.m1v", "mpeg1video", bframes=2, options={"g": "15", "qscale": "3"}),
    "mpeg1_ps": _kind("1.mpg", "mpeg1video", bframes=2, options={"g": "15", "qscale": "3"}),
    "mpeg2_ts_interlaced": _kind(
        "2.ts",
        "mpeg2video",
        bframes=2,
        options={"g": "15", "b": "2M", "flags": "+ildct+ilme", "top": "1"},
    ),
    "mpeg2_closed_mxf": _kind("2.mxf", "mpeg2video", options={"g": "1", "qscale": "3"}, rate=25),
    "mpeg4_3gp": _kind("4.3gp", "mpeg4", options={"g": "20", "qscale": "3"}),
    "mpeg4_raw": _kind("4.m4v", "mpeg4", bframes=2, options={"g": "20", "qscale": "3"}),
    "msmpeg4_avi": _kind("ms.avi", "msmpeg4v2", options={"g": "20", "qscale": "3"}),
    "wmv2_asf": _kind("w.wmv", "wmv2", options={"g": "20", "qscale": "3"}),
    "flv1_flv": _kind("f.flv", "flv", options={"g": "20", "qscale": "3"}),
    "rv20_rm": _kind("r.rm", "rv20", options={"g": "20", "qscale": "3"}),
    # every picture for itself
    "mjpeg_mov": _kind("j.mov", "mjpeg", pixels="yuvj420p"),
    "mjpeg_raw": _kind("j.mjpeg", "mjpeg", pixels="yuvj420p"),
    "prores_mov": _kind("p.mov", "prores_ks", pixels="yuv422p10le"),
    "ffv1_mkv": _kind("f.mkv", "ffv1"),
    "utvideo_avi": _kind("u.avi", "utvideo"),
    "huffyuv_avi": _kind("h.avi", "huffyuv", pixels="yuv422p"),
    "png_mov": _kind("p.mov", "png", pixels="rgb24"),
    "raw_avi": _kind("raw.avi", "rawvideo"),
    "y4m": _kind("y.y4m", "wrapped_avframe", form="yuv4mpegpipe"),
    "gif": _kind("g.gif", "gif", pixels="rgb8", rate=10),
    "apng": _kind("a.apng", "apng", pixels="rgb24"),
    "ffv1_checked": _kind("c.mkv", "ffv1", options={"level": "3", "slicecrc": "1", "g": "12"}),
    "mpeg4_asf": _kind("4.asf", "mpeg4", bframes=2, options={"g": "20", "qscale": "3"}),
    "qtrle_mov": _kind("q.mov", "qtrle", pixels="rgb24"),
}
