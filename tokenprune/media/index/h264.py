"""Parsing H.264 packets: NAL units, slices, Exp-Golomb numbers."""

from collections.abc import Iterator

__all__ = ["IDR_SLICE", "SEI", "SLICE", "exp_golomb", "nal_units", "slice_count"]

SLICE, IDR_SLICE, SEI = 1, 5, 6  # nal_unit_type


def nal_units(packet: bytes, extradata: bytes) -> Iterator[bytes]:
    """The NAL units of a packet, or of its first bytes.

    Args:
        packet: the content.
        extradata: the stream's header. In MP4 and Matroska it is an avcC box, which says how many
            bytes the length before each unit has; elsewhere units follow start codes (Annex B).
    """
    if not (extradata and extradata[0] == 1):
        yield from packet.split(b"\0\0\1")[1:]
        return
    width, at = (extradata[4] & 3) + 1 if len(extradata) > 4 else 4, 0
    while at + width < len(packet):
        length = int.from_bytes(packet[at : at + width], "big")
        yield packet[at + width : at + width + length]
        at += width + length


def slice_count(packet: bytes, extradata: bytes) -> int:
    """The number of slices in which the frame of a packet is coded."""
    kinds = (unit[0] & 31 for unit in nal_units(packet, extradata) if unit)
    return sum(kind in (SLICE, IDR_SLICE) for kind in kinds)


def exp_golomb(content: bytes, count: int) -> list[int]:
    """The unsigned Exp-Golomb numbers, `ue(v)`, with which some content begins."""
    bits = "".join(f"{byte:08b}" for byte in content)
    found: list[int] = []
    at = 0
    while len(found) < count and (one := bits.find("1", at)) >= 0:
        end = 2 * one - at + 1
        found.append(int(bits[one:end], 2) - 1)
        at = end
    return found
