"""Pictures in files: opening and reading them with Pillow."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenprune.errors import DecodeError, MediaError, first_line
from tokenprune.media.colours import WHITE, Background, parse_background, to_rgb
from tokenprune.media.index.container import check_file
from tokenprune.media.kinds import (
    HEAD_BYTES,
    check_kind,
    check_readable,
    is_avif,
    is_heic,
    is_media,
    is_mjpeg,
)
from tokenprune.media.limits import check_pixels

__all__ = ["is_animated", "left_out", "open_picture", "picture_tensor", "read_picture", "reading"]

NOT_OPENED = {"MPEG", "EPS", "WMF"}  # no picture; drawings that need other programs to be drawn
TIMED = {"AVIF", "FLI", "GIF", "PNG", "WEBP"}  # of which several are a video
SUBFILE, DNG_VERSION = 254, 50706  # tags of TIFF
VIEWS = {"CUR", "ICNS", "ICO", "PSD"}  # whose several are one picture in sizes or layers


def read_picture(path: str | os.PathLike[str], *, background: Background = WHITE) -> Tensor | None:
    """The picture in a file, upright, `[3, H, W]` uint8; None if it is a video or a sound.

    What is transparent shows the background. Pictures of more than 8 bits are scaled by their
    depth. `tokenprune.media.kinds` says which files are pictures.

    Args:
        path: a local file.
        background: what is laid under what is transparent.

    Raises:
        MediaError: the file cannot be read, is larger than the limits, or holds values of which
            nobody knows how bright they are.

    Warns:
        UserWarning: the file holds more pictures, which are left out.
    """
    colour = parse_background(background)
    with open_picture(path) as picture:
        if picture is None or is_animated(picture):
            return None
        with reading(path):
            rgb = to_rgb(picture, colour)
        more = left_out(picture)
    if more:
        warnings.warn(
            f"{os.fspath(path)!r} holds {more + 1} pictures; the first is used, and {more} left"
            " out",
            stacklevel=2,
        )
    return picture_tensor(rgb)


def picture_tensor(rgb: Image.Image) -> Tensor:
    """A picture of mode RGB as `[3, H, W]` uint8."""
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within, whatever a damaged picture makes Pillow raise is a `DecodeError`."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise DecodeError(
            f"cannot read {os.fspath(path)!r} as an image: {first_line(error)}; give an image that"
            " other programs open"
        ) from error


@contextmanager
def open_picture(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a picture; nothing of it is decoded yet. None if the file is for FFmpeg.

    Yields:
        Pillow's picture, or a `HeifPicture`.

    Raises:
        MediaError: it is no media file, a broken picture, or one that is larger than the limits.
    """
    name = os.fspath(path)
    check_file(name)
    try:
        file = open(name, "rb")  # noqa: SIM115
    except OSError as error:
        raise DecodeError(f"cannot read {name!r}: {error.strerror}") from error
    with file:
        head = file.read(HEAD_BYTES)
        check_kind(name, head)
        picture = None if is_media(head) else _open(name, file, head)
        if picture is not None:
            check_pixels(name, *picture.size)
        yield picture


def _open(name: str, file: IO[bytes], head: bytes) -> Any:
    """Ask each of Pillow's formats; `Image.open` would check sizes by limits that are not ours."""
    failed = ""
    for load in (Image.preinit, Image.init):
        load()
        for form in [form for form in Image.ID if form not in NOT_OPENED]:
            factory, accept = Image.OPEN[form]
            accepted: bool | str = False
            try:
                accepted = True if accept is None else accept(head[:16])
                if isinstance(accepted, str) or not accepted:
                    failed = accepted or failed
                    continue
                file.seek(0)
                picture: Image.Image = factory(file, name)
            except Exception as no:  # Pillow raises many kinds, of tiny files too
                if accept is not None and accepted:
                    failed = f"{form}: {first_line(no)}"
                continue
            if picture.format == "JPEG" and _is_row(file):
                return None
            if getattr(picture, "rawmode", "") == "RGBX" and is_animated(picture):
                # WebP: the frames have no alpha, but what none of them covers is transparent.
                picture.rawmode = picture._mode = "RGBA"  # type: ignore[attr-defined]
            if picture.format == "TIFF":
                _check_developed(name, head, picture)
            return picture
    if is_heic(head) or (is_avif(head) and "AVIF" not in Image.OPEN):  # before Pillow 11.3
        from tokenprune.media.heif import HeifPicture

        file.seek(0)
        return HeifPicture(name, file.read())
    if failed and _is_surely_a_picture(head):
        raise DecodeError(
            f"cannot read {name!r} as an image: {failed}; give an image that other programs open"
        )
    check_readable(name, head)
    return None


def _check_developed(name: str, head: bytes, picture: Any) -> None:
    """Check that a TIFF is no raw photograph: what Pillow finds there is a small preview.

    Raises:
        MediaError: it is one.
    """
    tags = picture.tag_v2
    if head[8:10] == b"CR" or DNG_VERSION in tags or int(tags.get(SUBFILE, 0)) & 1:
        raise MediaError(
            f"{name!r} is a camera's raw photograph, of which only a preview could be read; develop"
            " it, and give it as JPEG or PNG"
        )


def _is_row(file: IO[bytes]) -> bool:
    file.seek(0)
    row = is_mjpeg(file.read())
    file.seek(0)
    return row


def _is_surely_a_picture(head: bytes) -> bool:
    magics = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\x00", b"MM\x00*", b"BM", b"8BPS", b"qoif")
    brands = (b"avif", b"avis", b"jp2 ")
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return head.startswith(magics) or webp or (head[4:8] == b"ftyp" and head[8:12] in brands)


def is_animated(picture: Any) -> bool:
    """Whether the pictures of a file have times of their own."""
    return picture.format in TIMED and frame_count(picture) > 1


def left_out(picture: Any) -> int:
    """How many pictures of a file are not shown: pages, or others beside the first."""
    return 0 if picture.format in VIEWS | TIMED else frame_count(picture) - 1


def frame_count(picture: Any) -> int:
    """Pictures in a file; of an APNG without the one for programs that do not know APNG."""
    try:
        count = int(getattr(picture, "n_frames", 1))
    except Exception:  # what lies behind the first picture is damaged
        return 1
    return count - bool(picture.info.get("default_image") and count > 1)
