"""Keyframes that are none: H.264 pictures where a gradual refresh begins.

An encoder may renew its pictures column by column, with no picture that stands for itself. Files
mark where such a round begins as a keyframe, since a player that starts there has a good picture
soon; but what is missing then may show in pictures long after. Decoding must begin further back.
"""

from collections.abc import Iterator
from typing import Any

HEAD_BYTES = 4096  # of a packet: its slices may come after some parameters and notes
_SLICE, _IDR, _NOTES = 1, 5, 6  # types of H.264 units: two that hold pictures, one for remarks
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
    for unit in _units(head, header):
        kind = unit[0] & 31 if unit else 0
        if kind == _IDR:
            return False
        if kind == _SLICE:
            return late or _numbers(unit[1:16], 2)[1:] not in _INTRA
        late |= kind == _NOTES and _recovers_late(unit[1:])
    return False


def _units(head: bytes, header: bytes) -> Iterator[bytes]:
    """The units of a packet, each behind its length or behind a start code."""
    if not (header and header[0] == 1):
        yield from head.split(b"\0\0\1")[1:]
        return
    width, at = (header[4] & 3) + 1 if len(header) > 4 else 4, 0
    while at + width < len(head):
        length = int.from_bytes(head[at : at + width], "big")
        yield head[at + width : at + width + length]
        at += width + length


def _recovers_late(notes: bytes) -> bool:
    """Whether a remark among these says that this picture is not yet a good one."""
    at = 0
    while at + 2 < len(notes):
        kind, length = notes[at], notes[at + 1]
        if kind == _RECOVERY:
            return _numbers(notes[at + 2 : at + 18], 1) != [0]
        if 255 in (kind, length):  # a long one, such as the encoder's settings
            return False
        at += 2 + length
    return False


def _numbers(content: bytes, count: int) -> list[int]:
    """The numbers, in exponential Golomb code, with which some content begins."""
    bits = "".join(f"{byte:08b}" for byte in content)
    numbers: list[int] = []
    at = 0
    while len(numbers) < count and (one := bits.find("1", at)) >= 0:
        end = 2 * one - at + 1
        numbers.append(int(bits[one:end], 2) - 1)
        at = end
    return numbers
