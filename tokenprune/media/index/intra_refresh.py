"""Intra refresh: H.264 frames that are marked as keyframes though decoding cannot begin there.

With periodic intra refresh an encoder renews the frame column by column, and sends no frame that is
intra as a whole. The first frame of each round has a recovery point SEI, and FFmpeg's parser, like
many muxers, flags it as a keyframe, since a player that starts there has a good frame soon. But
what it lacks until then may show in frames long after, so exact decoding must begin further back.
"""

from typing import Any

from tokenprune.media.index.h264 import IDR_SLICE, SEI, SLICE, exp_golomb, nal_units

__all__ = ["HEAD_BYTES", "is_intra_refresh"]

HEAD_BYTES = 4096  # of a packet: its slices may come after parameter sets and SEI
_RECOVERY_POINT = 6  # SEI payload type
_INTRA_SLICES = ([2], [4], [7], [9])  # slice_type I and SI, the latter two for all of the frame


def is_intra_refresh(stream: Any, packet: bytes | memoryview) -> bool:
    """Whether a packet that is flagged as a keyframe refers to other frames.

    Args:
        stream: the PyAV stream.
        packet: the packet's content, or its first `HEAD_BYTES`.
    """
    if stream.codec_context.name != "h264":
        return False
    extradata = stream.codec_context.extradata or b""
    late = False
    for unit in nal_units(bytes(packet[:HEAD_BYTES]), extradata):
        kind = unit[0] & 31 if unit else 0
        if kind == IDR_SLICE:
            return False
        if kind == SLICE:
            return late or exp_golomb(unit[1:16], 2)[1:] not in _INTRA_SLICES
        late |= kind == SEI and _recovers_late(unit[1:])
    return False


def _recovers_late(sei: bytes) -> bool:
    """Whether a recovery point among these SEI messages has a `recovery_frame_cnt` above 0."""
    at = 0
    while at + 2 < len(sei):
        kind, length = sei[at], sei[at + 1]
        if kind == _RECOVERY_POINT:
            return exp_golomb(sei[at + 2 : at + 18], 1) != [0]
        if 255 in (kind, length):  # of several bytes: user data, such as the encoder's settings
            return False
        at += 2 + length
    return False
