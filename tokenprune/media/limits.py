"""Limits to what is read: they are checked before memory is taken for it.

A few bytes can claim to be a picture that no memory holds. Limits are those of `Limits`, or of the
environment: `TOKENPRUNE_MAX_PIXELS`, `TOKENPRUNE_MAX_FRAMES`, `TOKENPRUNE_MAX_CLIP_BYTES` and
`TOKENPRUNE_MAX_SOUND_SECONDS`; `with use_limits(Limits(...))` sets others for a while.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields

from tokenprune.errors import MediaError
from tokenprune.media.numbers import parse_number, parse_whole

__all__ = [
    "Limits",
    "check_clip",
    "check_frames",
    "check_pixels",
    "check_sound",
    "current_limits",
    "use_limits",
]

PREFIX = "TOKENPRUNE_MAX_"


@dataclass(frozen=True)
class Limits:
    """The largest things that are read.

    Attributes:
        pixels: of a picture, or of a frame of a video: 134 million.
        frames: of one request, and of an animated picture: 131,072, or 36 hours at one a second.
        clip_bytes: of the frames that one `read` returns: 32 GiB. Streams are not bound by it.
        sound_seconds: of a sound track that is read as a whole: twelve hours.

    Raises:
        MediaError: a limit that is no number above 0.
    """

    pixels: int = 1 << 27
    frames: int = 1 << 17
    clip_bytes: int = 1 << 35
    sound_seconds: float = 12 * 3600.0

    def __post_init__(self) -> None:
        for name in ("pixels", "frames", "clip_bytes"):
            object.__setattr__(self, name, parse_whole(name, getattr(self, name), least=1))
        seconds = parse_number(
            "sound_seconds", self.sound_seconds, above=0, infinite=True, rule="be a number above 0"
        )
        object.__setattr__(self, "sound_seconds", seconds)

    @classmethod
    def from_environment(cls) -> "Limits":
        """The limits that the environment sets; the defaults where it sets none.

        Raises:
            MediaError: a variable holds no number above 0.
        """
        given: dict[str, float] = {}
        for field in fields(cls):
            name = PREFIX + field.name.upper()
            if text := os.environ.get(name):
                given[field.name] = _number_in(name, text, whole=field.name != "sound_seconds")
        return cls(**given)  # type: ignore[arg-type]  # whole where they must be


def _number_in(name: str, text: str, *, whole: bool) -> float:
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        raise MediaError(f"{name} must be a number above 0, got {text!r}") from None
    parse_number(name, number, above=0, infinite=True, rule="be a number above 0")
    return number


_given: ContextVar[Limits | None] = ContextVar("limits", default=None)


def current_limits() -> Limits:
    """The limits that hold here."""
    given = _given.get()
    return Limits.from_environment() if given is None else given


@contextmanager
def use_limits(limits: Limits) -> Iterator[None]:
    """Within, these limits hold; in threads that were started before, those of the environment."""
    token = _given.set(limits)
    try:
        yield
    finally:
        _given.reset(token)


def check_pixels(name: str, width: int, height: int) -> None:
    """Check the size of a picture, or of a video's frames.

    Raises:
        MediaError: it has too many pixels, or none.
    """
    most = current_limits().pixels
    if width < 1 or height < 1:
        raise MediaError(f"{name!r} is {width}x{height}: it has no pixels; give another file")
    if width * height > most:
        raise MediaError(
            f"{name!r} is {width}x{height}: {width * height:,} pixels, more than the limit of"
            f" {most:,}; scale it down, or set {PREFIX}PIXELS={width * height}"
        )


def check_frames(name: str, frames: int) -> None:
    """Check how many frames are asked for at once.

    Raises:
        MediaError: too many.
    """
    most = current_limits().frames
    if frames > most:
        raise MediaError(
            f"{frames:,} frames of {name!r} are more than the limit of {most:,}; ask for fewer, or"
            f" set {PREFIX}FRAMES={frames}"
        )


def check_clip(name: str, frames: int, height: int, width: int) -> None:
    """Check how much memory some frames take together.

    Raises:
        MediaError: too much.
    """
    most, total = current_limits().clip_bytes, frames * 3 * height * width
    if total > most:
        raise MediaError(
            f"{frames:,} frames of {height}x{width} of {name!r} take {total:,} bytes, more than the"
            f" limit of {most:,}; ask for fewer or smaller ones, stream them, or set"
            f" {PREFIX}CLIP_BYTES={total}"
        )


def check_sound(name: str, seconds: float) -> None:
    """Check the length of sound that is read as a whole.

    Raises:
        MediaError: it is too long.
    """
    most = current_limits().sound_seconds
    if seconds > most:
        raise MediaError(
            f"the sound of {name!r} is longer than the limit of {most:g} seconds; read a part of"
            f" it, or set {PREFIX}SOUND_SECONDS to a larger number"
        )
