"""Frames that callers hand in one by one: pictures, their files, arrays or tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokenprune.errors import MediaError
from tokenprune.media.colours import WHITE, Background, parse_background, to_rgb
from tokenprune.media.index.index import Ints
from tokenprune.media.limits import check_clip, check_frames, check_pixels
from tokenprune.media.local import Fetch, local_file
from tokenprune.media.sampling import SizeRule
from tokenprune.media.scale import Scaler
from tokenprune.media.stills import read_picture, reading
from tokenprune.media.video import Clip

__all__ = ["FrameList", "is_frame_list", "read_frames"]

NAME = "a list of frames"
CHANNELS = (1, 3, 4)


@dataclass(frozen=True, eq=False, repr=False)
class FrameList(Clip):
    """Frames that a caller handed in, with the times that follow from their rate.

    Attributes:
        rate: frames per second of the video that they come from.
    """

    rate: float

    @property
    def source_fps(self) -> float:
        """Frames per second of the video that they come from."""
        return self.rate


def is_frame_list(given: object) -> bool:
    """Whether something is several frames: a list of them, or an array of four dimensions."""
    return isinstance(given, list | tuple) or getattr(given, "ndim", 0) == 4


def read_frames(
    given: Sequence[Any],
    ranks: Ints,
    size: SizeRule | tuple[int, int] | None,
    *,
    background: Background = WHITE,
    fetch: Fetch | None = None,
) -> Tensor:
    """Frames `[F, 3, H, W]` uint8 of those given, scaled as frames of a video are.

    Args:
        given: frames, each a picture of Pillow, a source of one (see `LocalFile`), or an array or
            tensor `[H, W, 3]`, `[3, H, W]` or `[H, W]` of bytes. One with four channels has an
            alpha.
        ranks: which of them to read.
        size: height and width, or a rule for them; None for those of the first.
        background: what is laid under what is transparent.
        fetch: gets what URLs name; None refuses them.

    Raises:
        MediaError: one is of no such kind, or of another size than the first.
    """
    colour = parse_background(background)
    check_frames(NAME, len(ranks))
    frames: Tensor | None = None
    first: tuple[int, ...] = ()
    for row, rank in enumerate(ranks.tolist()):
        picture = _pixels(given[rank], rank, colour, fetch)
        if frames is None:
            first = height, width = picture.shape[:2]
            check_pixels(NAME, width, height)
            sides = size(height, width, len(ranks)) if callable(size) else size or (height, width)
            check_clip(NAME, len(ranks), *sides)
            frames = torch.empty((len(ranks), 3, *sides), dtype=torch.uint8)
            scale = Scaler(sides)
        if picture.shape[:2] != first:
            raise MediaError(
                "frames of one clip must have one size, got"
                f" {picture.shape[0]}x{picture.shape[1]} after {first[0]}x{first[1]}"
            )
        scale(picture, frames[row].numpy())
    if frames is None:
        raise MediaError("a list of frames must hold at least one, got none")
    return frames


def _pixels(
    frame: object, rank: int, background: tuple[int, int, int], fetch: Fetch | None
) -> NDArray[np.uint8]:
    """One frame as `[H, W, 3]`."""
    if isinstance(frame, Image.Image):
        with reading(f"frame {rank}"):
            return np.asarray(to_rgb(frame, background))
    if hasattr(frame, "shape") and hasattr(frame, "dtype"):
        return np.asarray(to_rgb(_drawn(frame, rank), background))
    if is_frame_list(frame):
        raise MediaError(f"frame {rank} must be one picture, got {frame!r:.80}")
    with local_file(frame, fetch) as path:  # type: ignore[arg-type]  # which checks what it is
        picture = read_picture(path, background=background)
        if picture is None:
            raise MediaError(f"frame {rank} must be a picture, but {path!r} is none")
    return picture.permute(1, 2, 0).numpy()


def _drawn(frame: Any, rank: int) -> Image.Image:
    """An array or tensor as a picture."""
    channels_first = isinstance(frame, Tensor)
    array = frame.detach().cpu().numpy() if channels_first else np.asarray(frame)
    wrong = MediaError(
        f"frame {rank} must be bytes from 0 to 255, [H, W, 3], [3, H, W] or [H, W], got"
        f" {array.dtype} {list(array.shape)}"
    )
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise wrong
    if array.ndim == 3:
        first, last = array.shape[0] in CHANNELS, array.shape[-1] in CHANNELS
        if not (first or last):
            raise wrong
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        if array.shape[-1] == 1:
            array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))
