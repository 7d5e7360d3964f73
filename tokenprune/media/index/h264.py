"""What the packets of H.264 hold."""

from collections.abc import Iterator

SLICE, IDR, NOTES = 1, 5, 6  # types of units: two that hold pictures, one for remarks


def units(packet: bytes, header: bytes) -> Iterator[bytes]:
    """The units of a packet, or of its first bytes, each behind its length or a start code.

    Args:
        packet: the content.
        header: the stream's own, which tells which of the two it is.
    """
    if not (header and header[0] == 1):
        yield from packet.split(b"\0\0\1")[1:]
        return
    width, at = (header[4] & 3) + 1 if len(header) > 4 else 4, 0
    while at + width < len(packet):
        length = int.from_bytes(packet[at : at + width], "big")
        yield packet[at + width : at + width + length]
        at += width + length


def slices(packet: bytes, header: bytes) -> int:
    """In how many pieces the picture of a packet is coded."""
    return sum(bool(unit) and unit[0] & 31 in (SLICE, IDR) for unit in units(packet, header))


def numbers(content: bytes, count: int) -> list[int]:
    """The numbers, in exponential Golomb code, with which some content begins."""
    bits = "".join(f"{byte:08b}" for byte in content)
    found: list[int] = []
    at = 0
    while len(found) < count and (one := bits.find("1", at)) >= 0:
        end = 2 * one - at + 1
        found.append(int(bits[one:end], 2) - 1)
        at = end
    return found
