"""Decoding an audio track to mono samples that stay in step with the clock."""

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
from tokenprune.media.index.mp4 import check_data_is_here
from tokenprune.media.index.source import References
from tokenprune.media.index.streams import audio_stream
from tokenprune.media.sound.downmix import mix_to_mono

__all__ = ["Samples", "read_audio"]

Samples = NDArray[np.float32]

GAP_SECONDS = 0.1  # less than this between two audio frames may be rounding
LONGEST_OVERLAP_SECONDS = 1.0  # more than this back in time is a clock reset, as for video
AGREEMENT_SECONDS = 1.0  # a gap or a reset is believed if for so long no PTS contradicts it
LONGEST_GAP_SECONDS = 3600.0  # more than this is a discontinuity, and nothing is missing


def read_audio(
    path: str | os.PathLike[str],
    *,
    sampling_rate: int = 16000,
    track: int | None = None,
    language: str | None = None,
    start_seconds: float | None = None,
    start: float | None = None,
    end: float | None = None,
    references: References | None = None,
) -> Tensor:
    """Decode an audio track to one channel at the rate asked for.

    Stereo is averaged. More channels are mixed by ITU-R BS.775, scaled so that the sum stays
    within full scale: the centre, where speech is, counts most, and deep bass (LFE) is left out.

    Where a packet is lost or cannot be decoded, or the track pauses, silence takes its place, so
    that all else stays in time to a tenth of a second; and what overlaps is cut. A leap of more
    than an hour ahead, or of more than a second back, is taken for the discontinuity where another
    file was joined to this one; its audio follows at once.

    Args:
        path: a local file, with or without video.
        sampling_rate: samples per second.
        track: number of the track among those of the file, from 0; None means the one that players
            take: of those marked as default, else of all, the one of most channels, else the first.
        language: of the track, as the file names it ("eng"), in the place of its number.
        start_seconds: where on the file's own clock the samples are to begin (a video's
            `start_seconds` keeps them in step with the frames): what comes before is left out, and
            silence stands in for what the track lacks. None: where the track begins.
        start: seconds from there on that are left out.
        end: seconds from there on where the part to read ends; past the end of the track means
            its end.
        references: which other files the file may refer to, as playlists do: "folder" for those in
            its folder and below; None for none.

    Returns:
        float32 `[T]`, full scale is -1 to 1; all of the track, however long. Empty if it ends
        before `start_seconds`.

    Raises:
        MediaError: the file cannot be read, or has no such track, or no such part of it.
    """
    _check_part(start, end)
    if track is not None and language is not None:
        raise MediaError(f"give track or language, got both ({track} and {language!r})")
    if sampling_rate < 1:
        raise MediaError(f"sampling_rate must be at least 1 per second, got {sampling_rate}")
    with open_media(path, references) as container:
        stream = audio_stream(container, track, language)
        stream.codec_context.thread_type = "NONE"
        frames = _frames(container, stream)
        first = next(frames, None)
        if first is None:
            check_data_is_here(container, stream)
            raise DecodeError(f"{container.name!r}: nothing of its sound can be decoded")
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
    """The samples from `begin` to `stop` of `lead` samples of silence, and then the parts.

    Args:
        parts: decoded samples; those after `stop` are not asked for.
        lead: if negative, how many samples of the parts come before the first that counts.
        begin: the first sample to return.
        stop: the sample to end before; None for the end of the parts.

    Returns:
        The samples `[T]`, and the number of the last one decoded.
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
    """Resample frames, and mix them to one channel, which never exceeds full scale."""
    kind = resampler = due = None  # due: the PTS in seconds that the next frame should have
    excess = 0  # samples that are there twice
    ahead = _Lookahead(frames)
    for frame in ahead:
        due = frame.time if due is None else due
        gap = _gap_seconds(frame, ahead, due)
        if gap > 0:
            yield from _mono(resampler, None)
            yield np.zeros(round(gap * sampling_rate), np.float32)
            kind = None
        elif -LONGEST_OVERLAP_SECONDS < gap < 0:
            excess = round(-gap * sampling_rate)
        if gap:
            due = frame.time
        if kind != (frame.layout.name, frame.format.name, frame.sample_rate):  # may change midway
            yield from _mono(resampler, None)
            kind = (frame.layout.name, frame.format.name, frame.sample_rate)
            # Packed: PyAV cannot make an array of eight planes or more.
            resampler = av.AudioResampler(format="flt", rate=sampling_rate)
        due = None if due is None else due + frame.samples / frame.sample_rate
        for part in _mono(resampler, frame):
            yield part[excess:]
            excess = max(0, excess - len(part))
    yield from _mono(resampler, None)


class _Lookahead:
    """Iterates over audio frames, and lets the PTS of the next ones be compared."""

    def __init__(self, frames: Iterator[Any]) -> None:
        self._frames = frames
        self._fetched: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        while self._fetched or self._fetch():
            yield self._fetched.popleft()

    def confirm(self, frame: Any, is_gap: bool) -> bool:
        """Whether the PTS of the next second go on from a frame's, so that its own is no fault.

        After a gap there may be more gaps, and after a reset more resets, but no way back.

        Args:
            frame: the frame that came last.
            is_gap: whether its PTS is late, and not early.
        """
        begin = due = frame.time
        at = 0
        while due - begin < AGREEMENT_SECONDS:
            due += frame.samples / frame.sample_rate
            if at == len(self._fetched) and not self._fetch():
                return at > 0
            frame = self._fetched[at]
            at += 1
            late = 0.0 if frame.time is None else frame.time - due
            if (-late if is_gap else late) > GAP_SECONDS:
                return False
            due = frame.time if abs(late) > GAP_SECONDS else due
        return True

    def _fetch(self) -> bool:
        frame = next(self._frames, None)
        if frame is not None:
            self._fetched.append(frame)
        return frame is not None


def _gap_seconds(frame: Any, ahead: _Lookahead, due: float | None) -> float:
    """Seconds that are missing before a frame; below 0 for an overlap or a discontinuity."""
    if frame.time is None or due is None:
        return 0.0
    gap: float = frame.time - due
    if abs(gap) <= GAP_SECONDS:
        return 0.0
    if not ahead.confirm(frame, is_gap=gap > 0):
        return 0.0  # a damaged PTS among good ones
    return gap if gap < LONGEST_GAP_SECONDS else -gap


def _mono(resampler: Any, frame: Any) -> list[Samples]:
    """Resample a frame and mix it to one channel; None flushes what the resampler holds."""
    if resampler is None:
        return []
    mixed = []
    for part in resampler.resample(frame):
        names = [channel.name for channel in part.layout.channels]
        mixed.append(mix_to_mono(part.to_ndarray().reshape(-1, len(names)).T, names))
    return mixed


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded audio frames, damaged packets left out."""
    try:
        for packet in chain(packets_of(container, stream), [None]):  # None flushes the decoder
            try:
                yield from stream.codec_context.decode(packet)
            except av.error.FFmpegError:
                continue
    except av.error.FFmpegError:  # the file ends early: what came before is good
        return
