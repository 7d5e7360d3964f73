"""Reading a file as a model can use it: frames of a video, an image, or audio."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.errors import MediaError, NoVideoStreamError
from tokenprune.media import Video, probe, read_audio, read_video
from tokenprune.media.colours import WHITE, Background
from tokenprune.media.kinds import is_still_container
from tokenprune.media.limits import check_sound, current_limits
from tokenprune.media.local import Fetch, MediaSource, local_file
from tokenprune.media.stills import read_picture
from tokenprune.models.media import Media
from tokenprune.models.processors import SAMPLING_RATE, frame_size

if TYPE_CHECKING:
    from tokenprune.models.loaded import LoadedModel

__all__ = ["check_watchable", "read_media"]


def read_media(
    path: MediaSource,
    loaded: LoadedModel,
    *,
    frames: int | None = None,
    fps: float | None = None,
    sound: bool = True,
    background: Background = WHITE,
    fetch: Fetch | None = None,
    reader: Callable[..., Video] | None = None,
) -> Media:
    """Read a file as the model can use it: frames of a video, an image, or audio.

    Args:
        path: A local file, by its path or a `file:` URI; or what it holds, as a `data:` URI, bytes
            or a file opened to read them. `tokenprune.media.kinds` says what counts as a picture,
            and what as a video.
        loaded: The model.
        frames: How many frames of a video, evenly spread; 64 if `fps` is not given either.
        fps: Frames per second of a video.
        sound: Whether a model that takes video and audio is given a video's sound track as well.
        background: What is laid under what is transparent in a picture.
        fetch: Gets what a URL names: its bytes, or the path where it was saved. Without it URLs are
            refused.
        reader: What reads videos, with the arguments `frames`, `fps` and `size` of `read_video`,
            which it is by default.

    Raises:
        MediaError: The file cannot be read, holds nothing the model understands, or is larger than
            `tokenprune.media.Limits`.

    Warns:
        UserWarning: The file holds several pictures, of which only the first is used.
    """
    with local_file(path, fetch) as file:
        picture = read_picture(file, background=background)
        if picture is not None:
            return Media(picture[None])
        chosen = partial(read_video, background=background) if reader is None else reader
        return _read_clip(file, loaded, partial(chosen, frames=frames, fps=fps), sound)


def _read_clip(path: str, loaded: LoadedModel, reader: Callable[..., Video], sound: bool) -> Media:
    """A video, or sound, as the model can use it."""
    takes_audio = "audio" in loaded.adapter.modalities
    takes_frames = set(loaded.adapter.modalities) - {"audio"}
    if not takes_frames:
        return _audio_alone(path)
    size = frame_size(loaded.processor)
    try:
        video = reader(path, size=size)
    except NoVideoStreamError:
        if not takes_audio:
            raise
        return _audio_alone(path)
    if len(video) == 1 and is_still_container(video.info.container):
        return Media(reader(path, size=None).frames)
    track = None
    if takes_audio and sound and video.info.has_audio:
        track = _read_audio(path, video.info.start_seconds)
    audio = track if track is not None and len(track) else None
    return Media(video.frames, video=video, audio=audio, sized=size is not None)


def check_watchable(path: MediaSource, loaded: LoadedModel, *, sound: bool = True) -> None:
    """Check that nothing of a file is lost if its frames are watched in groups.

    Args:
        path: A local file, or what it holds.
        loaded: The model.
        sound: Whether the model is to be given the sound track as well.

    Raises:
        MediaError: It is no video, or has a sound track that the model would be given.
    """
    with local_file(path) as file:
        if read_picture(file) is not None:
            raise MediaError(f"{file!r} is an image: it has no groups of frames; leave out group")
        if "audio" in loaded.adapter.modalities and sound and probe(file).has_audio:
            raise MediaError(
                f"{loaded.name} would hear the sound track of {file!r}, but frames that come in "
                "groups are only watched; leave out the sound, or group"
            )


def _audio_alone(path: str) -> Media:
    return Media(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), audio=_read_audio(path))


def _read_audio(path: str, start_seconds: float | None = None) -> Tensor:
    most = current_limits().sound_seconds
    samples = read_audio(
        path,
        sampling_rate=SAMPLING_RATE,
        start_seconds=start_seconds,
        end=None if math.isinf(most) else most + 1,  # a second more tells whether that is all
    )
    check_sound(path, len(samples) / SAMPLING_RATE)
    return samples
