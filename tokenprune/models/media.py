"""`Media`: what a file holds for a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tokenprune.media import Clip

__all__ = ["Media"]


@dataclass(frozen=True)
class Media:
    """What a file holds for a model: a video's frames and sound track, an image, or audio.

    Attributes:
        frames: `[F, 3, H, W]` uint8; one frame for an image, none for audio.
        video: The clip that the frames are, if they are one; a `Video` if it was read from a file.
        audio: `[T]` float32 mono at 16 kHz, if it is audio, or the sound track of the video from
            the first frame on.
        sized: Whether the frames have the size to which the processor would bring them.
    """

    frames: Tensor
    video: Clip | None = None
    audio: Tensor | None = None
    sized: bool = False
