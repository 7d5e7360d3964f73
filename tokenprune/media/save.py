"""Writing decoded frames to files, group by group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenprune.errors import MediaError
from tokenprune.media.index.streams import StreamInfo
from tokenprune.media.reader import VideoReader
from tokenprune.media.sampling import Size
from tokenprune.media.video import Video

__all__ = ["DecodeSummary", "decode_to"]

MOST_NAMED = 20  # damaged frames in a text


@dataclass(frozen=True)
class DecodeSummary:
    """What was decoded of a file.

    Attributes:
        file: the video.
        frames: how many.
        height: of a frame.
        width: of a frame.
        indices: presentation rank of each.
        pts_seconds: PTS of each, from the video's first frame.
        damaged: how many are substitutes.
        damaged_indices: presentation rank of those.
        pictures_decoded: frames that came out of the decoders, those not asked for included.
        bytes_read: bytes of packets that were read for them.
        index_seconds: time spent on the index.
        decode_seconds: time waited for frames.
        out: where they were written, if anywhere.
        stream: number of the stream they are of, among the file's video streams.
        streams: all video and audio streams of the file.
        displayed: height and width of the video, upright and of square pixels.
        stored: height and width of a coded frame.
    """

    file: str
    frames: int
    height: int
    width: int
    indices: list[int]
    pts_seconds: list[float]
    damaged: int
    damaged_indices: list[int]
    pictures_decoded: int
    bytes_read: int
    index_seconds: float
    decode_seconds: float
    out: str | None
    stream: int
    streams: tuple[StreamInfo, ...]
    displayed: tuple[int, int]
    stored: tuple[int, int]

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        times = f"{self.pts_seconds[0]:.3f} to {self.pts_seconds[-1]:.3f} s"
        lines = [
            f"frames    {self.frames} of {self.height}x{self.width}, {times}",
            f"damaged   {self._damaged_text()}",
            f"decoded   {self.pictures_decoded} pictures from {self.bytes_read:,} bytes",
            f"seconds   index {self.index_seconds:.3f}, decoding {self.decode_seconds:.3f}",
        ]
        if self.stored != self.displayed:
            lines[0] += ", stored as {}x{}".format(*self.stored)
        if sum(one.kind == "video" for one in self.streams) > 1:
            lines.append("stream    " + "; ".join(map(str, self._ordered())))
        return "\n".join([*lines, f"out       {self.out}"] if self.out else lines)

    def _ordered(self) -> list[StreamInfo]:
        """Video streams, the one that was decoded first."""
        videos = [one for one in self.streams if one.kind == "video"]
        return sorted(videos, key=lambda one: one.number != self.stream)

    def _damaged_text(self) -> str:
        if not self.damaged:
            return "0"
        named = ", ".join(map(str, self.damaged_indices[:MOST_NAMED]))
        more = ", ..." if self.damaged > MOST_NAMED else ""
        return f"{self.damaged}, frames {named}{more}"


def decode_to(
    reader: VideoReader,
    out: Path | None,
    *,
    frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    size: Size = None,
) -> DecodeSummary:
    """Decode frames of a video and write them.

    Args:
        reader: the video.
        out: an `.npy` file for one array `[F, 3, H, W]`, uint8; or a folder for a PNG of each
            frame, named by its rank; None decodes only.
        frames: how many; see `read_video`.
        fps: how many a second, instead.
        start: seconds where the range begins.
        end: seconds where it ends.
        size: height and width.

    Raises:
        MediaError: the file cannot be decoded, or `out` cannot be written.
    """
    groups = reader.stream(group=8, frames=frames, fps=fps, start=start, end=end, size=size)
    parts: list[Video] = []
    try:
        with _sink(out) as write:
            for group in groups:
                write(group)
                parts.append(_without_frames(group))
    except OSError as error:
        raise MediaError(f"cannot write to {str(out)!r}: {error.strerror or error}") from error
    last = parts[-1]
    return DecodeSummary(
        file=reader.info.path,
        frames=sum(map(len, parts)),
        height=last.frames.shape[2],
        width=last.frames.shape[3],
        indices=[rank for part in parts for rank in part.indices.tolist()],
        pts_seconds=[time for part in parts for time in part.pts_seconds.tolist()],
        damaged=sum(part.damaged for part in parts),
        damaged_indices=[r for part in parts for r in part.indices[part.substituted].tolist()],
        pictures_decoded=last.pictures_decoded,
        bytes_read=last.bytes_read,
        index_seconds=reader.index_seconds,
        decode_seconds=sum(part.timings.decode_seconds for part in parts),
        out=None if out is None else str(out),
        stream=reader.info.stream,
        streams=reader.info.streams,
        displayed=(reader.info.height, reader.info.width),
        stored=(reader.info.stored_height, reader.info.stored_width),
    )


def _without_frames(group: Video) -> Video:
    """The group with frames that have a shape, but take no memory."""
    blank = group.frames.new_zeros(1).expand(group.frames.shape)
    return Video(**(vars(group) | {"frames": blank}))


@contextmanager
def _sink(out: Path | None) -> Iterator[Any]:
    if out is None:
        yield lambda group: None
    elif out.suffix == ".npy":
        with _array(out) as write:
            yield write
    else:
        out.mkdir(parents=True, exist_ok=True)
        yield lambda group: _save_images(group, out)


def _save_images(group: Video, folder: Path) -> None:
    for rank, frame in zip(group.indices.tolist(), group.frames, strict=True):
        image = Image.fromarray(frame.permute(1, 2, 0).numpy())
        image.save(folder / f"{rank:08d}.png")


@contextmanager
def _array(out: Path) -> Iterator[Any]:
    """Write an array whose length is known at its end; a failure leaves no file."""
    part = out.with_name(f".{out.name}.{os.getpid()}")
    shape: list[int] = [0]
    try:
        with part.open("wb+") as file:

            def write(group: Video) -> None:
                if shape == [0]:
                    shape[1:] = group.frames.shape[1:]
                    _write_header(file, shape)
                shape[0] += len(group)
                file.write(group.frames.numpy().tobytes())

            yield write
            file.seek(0)
            _write_header(file, shape)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _write_header(file: Any, shape: list[int]) -> None:
    """Write the header of an `.npy` file. NumPy pads it, so that a longer shape fits later."""
    kind = np.lib.format.dtype_to_descr(np.dtype(np.uint8))
    header = {"descr": kind, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, header)
