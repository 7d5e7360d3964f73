"""Mixing the channels of audio to one: the standard downmix, in which the centre counts most."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["mix_to_mono", "mono_weights"]

_HALF_POWER = 0.5**0.5  # -3 dB
# Shares of a channel in the left and right of a stereo downmix by ITU-R BS.775, of which the mean
# is taken: fronts go to one side, what is in the middle to both, and what surrounds is quieter.
_SIDE, _MIDDLE, _AROUND, _BEHIND = 0.5, _HALF_POWER, 0.5 * _HALF_POWER, 0.5
_WEIGHTS = {
    **dict.fromkeys(("FL", "FR", "FLC", "FRC", "DL", "DR", "BIL", "BIR"), _SIDE),
    "FC": _MIDDLE,
    "BC": _BEHIND,
    **dict.fromkeys(("LFE", "LFE2"), 0.0),  # the standard leaves rumble out
}
_USUAL = {  # what many channels without names are, by their number
    3: ("FL", "FR", "LFE"),
    4: ("FL", "FR", "FC", "BC"),
    5: ("FL", "FR", "FC", "BL", "BR"),
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    7: ("FL", "FR", "FC", "LFE", "BC", "SL", "SR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}


def mix_to_mono(channels: NDArray[np.float32], names: Sequence[str]) -> NDArray[np.float32]:
    """One channel `[T]` from `[C, T]`, at full scale at most: of two or less, the mean.

    Args:
        channels: samples.
        names: FFmpeg's names of the channels, such as FL; "NONE" where the file names none.
    """
    if len(channels) <= 2:
        mean: NDArray[np.float32] = channels.mean(axis=0)
        return mean
    return mono_weights(tuple(names)) @ channels  # [C] @ [C, T]


@cache
def mono_weights(names: tuple[str, ...]) -> NDArray[np.float32]:
    """`[C]` the share of each of three or more channels in the mono downmix; they sum to 1."""
    count = len(names)
    if all(name == "NONE" for name in names):
        names = _USUAL.get(count, names)
    if "AMBI0" in names:  # ambisonics: the first component is the sound from all sides
        weights = [float(name == "AMBI0") for name in names]
    else:
        weights = [0.0 if one == "NONE" else _WEIGHTS.get(one, _AROUND) for one in names]
    kept = weights if any(weights) else [1.0] * count
    return np.array([weight / sum(kept) for weight in kept], np.float32)
