"""The sound track of a file."""

import os
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.errors import DecodeError, MediaError
from tokenprune.media.files import open_media

Samples = NDArray[np.float32]


def read_audio(
    path: str | os.PathLike[str], *, sampling_rate: int = 16000, track: int = 0
) -> Tensor:
    """Decode a sound track to one channel, the mean of all, at the rate asked for.

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
        parts = list(_resample(_frames(container, stream), sampling_rate))
        if not parts:
            raise DecodeError(f"{container.name!r}: nothing of sound track {track} can be decoded")
    return torch.from_numpy(np.concatenate(parts))


def _resample(frames: Iterator[Any], sampling_rate: int) -> Iterator[Samples]:
    """One channel at the new rate: the mean of all, which never exceeds full scale."""
    kind = resampler = None
    for frame in frames:
        if kind != (frame.layout.name, frame.format.name, frame.sample_rate):  # may change midway
            yield from _mono(resampler, None)
            kind = (frame.layout.name, frame.format.name, frame.sample_rate)
            resampler = av.AudioResampler(format="fltp", rate=sampling_rate)
        yield from _mono(resampler, frame)
    yield from _mono(resampler, None)


def _mono(resampler: Any, frame: Any) -> list[Samples]:
    """What the resampler gives for a frame; for None, what it still holds."""
    if resampler is None:
        return []
    return [part.to_ndarray().mean(axis=0) for part in resampler.resample(frame)]


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded sound, damaged packets left out."""
    try:
        for packet in container.demux(stream):
            try:
                yield from stream.codec_context.decode(packet if packet.size else None)
            except av.error.FFmpegError:
                continue
    except av.error.FFmpegError:  # the file ends early: what came before is good
        return
