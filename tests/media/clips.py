"""Short clips, encoded here, whose every frame carries its number as a bar code.

24 cells along the top edge: white, black, 20 bits of the number (low first), even parity, black.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder: errors only

WIDTH, HEIGHT, CELL, BAR = 192, 112, 8, 16


@dataclass(frozen=True)
class Clip:
    """A file and the numbers of its frames, in order of presentation."""

    path: Path
    numbers: list[int]


def draw(number: int) -> NDArray[np.uint8]:
    """Frame `[H, W, 3]`: a scene that changes every 20 frames, a moving square, grain, the code."""
    random = np.random.default_rng(number)
    base = np.random.default_rng(number // 20).integers(60, 190, 3)
    picture = np.empty((HEIGHT, WIDTH, 3), np.float64)
    picture[:] = base + np.linspace(-30, 30, WIDTH)[None, :, None]
    x = number * 5 % (WIDTH - 24)
    picture[50:74, x : x + 24] = 255 - base
    picture += random.normal(0, 4, picture.shape)
    bits = [number >> bit & 1 for bit in range(20)]
    for cell, bit in enumerate([1, 0, *bits, sum(bits) % 2, 0]):
        picture[:BAR, cell * CELL : (cell + 1) * CELL] = 235 if bit else 20
    return picture.clip(0, 255).astype(np.uint8)


def read_number(picture: NDArray[np.uint8]) -> int:
    """The number on a frame `[3, H, W]` of any size; -1 if it cannot be read."""
    height, width = picture.shape[1:]
    row = round(BAR / 2 * height / HEIGHT)
    columns = ((np.arange(24) + 0.5) * width / 24).astype(int)
    values = picture[1, row, columns].astype(int)
    if values[0] - values[1] < 60:
        return -1
    bits = values > (values[0] + values[1]) / 2
    number = sum(1 << bit for bit in range(20) if bits[2 + bit])
    return number if sum(bits[2:22]) % 2 == bits[22] and not bits[23] else -1


def encode(
    path: Path,
    codec: str = "libx264",
    *,
    numbers: Sequence[int] = tuple(range(72)),
    options: dict[str, str] | None = None,
    mux: dict[str, str] | None = None,
    form: str | None = None,
    pixels: str = "yuv420p",
    times: Sequence[int] | None = None,
    bframes: int | None = None,
    turn: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
    sound: bool = False,
    rate: Fraction | int = 30,
    pipe: bool = False,
) -> Clip:
    """Write a clip at `rate` frames a second, or with `times` in milliseconds.

    Args:
        turn: changes each picture before it is encoded.
        pipe: write as into a pipe, where a muxer cannot go back to complete its tables.
    """
    reformatter = VideoReformatter()
    options_of_file = {"fflags": "+bitexact", **(mux or {})}  # the same bytes each time
    target = Pipe(path) if pipe else str(path)
    with av.open(target, "w", format=form, options=options_of_file) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        first = turn(draw(0)) if turn else draw(0)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 1
        if bframes is not None:
            stream.codec_context.max_b_frames = bframes
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        track = container.add_stream("aac", rate=48000, layout="stereo") if sound else None
        for position, number in enumerate(numbers):
            picture = turn(draw(number)) if turn else draw(number)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = reformatter.reformat(frame, format=pixels, threads=1)
            frame.pts = position if times is None else times[position]
            frame.time_base = 1 / Fraction(rate) if times is None else Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
        if track is not None:
            write_tone(container, track, float(len(numbers) / rate))
    if isinstance(target, Pipe):
        target.close()
    return Clip(path, list(numbers))


class Pipe:
    """A file that can only be written on and on."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)

    def write(self, content: bytes) -> int:
        return self._file.write(content)

    def close(self) -> None:
        self._file.close()


def write_tone(container: object, track: object, seconds: float, hertz: float = 440.0) -> None:
    """A sine of amplitude 0.5 on the left, silence on the right."""
    count = round(seconds * 48000)
    left = 0.5 * np.sin(2 * np.pi * hertz * np.arange(count) / 48000)
    samples = np.stack([left, np.zeros(count)]).astype(np.float32)
    for start in range(0, count, 1024):
        part = np.ascontiguousarray(samples[:, start : start + 1024])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 48000, start
        for packet in track.encode(frame):
            container.mux(packet)
    for packet in track.encode():
        container.mux(packet)


def x264(text: str) -> dict[str, str]:
    return {"preset": "veryfast", "x264-params": f"threads=1:{text}"}


def decode_sequentially(
    path: Path, size: tuple[int, int] | None = None, *, deinterlace: bool = False
) -> NDArray[np.uint8]:
    """Every frame `[N, 3, H, W]` by the plainest loop: one thread, from the first packet on."""
    pictures = []
    graph = None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                continue
            if deinterlace:
                graph = graph or _deinterlacer(stream)
                frames = _through(graph, [*frames] if packet.size else [*frames, None])
            for frame in frames:
                height, width = size or (frame.height, frame.width)
                planar = frame.reformat(
                    width=width, height=height, format="gbrp", interpolation="BILINEAR"
                )
                planes = [
                    np.frombuffer(p, np.uint8).reshape(-1, p.line_size) for p in planar.planes
                ]
                green, blue, red = (plane[:height, :width] for plane in planes)
                pictures.append(np.stack([red, green, blue]))
    return np.stack(pictures)


def _deinterlacer(stream: object) -> av.filter.Graph:
    graph = av.filter.Graph()
    nodes = [
        graph.add_buffer(template=stream, time_base=Fraction(1, 1000)),
        graph.add("bwdif", "send_frame:auto:interlaced"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    return graph


def _through(graph: av.filter.Graph, frames: Sequence[object]) -> list[av.VideoFrame]:
    """What comes out of a filter now; None ends it."""
    found = []
    for frame in frames:
        graph.vpush(frame)
        try:
            while True:
                found.append(graph.vpull())
        except (av.error.BlockingIOError, av.error.EOFError):
            pass
    return found


def make(name: str, folder: Path) -> Clip:
    """Encode the clip of that name."""
    return KINDS[name](folder)


def _joined(folder: Path) -> Clip:
    """Two transport streams end to end: the clock falls back in the middle."""
    first = encode(folder / "a.ts", numbers=range(48), options=x264("keyint=12:bframes=3"))
    second = encode(folder / "b.ts", numbers=range(100, 148), options=x264("keyint=12:bframes=3"))
    path = folder / "joined.ts"
    path.write_bytes(first.path.read_bytes() + second.path.read_bytes())
    return Clip(path, [*first.numbers, *second.numbers])


def _edited(folder: Path) -> Clip:
    """An edit list that cuts the first 17 frames away (its media time is moved on)."""
    clip = encode(folder / "edited.mp4", options=x264("keyint=24:bframes=2"))
    content = bytearray(clip.path.read_bytes())
    entry = content.index(b"elst") + 12  # version, count; then duration, media time, rate
    tick = 512  # of a frame, in a track of 15360 ticks a second
    duration = int.from_bytes(content[entry : entry + 4], "big")
    media_time = int.from_bytes(content[entry + 4 : entry + 8], "big") + 17 * tick
    content[entry : entry + 4] = (duration - 17 * 1000 // 30).to_bytes(4, "big")
    content[entry + 4 : entry + 8] = media_time.to_bytes(4, "big")
    clip.path.write_bytes(content)
    return Clip(clip.path, clip.numbers[17:])


def _rotated(folder: Path) -> Clip:
    """Stored lying on its left side; the container says: turn it 90 degrees clockwise."""
    clip = encode(
        folder / "rotated.mp4",
        options=x264("keyint=24:bframes=2"),
        turn=lambda picture: np.rot90(picture, 1),
    )
    content = bytearray(clip.path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    one = 1 << 16
    for cell, value in enumerate([0, one, 0, -one, 0, 0, 0, 0, 1 << 30]):
        here = matrix + 4 * cell
        content[here : here + 4] = value.to_bytes(4, "big", signed=True)
    clip.path.write_bytes(content)
    return clip


def _hidden(folder: Path) -> Clip:
    """Every tenth picture is stored, but marked in its first byte as not to be shown."""
    clip = KINDS["vp8"](folder)
    path = folder / "hidden.webm"
    with (
        av.open(str(clip.path)) as source,
        av.open(str(path), "w", options={"fflags": "+bitexact"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if not packet.size:
                continue
            content = bytearray(bytes(packet))
            if number % 10 == 5:
                content[0] &= ~0x10
            copy = av.Packet(bytes(content))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            target.mux(copy)
    return Clip(path, [number for number in clip.numbers if number % 10 != 5])


def _uneven(folder: Path, name: str) -> Clip:
    steps = np.random.default_rng(5).choice([10, 20, 40, 130, 700], 72)
    times = (np.cumsum(steps) - steps[0]).tolist()
    return encode(folder / name, options=x264("keyint=20:bframes=3"), times=times)


OPEN = "open-gop=1:keyint=18:min-keyint=18:bframes=3:b-pyramid=2:scenecut=0"
X265 = "log-level=none:pools=none:frame-threads=1:"
KINDS: dict[str, Callable[[Path], Clip]] = {
    "h264_bframes": lambda d: encode(d / "b.mp4", options=x264("keyint=24:bframes=3")),
    "h264_sound": lambda d: encode(d / "s.mp4", options=x264("keyint=24:bframes=3"), sound=True),
    "h264_open_gop": lambda d: encode(d / "o.mp4", options=x264(OPEN)),
    "h264_no_bframes": lambda d: encode(d / "n.mp4", options=x264("keyint=24:bframes=0")),
    "h264_all_intra": lambda d: encode(d / "i.mp4", options=x264("keyint=1")),
    "h264_one_keyframe": lambda d: encode(
        d / "k.mp4", options=x264("keyint=infinite:scenecut=0:bframes=3")
    ),
    "h264_intra_refresh": lambda d: encode(
        d / "r.ts", options=x264("intra-refresh=1:keyint=20:bframes=0")
    ),
    "h264_fragmented": lambda d: encode(
        d / "f.mp4", options=x264(OPEN), mux={"movflags": "frag_keyframe+empty_moov"}
    ),
    "h264_mkv": lambda d: encode(d / "m.mkv", options=x264(OPEN)),
    "h264_ts_offset": lambda d: encode(
        d / "t.ts", options=x264(OPEN), mux={"output_ts_offset": "1000"}
    ),
    "h264_ts_wrap": lambda d: encode(
        d / "w.ts", options=x264(OPEN), mux={"output_ts_offset": "95441.5"}
    ),
    "h264_ts_joined": _joined,
    "h264_avi": lambda d: encode(d / "h.avi", options=x264("keyint=24:bframes=2")),
    "h264_raw": lambda d: encode(d / "raw.h264", options=x264("keyint=24:bframes=2"), form="h264"),
    "h264_edit_list": _edited,
    "h264_rotated": _rotated,
    "h264_uneven": lambda d: _uneven(d, "u.mp4"),
    "h264_uneven_mkv": lambda d: _uneven(d, "u.mkv"),
    "h264_one_frame": lambda d: encode(d / "1.mp4", numbers=[7], options=x264("bframes=2")),
    "h264_interlaced": lambda d: encode(d / "tff.ts", options=x264("tff=1:keyint=24:bframes=2")),
    "hevc": lambda d: encode(
        d / "h.mp4", "libx265", options={"x265-params": X265 + "keyint=24:bframes=3:open-gop=0"}
    ),
    "hevc_open_gop_mkv": lambda d: encode(
        d / "h.mkv", "libx265", options={"x265-params": X265 + "keyint=18:min-keyint=18:bframes=4"}
    ),
    "hevc_layers": lambda d: encode(
        d / "l.mp4",
        "libx265",
        options={"x265-params": X265 + "keyint=24:bframes=3:temporal-layers=3:b-pyramid=1"},
    ),
    "hevc_10bit_ts": lambda d: encode(
        d / "h.ts", "libx265", pixels="yuv420p10le", options={"x265-params": X265 + "keyint=24"}
    ),
    "vp9": lambda d: encode(
        d / "v.webm",
        "libvpx-vp9",
        options={
            "g": "24",
            "deadline": "realtime",
            "cpu-used": "6",
            "auto-alt-ref": "1",
            "lag-in-frames": "12",
        },
    ),
    "vp8": lambda d: encode(
        d / "v8.webm", "libvpx", options={"g": "24", "deadline": "realtime", "cpu-used": "6"}
    ),
    "vp8_hidden": _hidden,
    "av1": lambda d: encode(
        d / "a.mp4", "libsvtav1", options={"preset": "12", "g": "24", "svtav1-params": "lp=1"}
    ),
    "mpeg4": lambda d: encode(d / "4.mp4", "mpeg4", bframes=2, options={"g": "20", "qscale": "3"}),
    "mpeg4_avi": lambda d: encode(
        d / "4.avi", "mpeg4", bframes=2, options={"g": "20", "qscale": "3"}
    ),
    "mpeg2_ps": lambda d: encode(
        d / "2.mpg", "mpeg2video", bframes=2, options={"g": "15", "b": "2M"}
    ),
    "mjpeg_avi": lambda d: encode(d / "j.avi", "mjpeg", pixels="yuvj420p", numbers=range(30)),
}
