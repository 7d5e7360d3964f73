"""Opening media files, and what FFmpeg's streams and packets tell about themselves."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av

from tokenprune.errors import DecodeError, MediaError, NoVideoStreamError


@contextmanager
def open_media(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a file with PyAV; every failure is a `MediaError` that names the file."""
    name = os.fspath(path)
    check_file(name)
    try:
        container = av.open(_no_protocol(name), metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        raise DecodeError(
            f"cannot read {name!r} as media: {error.strerror}; give a video, an image or a sound"
        ) from error
    try:
        if container.format.name == "tty":  # FFmpeg renders plain text as a video
            raise DecodeError(f"{name!r} is a text file; give a media file")
        yield container
    finally:
        container.close()


def _no_protocol(name: str) -> str:
    """A name in which no colon can be taken for the end of a protocol's name."""
    return os.path.join(os.curdir, name) if ":" in name and not os.path.isabs(name) else name


def check_file(path: str | os.PathLike[str]) -> None:
    """Check that there is a file with something in it.

    Raises:
        MediaError: there is none, or it is empty.
    """
    name = os.fspath(path)
    if not Path(name).exists():
        raise MediaError(f"no such file: {name!r}; give the path of a local media file")
    if not Path(name).is_file():
        raise MediaError(f"{name!r} is not a file; give the path of a local media file")
    if Path(name).stat().st_size == 0:
        raise DecodeError(f"{name!r} is empty; give a media file")


def video_stream(container: Any) -> Any:
    """The first video stream that is not a cover picture.

    Raises:
        NoVideoStreamError: there is none.
        DecodeError: FFmpeg has no decoder for it.
    """
    covers = 0
    for stream in container.streams.video:
        if stream.disposition & av.stream.Disposition.attached_pic:
            covers += 1
        elif stream.codec_context is None:
            raise DecodeError(
                f"{container.name!r}: no decoder for its video stream; convert it, to H.264 say"
            )
        else:
            if stream.codec_context.name == "hevc":  # else it hides what its own hashes tell
                stream.codec_context.options = {"err_detect": "crccheck+explode"}
            return stream
    what = "only a cover picture" if covers else "only sound" if container.streams.audio else "none"
    raise NoVideoStreamError(f"{container.name!r} has no video stream ({what}); give a video file")


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream from where the file stands to its end."""
    try:
        yield from (packet for packet in container.demux(stream) if packet.size)
    except IndexError:  # PyAV's, at the end, where streams appeared that the file did not announce
        return


def is_hidden(stream: Any, packet: Any) -> bool:
    """Whether a packet is never shown: VP8 stores pictures that only serve others unmarked."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def geometry(stream: Any, picture: Any) -> tuple[int, int, int]:
    """Displayed width and height, and the turn, from the first picture if it could be decoded."""
    if picture is None:
        return stream.codec_context.width, stream.codec_context.height, 0
    rotation = round(picture.rotation / 90) % 4 * 90
    if rotation in (90, 270):
        return picture.height, picture.width, rotation
    return picture.width, picture.height, rotation


def is_skippable(stream: Any) -> bool:
    """Whether pictures marked as unreferred truly serve no other one.

    Not so in HEVC with temporal layers, where such a picture may serve a higher layer; the
    stream's header (hvcC) tells their number. VP9 and AV1 hand on probabilities from any picture.
    """
    name = stream.codec_context.name
    if name == "hevc":
        header = stream.codec_context.extradata or b""
        return len(header) > 21 and header[0] == 1 and header[21] >> 3 & 7 == 1
    return name in {"h264", "mpeg4", "mpeg2video", "mpeg1video", "vp8"}
