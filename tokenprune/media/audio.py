"""The sound track of a file."""

import os
from itertools import chain
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import DecodeError, MediaError
from tokenprune.media.files import open_media


def read_audio(
    path: str | os.PathLike[str], *, sampling_rate: int = 16000, track: int = 0
) -> Tensor:
    """Decode a sound track to one channel at the rate asked for.

    Args:
        path: a local file, with or without video.
        sampling_rate: samples per second.
        track: which of the file's sound tracks.

    Returns:
        float32 `[T]`, full scale is -1 to 1; all of the track, however long.

    Raises:
        MediaError: the file cannot be read, or has no such track.
    """
    if sampling_rate < 1:
        raise MediaError(f"sampling_rate must be at least 1 per second, got {sampling_rate}")
    with open_media(path) as container:
        tracks = container.streams.audio
        if not tracks:
            raise MediaError(f"{container.name!r} has no sound track; give a file with sound")
        if not 0 <= track < len(tracks):
            raise MediaError(
                f"track must be from 0 to {len(tracks) - 1} in {container.name!r}, got {track}"
            )
        stream = tracks[track]
        if stream.codec_context is None:
            raise DecodeError(f"{container.name!r}: no decoder for its sound track {track}")
        stream.codec_context.thread_type = "NONE"
        resampler = av.AudioResampler(format="flt", layout="mono", rate=sampling_rate)
        parts = [
            part.to_ndarray()[0]
            for frame in chain(_frames(container, stream), [None])
            for part in resampler.resample(frame)
        ]
        if not parts:
            raise DecodeError(f"{container.name!r}: nothing of sound track {track} can be decoded")
    return torch.from_numpy(np.concatenate(parts))


def _frames(container: Any, stream: Any) -> Any:
    """Decoded sound, damaged packets left out."""
    try:
        for packet in container.demux(stream):
            try:
                yield from stream.codec_context.decode(packet if packet.size else None)
            except av.error.FFmpegError:
                continue
    except av.error.FFmpegError:  # the file ends early: what came before is good
        return
