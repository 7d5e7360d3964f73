"""Timestamps of packets: whether they identify frames, where they break, and seconds from them."""

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.media.index.index import NO_PTS, Bools, Ints

__all__ = [
    "MPEG_SYSTEMS",
    "clock_jumps",
    "clock_rate",
    "clock_resets",
    "frame_seconds",
    "is_timed",
    "usual_step",
]

RAW_STREAMS = {"h264", "hevc", "m4v", "mpegvideo"}  # no container: FFmpeg guesses their timestamps
DTS_ONLY = {"avi", "asf"}  # containers that tell when frames are decoded, not when shown
MPEG_SYSTEMS = {"mpegts", "mpeg"}  # transport and program streams: may be joined, clocks and all
EVEN_SECONDS = 2e-3  # containers round times to milliseconds: less than this is even
TICKS_PER_SECOND = 1000.0  # by which uneven times are told
LARGEST_DENOMINATOR = 1001  # of usual rates: 30000/1001
ROUNDING = 1e-6  # of a rate


def clock_rate(seconds: NDArray[np.float64], average: float) -> float:
    """The rate by which the time of each frame is a whole number, to a millisecond or two.

    Whoever is told a frame's number and a rate takes the one by the other for its time. If frames
    come evenly, the number is their rank, and the rate their average; else a number counts
    milliseconds.

    Args:
        seconds: `[N]` times by rank.
        average: frames per second.
    """
    plain = Fraction(average).limit_denominator(LARGEST_DENOMINATOR)
    # Else 150 / 30.000000000000004 would be told as four seconds.
    rate = float(plain) if abs(plain - average) < ROUNDING * average else average
    late = seconds - np.arange(len(seconds)) / rate
    error = max(float(late.max()), -float(late.min()))
    return rate if error <= EVEN_SECONDS else TICKS_PER_SECOND


def clock_resets(pts: Ints, dts: Ints, keyframe: Bools, tick: float, form: str) -> Bools:
    """`[P]` where the file's clock starts anew, at an earlier time.

    In MPEG transport and program streams that is where DTS falls. Elsewhere DTS may be guesses
    that waver; there the sign is a keyframe whose PTS lies before those of the GOP before, which no
    stream with one clock allows.
    """
    if form in MPEG_SYSTEMS:
        return np.diff(dts, prepend=dts[:1]) * tick < -1.0
    resets = np.zeros(len(pts), bool)
    starts = np.flatnonzero(keyframe)
    if len(starts) > 1:
        latest = np.maximum.reduceat(pts, starts)
        resets[starts[1:]] = (latest[:-1] - pts[starts[1:]]) * tick > 1.0
    return resets


def clock_jumps(dts: Ints, tick: float, form: str) -> Bools:
    """`[P]` where DTS leaps ahead: another recording may have been joined there."""
    jumps = np.zeros(len(dts), bool)
    if form in MPEG_SYSTEMS and len(dts) > 1:
        steps = np.diff(dts) * tick
        jumps[1:] = steps > max(10.0, 20 * float(np.median(steps)))
    return jumps


def is_timed(container: Any, stream: Any, pts: Ints, section: Ints) -> bool:
    """Whether every shown packet has a PTS of its own; they come in presentation order."""
    codec, form = stream.codec_context.name, container.format.name
    # With B-frames DTS do not tell the order of presentation.
    if form in RAW_STREAMS or (form in DTS_ONLY and codec in {"h264", "hevc"}):
        return False
    twins = (pts[1:] == pts[:-1]) & (section[1:] == section[:-1])
    return bool((pts != NO_PTS).all() and not twins.any())


def frame_seconds(pts: Ints, section: Ints, tick: float, rate: float) -> NDArray[np.float64]:
    """Times `[N]` of frames from 0, sections set one after the other.

    Args:
        pts: `[N]` by rank, in ticks.
        section: `[N]` number of clock resets before each.
        tick: seconds of a tick.
        rate: frames a second as the file declares them, where PTS do not tell.
    """
    if (pts == NO_PTS).any():
        return np.arange(len(pts)) / rate
    if section[0] == section[-1] and (np.diff(pts) >= 0).all():
        plain: NDArray[np.float64] = (pts - pts[0]) * tick
        return plain
    step = usual_step(pts, section, tick, rate)
    seconds = np.empty(len(pts))
    start = 0.0
    for number in np.unique(section):
        here = section == number
        ticks = np.sort(pts[here])
        seconds[here] = start + (ticks - ticks[0]) * tick
        start = float(seconds[here][-1]) + step
    return seconds


def usual_step(pts: Ints, section: Ints, tick: float, rate: float) -> float:
    """Seconds of a frame, mostly; arguments as those of `frame_seconds`."""
    if (pts == NO_PTS).any():
        return 1 / rate
    steps = np.diff(pts) * tick
    steps = steps[(np.diff(section) == 0) & (steps > 0)]
    return float(np.median(steps)) if len(steps) else 1 / rate
