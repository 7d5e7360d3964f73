"""The sound track of a file."""

import math
import os
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.errors import DecodeError, MediaError
from tokenprune.media.index.container import open_media, packets_of

Samples = NDArray[np.float32]

GAP_SECONDS = 0.1  # less than this between two pieces of sound may be rounding
LONGEST_OVERLAP_SECONDS = 1.0  # more than this back in time is a new clock, as for pictures
AGREEMENT_SECONDS = 1.0  # a gap or a fall is believed if for so long nothing speaks against it
LONGEST_GAP_SECONDS = 3600.0  # more than this is a new clock, and nothing is missing


def read_audio(
    path: str | os.PathLike[str],
    *,
    sampling_rate: int = 16000,
    track: int = 0,
    start_seconds: float | None = None,
    start: float | None = None,
    end: float | None = None,
) -> Tensor:
    """Decode a sound track to one channel, the mean of all, at the rate asked for.

    Where a piece is lost or cannot be decoded, or the track pauses, silence takes its place, so
    that all else stays in time to a tenth of a second; and what overlaps is cut. A gap of more than
    an hour, or of more than a second back, is taken for the new clock of a file that was joined to
    another; its sound follows at once.

    Args:
        path: a local file, with or without video.
        sampling_rate: samples per second.
        track: which of the file's sound tracks.
        start_seconds: where on the file's own clock the sound is to begin (a video's
            `start_seconds` keeps it in step with the frames): what comes before is left out, and
            silence stands in for what the track lacks. None: where the track begins.
        start: seconds from there on that are left out.
        end: seconds from there on where the part to read ends; past the end of the track means
            its end.

    Returns:
        float32 `[T]`, full scale is -1 to 1; all of the track, however long. Empty if it ends
        before `start_seconds`.

    Raises:
        MediaError: the file cannot be read, or has no such track, or no such part of it.
    """
    _check_part(start, end)
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
        frames = _frames(container, stream)
        first = next(frames, None)
        if first is None:
            raise DecodeError(f"{container.name!r}: nothing of sound track {track} can be decoded")
        known = start_seconds is not None and first.time is not None
        lead = round((first.time - start_seconds) * sampling_rate) if known else 0
        begin = round((start or 0.0) * sampling_rate)
        stop = None if end is None else round(end * sampling_rate)
        parts = _resample(chain([first], frames), sampling_rate)
        samples, reached = _cut(parts, lead, begin, stop)
        if start is not None and reached <= begin:
            raise MediaError(
                f"start must lie before the end of the sound of {container.name!r}"
                f" ({reached / sampling_rate:.3f} s), got {start}"
            )
    return torch.from_numpy(samples)


def _check_part(start: float | None, end: float | None) -> None:
    begin, stop = 0.0 if start is None else start, math.inf if end is None else end
    if not 0 <= begin < stop:  # also refuses nan
        raise MediaError(
            f"start and end must satisfy 0 <= start < end, in seconds, got start={start} end={end}"
        )


def _cut(parts: Iterator[Samples], lead: int, begin: int, stop: int | None) -> tuple[Samples, int]:
    """The samples from `begin` to `stop` of silence of length `lead`, and then the parts.

    A negative lead says how many samples of the parts come before the first that counts. No part
    after `stop` is decoded. Gives also how far the sound was followed.
    """
    silence = max(0, lead if stop is None else min(lead, stop)) - begin
    kept = [np.zeros(max(0, silence), np.float32)]
    at = lead
    for part in parts:
        kept.append(part[max(0, begin - at) : None if stop is None else max(0, stop - at)])
        at += len(part)
        if stop is not None and at >= stop:
            break
    return np.concatenate(kept), at


def _resample(frames: Iterator[Any], sampling_rate: int) -> Iterator[Samples]:
    """One channel at the new rate: the mean of all, which never exceeds full scale."""
    kind = resampler = due = None  # due: where, on the file's clock, the sound given so far ends
    excess = 0  # samples that are there twice
    coming = _Coming(frames)
    for frame in coming:
        due = frame.time if due is None else due
        lost = _lost(frame, coming, due)
        if lost > 0:
            yield from _mono(resampler, None)
            yield np.zeros(round(lost * sampling_rate), np.float32)
            kind = None
        elif -LONGEST_OVERLAP_SECONDS < lost < 0:
            excess = round(-lost * sampling_rate)
        if lost:
            due = frame.time
        if kind != (frame.layout.name, frame.format.name, frame.sample_rate):  # may change midway
            yield from _mono(resampler, None)
            kind = (frame.layout.name, frame.format.name, frame.sample_rate)
            resampler = av.AudioResampler(format="fltp", rate=sampling_rate)
        due = None if due is None else due + frame.samples / frame.sample_rate
        for part in _mono(resampler, frame):
            yield part[excess:]
            excess = max(0, excess - len(part))
    yield from _mono(resampler, None)


class _Coming:
    """Frames one by one, of which the next ones can be looked at."""

    def __init__(self, frames: Iterator[Any]) -> None:
        self._frames = frames
        self._seen: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        while self._seen or self._fetch():
            yield self._seen.popleft()

    def agree(self, frame: Any, is_gap: bool) -> bool:
        """Whether the time of a frame is no accident: those of the next second go on from it.

        After a gap there may be more of them, and after a fall more falls, but no way back.

        Args:
            frame: the frame that came last.
            is_gap: whether it came late, and not early.
        """
        begin = due = frame.time
        at = 0
        while due - begin < AGREEMENT_SECONDS:
            due += frame.samples / frame.sample_rate
            if at == len(self._seen) and not self._fetch():
                return at > 0
            frame = self._seen[at]
            at += 1
            late = 0.0 if frame.time is None else frame.time - due
            if (-late if is_gap else late) > GAP_SECONDS:
                return False
            due = frame.time if abs(late) > GAP_SECONDS else due
        return True

    def _fetch(self) -> bool:
        frame = next(self._frames, None)
        if frame is not None:
            self._seen.append(frame)
        return frame is not None


def _lost(frame: Any, coming: _Coming, due: float | None) -> float:
    """Seconds of sound that lack before a frame; below 0 where some is there twice, or a new clock
    begins; 0 for none of it."""
    if frame.time is None or due is None:
        return 0.0
    lost: float = frame.time - due
    if abs(lost) <= GAP_SECONDS:
        return 0.0
    if not coming.agree(frame, is_gap=lost > 0):
        return 0.0  # a damaged time among good ones
    return lost if lost < LONGEST_GAP_SECONDS else -lost


def _mono(resampler: Any, frame: Any) -> list[Samples]:
    """What the resampler gives for a frame; for None, what it still holds."""
    if resampler is None:
        return []
    return [part.to_ndarray().mean(axis=0) for part in resampler.resample(frame)]


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded sound, damaged packets left out."""
    try:
        for packet in chain(packets_of(container, stream), [None]):  # None: what is held back
            try:
                yield from stream.codec_context.decode(packet)
            except av.error.FFmpegError:
                continue
    except av.error.FFmpegError:  # the file ends early: what came before is good
        return
