"""Keyframes that are none: H.264 pictures where a gradual refresh begins.

An encoder may renew its pictures column by column, with no picture that stands for itself. Files
mark where such a round begins as a keyframe, since a player that starts there has a good picture
soon; but what is missing then may show in pictures long after. Decoding must begin further back.
"""

from typing import Any

from tokenprune.media.index.h264 import IDR, NOTES, SLICE, numbers, units

HEAD_BYTES = 4096  # of a packet: its slices may come after some parameters and notes
_RECOVERY = 6  # type of the remark that says after how many pictures all is well
_INTRA = ([2], [4], [7], [9])  # types of slices that refer to no other picture


def is_gradual(stream: Any, packet: bytes | memoryview) -> bool:
    """Whether the picture of a packet marked as a keyframe refers to others.

    Args:
        stream: the PyAV stream.
        packet: the packet's content, or its first `HEAD_BYTES`.
    """
    if stream.codec_context.name != "h264":
        return False
    header = stream.codec_context.extradata or b""
    head = bytes(packet[:HEAD_BYTES])
    late = False
    for unit in units(head, header):
        kind = unit[0] & 31 if unit else 0
        if kind == IDR:
            return False
        if kind == SLICE:
            return late or numbers(unit[1:16], 2)[1:] not in _INTRA
        late |= kind == NOTES and _recovers_late(unit[1:])
    return False


def _recovers_late(notes: bytes) -> bool:
    """Whether a remark among these says that this picture is not yet a good one."""
    at = 0
    while at + 2 < len(notes):
        kind, length = notes[at], notes[at + 1]
        if kind == _RECOVERY:
            return numbers(notes[at + 2 : at + 18], 1) != [0]
        if 255 in (kind, length):  # a long one, such as the encoder's settings
            return False
        at += 2 + length
    return False
