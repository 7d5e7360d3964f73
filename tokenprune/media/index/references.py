"""Files that refer to others: playlists, manifests, scripts, and movies whose data lies elsewhere.

Whoever takes uploads would show files that nobody gave. So such files are refused, by what they
begin with and by what FFmpeg may open them as; and where they are allowed, each file that they name
has to lie below their own folder. No protocol is opened but plain files.
"""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from tokenprune.errors import DecodeError
from tokenprune.media.index.source import References, check_allowed

__all__ = ["check_references", "open_arguments"]

_HEAD_BYTES = 4096
_LARGEST_TEXT = 16 << 20  # bytes of a playlist or script
_REFERRING = {  # demuxers that open files, or connections, which the file names or implies
    "applehttp",
    "avisynth",
    "concat",
    "dash",
    "hls",
    "image2",
    "imf",
    "lavfi",
    "mlv",
    "rtp",
    "rtsp",
    "sap",
    "sdp",
    "vapoursynth",
    "vobsub",
    "webm_dash_manifest",
}
_KINDS = (  # beginnings; what such a file is; the demuxer that can be held to a folder
    (b"#EXTM3U", "an HLS playlist", "hls"),
    (b"ffconcat version", "an ffconcat script", "concat"),
    (b"v=0", "a description of a network stream (SDP)", None),
    (b"[playlist]", "a playlist", None),
    (b"[Reference]", "a playlist", None),
    (b"rtsp://", "a playlist", None),
    (b"RTSPtext", "a playlist", None),
    (b"# VobSub index file", "an index of subtitles in another file", None),
    (b"MLVI", "a recording that may go on in other files (MLV)", None),
)
_ELEMENTS = (
    (b"<MPD", "a DASH manifest"),
    (b"<CompositionPlaylist", "an IMF playlist"),
    (b"<SmoothStreamingMedia", "a Smooth Streaming manifest"),
    (b"<smil", "a SMIL playlist"),
    (b"<asx", "a playlist"),
)


def check_references(path: str, references: References | None) -> str | None:
    """Check what a file begins with, before FFmpeg opens it.

    Returns:
        The demuxer of a file that refers to others and may do so; None for other files.

    Raises:
        MediaError: it may not.
    """
    check_allowed(references)
    with open(path, "rb") as file:
        found = _kind(file.read(_HEAD_BYTES))
    if found is None:
        return None
    what, demuxer = found
    if demuxer is None or references is None:
        allow = "" if demuxer is None else ', or allow those in its folder with references="folder"'
        raise DecodeError(
            f"cannot read {path!r}: it is {what}, which refers to other files; give the media file "
            f"itself{allow}"
        )
    if demuxer == "concat":
        _check_script(Path(path))
    return demuxer


@contextmanager
def open_arguments(
    path: str, demuxer: str | None, references: References | None
) -> Iterator[dict[str, Any]]:
    """The arguments with which PyAV opens a file so that it reads no others, or those allowed.

    Args:
        path: the file.
        demuxer: as `check_references` tells.
        references: what is allowed.
    """
    # An image2 name such as %d.png would stand for other files.
    options = {"protocol_whitelist": "file", "format_whitelist": _formats(demuxer)}
    if references is None:
        yield {"options": options}
        return
    guard = _Guard(Path(path).parent)
    try:
        yield {"options": {**options, "enable_drefs": "1"}, "io_open": guard}
    finally:
        guard.close()


@cache
def _formats(demuxer: str | None) -> str:
    """Names of all demuxers that read one file alone, and of the one allowed beside them."""
    import av

    return ",".join(sorted((av.formats_available - _REFERRING) | ({demuxer} if demuxer else set())))


def _kind(head: bytes) -> tuple[str, str | None] | None:
    """What a file is that refers to others, and its demuxer if it can be held to a folder."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, what, demuxer in _KINDS:
        if text.startswith(start):
            return what, demuxer
    if text.startswith(b"<"):
        for element, what in _ELEMENTS:
            if element.lower() in text.lower():
                return what, None
    return None


class _Guard:
    """Opens files for FFmpeg: plain ones in a folder and below. PyAV leaves them open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: list[BinaryIO] = []

    def __call__(self, name: str, flags: int, options: object) -> BinaryIO:
        path = Path(name.removeprefix("file:"))
        _check_below(path, self._folder, name)
        file = path.open("rb")
        self._opened = [*(one for one in self._opened if not one.closed), file]
        if _kind(file.read(_HEAD_BYTES)) == ("an HLS playlist", "hls"):
            _check_ends(path)
        file.seek(0)
        return file

    def close(self) -> None:
        for file in self._opened:
            file.close()


def _check_below(path: Path, folder: Path, name: str) -> None:
    """Check that a file that is referred to lies in a folder or below, links resolved."""
    root, real = folder.resolve(), path.resolve()
    if root not in real.parents or not real.is_file():
        why = "lies outside its folder" if real.exists() else "is not there"
        raise DecodeError(
            f"a file in {os.fspath(folder)!r} refers to {name!r}, which {why}; only plain files in "
            "its folder and below are read"
        )


def _check_ends(path: Path) -> None:
    """Check that a playlist is no live one: FFmpeg would wait for more of it."""
    text = _text(path)
    if "#EXTINF" in text and "#EXT-X-ENDLIST" not in text:
        raise DecodeError(
            f"{os.fspath(path)!r} is a playlist without an end (#EXT-X-ENDLIST), of a live stream; "
            "give one that is complete"
        )


def _check_script(path: Path) -> None:
    """Check the files that an ffconcat script names; FFmpeg opens them without asking."""
    for line in _text(path).splitlines():
        try:
            words = shlex.split(line)
        except ValueError:
            words = ["file", line]
        if words[:1] == ["file"]:
            named = path.parent / " ".join(words[1:2])
            _check_below(named, path.parent, str(named))
            with named.open("rb") as file:
                found = _kind(file.read(_HEAD_BYTES))
            if found is not None:
                raise DecodeError(
                    f"{os.fspath(path)!r} refers to {str(named)!r}, which is {found[0]} itself; "
                    "name media files only"
                )


def _text(path: Path) -> str:
    if path.stat().st_size > _LARGEST_TEXT:
        raise DecodeError(
            f"{os.fspath(path)!r} is a playlist of more than {_LARGEST_TEXT >> 20} MiB; give the "
            "media file itself"
        )
    return path.read_bytes().decode("utf-8", "replace")
