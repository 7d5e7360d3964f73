"""Indexing a file of any kind that has frames: videos by FFmpeg, pictures by Pillow."""

import os

from tokenprune.errors import MediaError
from tokenprune.media.index import build
from tokenprune.media.index.container import check_file
from tokenprune.media.index.index import PacketIndex, VideoInfo
from tokenprune.media.index.source import References, Rendering
from tokenprune.media.kinds import HEAD_BYTES, is_media

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

    Of an animated picture all frames are decoded once, for their times; a still picture is a video
    of one frame.

    Args:
        path: a local file.
        scan: demux all packets even if the file has a table of them.
        stream: see `VideoReader`.
        references: see `VideoReader`.
        rendering: see `VideoReader`.

    Raises:
        MediaError: the file is missing, empty, not media, without video, or without frames.
    """
    if may_be_picture(path):
        from tokenprune.media.animation import index_pictures

        pictures = index_pictures(path)
        if pictures is not None:
            if stream not in (None, 0):
                raise MediaError(
                    f"{os.fspath(path)!r} is a picture: it has no stream {stream}; leave it out"
                )
            return pictures
    return build.index_video(
        path, scan=scan, stream=stream, references=references, rendering=rendering
    )


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Say what a video file holds, by its packet index.

    Raises:
        MediaError: as `index_video`.
    """
    return index_video(path).info


def may_be_picture(path: str | os.PathLike[str]) -> bool:
    """Whether Pillow is to be asked about a file; surely not for most videos."""
    check_file(path)
    try:
        with open(path, "rb") as file:
            return not is_media(file.read(HEAD_BYTES))
    except OSError:  # FFmpeg says it better
        return False
