"""Reading a file as a model can use it: frames of a video, an image, or audio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tokenprune.errors import DecodeError, MediaError, NoVideoStreamError, first_line
from tokenprune.media import Video, probe, read_audio, read_video
from tokenprune.media.index.container import check_file
from tokenprune.models.media import Media
from tokenprune.models.processors import SAMPLING_RATE, frame_size

if TYPE_CHECKING:
    from tokenprune.models.loaded import LoadedModel

__all__ = ["check_watchable", "read_media"]


def read_media(
    path: str | Path,
    loaded: LoadedModel,
    *,
    frames: int | None = None,
    fps: float | None = None,
    sound: bool = True,
    reader: Callable[..., Video] = read_video,
) -> Media:
    """Read a file as the model can use it: frames of a video, an image, or audio.

    Args:
        path: A local file.
        loaded: The model.
        frames: How many frames of a video, evenly spread; 64 if `fps` is not given either.
        fps: Frames per second of a video.
        sound: Whether a model that takes video and audio is given a video's sound track as well.
        reader: What reads videos, with the arguments `frames`, `fps` and `size` of `read_video`.

    Raises:
        MediaError: The file cannot be read, or holds nothing the model understands.
    """
    check_file(path)
    picture = _read_image(Path(path))
    if picture is not None:
        return Media(picture[None])
    takes_audio = "audio" in loaded.adapter.modalities
    takes_frames = set(loaded.adapter.modalities) - {"audio"}
    if not takes_frames:
        return _audio_alone(path)
    size = frame_size(loaded.processor)
    try:
        video = reader(path, frames=frames, fps=fps, size=size)
    except NoVideoStreamError:
        if not takes_audio:
            raise
        return _audio_alone(path)
    track = None
    if takes_audio and sound and video.info.has_audio:
        track = _read_audio(path, video.info.start_seconds)
    audio = track if track is not None and len(track) else None
    return Media(video.frames, video=video, audio=audio, sized=size is not None)


def check_watchable(path: str | Path, loaded: LoadedModel, *, sound: bool = True) -> None:
    """Check that nothing of a file is lost if its frames are watched in groups.

    Args:
        path: A local file.
        loaded: The model.
        sound: Whether the model is to be given the sound track as well.

    Raises:
        MediaError: It is no video, or has a sound track that the model would be given.
    """
    check_file(path)
    if _read_image(Path(path)) is not None:
        raise MediaError(f"{str(path)!r} is an image: it has no groups of frames; leave out group")
    if "audio" in loaded.adapter.modalities and sound and probe(path).has_audio:
        raise MediaError(
            f"{loaded.name} would hear the sound track of {str(path)!r}, but frames that come in "
            "groups are only watched; leave out the sound, or group"
        )


def _audio_alone(path: str | Path) -> Media:
    return Media(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), audio=_read_audio(path))


def _read_audio(path: str | Path, start_seconds: float | None = None) -> Tensor:
    return read_audio(path, sampling_rate=SAMPLING_RATE, start_seconds=start_seconds)


def _read_image(path: Path) -> Tensor | None:
    """The picture in a file, `[3, H, W]` uint8; None if it is no image file."""
    try:
        picture = Image.open(path)
    except (UnidentifiedImageError, OSError):
        return None  # the media reader says what is wrong with the file
    with picture:
        if getattr(picture, "n_frames", 1) > 1 or picture.format == "MPEG":
            return None
        try:
            rgb = ImageOps.exif_transpose(picture).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise DecodeError(
                f"cannot read {str(path)!r} as an image: {first_line(error)}; give an image that "
                "other programs open"
            ) from error
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous()
