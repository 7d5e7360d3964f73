"""The reader as a video decoder of transformers: `load_video(path, backend="tokenprune")`."""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import MediaError
from tokenprune.media.reader import VideoReader

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

__all__ = ["register_with_transformers"]

NAME = "tokenprune"


def register_with_transformers() -> None:
    """Make `transformers.video_utils.load_video` take `backend="tokenprune"`.

    It stays so until the process ends; calling this again changes nothing. The default backends of
    `load_video` and of the processors stay as they are. A processor that is given what `load_video`
    returns should be told `do_sample_frames=False`. As `load_video` does, it tells ranks and the
    average rate: where frames do not come evenly, take `read_video` and its `metadata`, by which
    processors are told each frame's own time.
    """
    from transformers.video_utils import VIDEO_DECODERS

    VIDEO_DECODERS[NAME] = _decode


def _decode(
    video: object, sample_indices_fn: Callable[..., Sequence[int]], **kwargs: object
) -> "tuple[NDArray[np.uint8], VideoMetadata]":
    """Frames `[F, H, W, 3]` of the indices that `sample_indices_fn` chooses, and their metadata.

    Warns:
        UserWarning: some are damaged, and replaced by the nearest earlier ones.

    Raises:
        MediaError: the file cannot be used, or is not a local one.
    """
    from transformers.video_utils import VideoMetadata

    if not isinstance(video, str | os.PathLike):
        raise MediaError(
            f'backend="{NAME}" reads local files only, got {type(video).__name__};'
            " save what was downloaded, and give its path"
        )
    reader = VideoReader(video)
    info = reader.info
    metadata = VideoMetadata(
        total_num_frames=info.frame_count,
        fps=info.average_fps,
        width=info.width,
        height=info.height,
        duration=info.duration_seconds,
        video_backend=NAME,
    )
    indices = [int(index) for index in sample_indices_fn(metadata=metadata, **kwargs)]
    read = reader.read(indices=indices)
    if read.damaged:
        warnings.warn(
            f"{info.path!r}: {read.damaged} of {len(read)} frames are damaged,"
            " and replaced by the nearest earlier ones",
            stacklevel=3,
        )
    metadata.frames_indices = indices
    return read.frames.permute(0, 2, 3, 1).numpy(), metadata
