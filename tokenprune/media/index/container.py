"""Opening media files with FFmpeg, and properties of its streams and packets.

PyAV is imported where it is used: the command line checks paths before it loads anything heavy.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenprune.errors import DecodeError, MediaError
from tokenprune.media.index.references import check_references, open_arguments
from tokenprune.media.index.source import References, Source
from tokenprune.media.index.streams import video_stream

__all__ = [
    "check_file",
    "is_hidden",
    "is_skippable",
    "open_media",
    "open_video",
    "packets_of",
]


@contextmanager
def open_media(path: str | os.PathLike[str], references: References | None = None) -> Iterator[Any]:
    """Open a file with PyAV; every failure is a `MediaError` that names the file.

    Args:
        path: a local file.
        references: which other files it may refer to.
    """
    import av

    name = os.fspath(path)
    check_file(name)
    demuxer = check_references(name, references)
    with open_arguments(name, demuxer, references) as arguments:
        try:
            container = av.open(_no_protocol(name), metadata_errors="replace", **arguments)
        except MediaError:
            raise
        except (av.error.FFmpegError, OSError) as error:
            refused = error.errno == errno.EINVAL  # the content or the name is of none allowed
            reason = "it is of no format that is read here" if refused else error.strerror
            raise DecodeError(
                f"cannot read {name!r} as media: {reason}; give a video, an image or a sound"
            ) from error
        try:
            if container.format.name == "tty":  # FFmpeg renders plain text as a video
                raise DecodeError(f"{name!r} is a text file; give a media file")
            yield container
        finally:
            container.close()


def _no_protocol(name: str) -> str:
    """A path in which FFmpeg takes no colon for the end of a protocol's name, as in `http:`."""
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


@contextmanager
def open_video(path: str | os.PathLike[str], source: Source) -> Iterator[tuple[Any, Any]]:
    """Open a file, and give its container and the video stream that is to be read."""
    with open_media(path, source.references) as container:
        yield container, video_stream(container, source.stream)


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """Demux the packets of a stream, from where the file stands to its end."""
    try:
        yield from (packet for packet in container.demux(stream) if packet.size)
    except IndexError:  # PyAV's, at the end, where streams appeared that no header announced
        return


def is_hidden(stream: Any, packet: Any) -> bool:
    """Whether a packet is never shown: VP8 marks alternate reference frames in their data only."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def is_skippable(stream: Any) -> bool:
    """Whether frames marked as non-reference truly serve no other one.

    Not so in HEVC with temporal sub-layers, where such a frame may serve a higher sub-layer; the
    stream's header (hvcC) tells their number. VP9 and AV1 hand on probabilities from any frame.
    """
    name = stream.codec_context.name
    if name == "hevc":
        hvcc = stream.codec_context.extradata or b""
        return len(hvcc) > 21 and hvcc[0] == 1 and hvcc[21] >> 3 & 7 == 1  # numTemporalLayers
    return name in {"h264", "mpeg4", "mpeg2video", "mpeg1video", "vp8"}
