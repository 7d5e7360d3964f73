"""The plan: which packets to decode, so that every wanted frame comes out and little else.

A decode unit starts at a keyframe and ends at the packet of its last wanted frame. Packets outside
all units are never fed to a decoder.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenprune.media.index.index import Ints, PacketIndex

__all__ = [
    "DecodeUnit",
    "decode_starts",
    "earlier_start",
    "has_open_gops",
    "neighbours",
    "plan_units",
]

MOST_REORDERED = 64  # frames: how far a packet may lie behind its rank, where these are counted


@dataclass(frozen=True, eq=False)
class DecodeUnit:
    """A run of packets that one worker decodes: a GOP, several, or the beginning of one.

    Attributes:
        first: packet where decoding begins, a keyframe.
        last: packet of the last wanted frame, in decode order.
        row: row of the output that its first frame fills; the others follow.
        ranks: `[R]` presentation ranks of the wanted frames, increasing.
        size_bytes: of its packets, all of which are read.
    """

    first: int
    last: int
    row: int
    ranks: Ints
    size_bytes: int


def plan_units(index: PacketIndex, ranks: Ints, workers: int = 1) -> list[DecodeUnit]:
    """Cut the wanted frames into decode units, in order.

    Runs that overlap are one unit, unless it is so long that other workers would have to wait for
    its end: then it is cut where little is decoded twice.

    Args:
        index: the packet index.
        ranks: `[F]` presentation ranks, strictly increasing.
        workers: how many will share the units.
    """
    if not index.timed:  # frames are told apart by counting, which must begin at the first packet
        last = min(len(index.pts), int(ranks[-1]) + MOST_REORDERED) - 1
        return [DecodeUnit(0, last, 0, ranks, int(index.size[: last + 1].sum()))]
    packets = index.order[ranks]  # [F]
    starts = decode_starts(index, packets)  # [F]
    if index.deinterlaces:
        for beside in neighbours(index, packets):
            starts = np.minimum(starts, decode_starts(index, beside))
            packets = np.maximum(packets, beside)
    cost = _cost(index)  # [P + 1]
    longest = float(cost[-1]) if workers == 1 else _wanted(cost, starts, packets) / (4 * workers)
    units = []
    row = 0
    while row < len(ranks):
        first, last, end = int(starts[row]), int(packets[row]), row + 1
        while end < len(ranks) and starts[end] <= last:
            done, twice = cost[last + 1] - cost[first], cost[last + 1] - cost[starts[end]]
            if starts[end] > starts[end - 1] and done > longest and 4 * twice < done:
                break
            last = max(last, int(packets[end]))
            first = min(first, int(starts[end]))
            end += 1
        size = int(index.size[first : last + 1].sum())
        units.append(DecodeUnit(first, last, row, ranks[row:end], size))
        row = end
    return units


def neighbours(index: PacketIndex, packets: Ints) -> tuple[Ints, Ints]:
    """The packets `[F]` of the frames shown before and after those of `packets` `[F]`.

    At the ends, and at a discontinuity, a frame takes the place of its own neighbour.
    """

    def beside(step: int) -> Ints:
        place = (index.place[packets] + step).clip(0, len(index.place) - 1)
        found = index.by_place[place]
        return np.where(index.epoch[found] == index.epoch[packets], found, packets)

    return beside(-1), beside(1)


def _cost(index: PacketIndex) -> NDArray[np.float64]:
    """`[P + 1]` the cost of decoding all packets before each: some by the byte, some by the pixel.

    At the bit rates of usual files (1080p, 4 Mbit/s) both weigh the same.
    """
    pixels = index.info.height * index.info.width / 128
    return np.concatenate([[0.0], np.cumsum(index.size + pixels)])


def _wanted(cost: NDArray[np.float64], starts: Ints, packets: Ints) -> float:
    """The cost of all packets that lie between a wanted frame and its start, each counted once."""
    change = np.zeros(len(cost), np.int64)
    np.add.at(change, starts, 1)
    np.add.at(change, packets + 1, -1)
    return float(np.diff(cost)[np.cumsum(change)[:-1] > 0].sum())


def decode_starts(index: PacketIndex, packets: Ints) -> Ints:
    """The packets `[F]` to begin at so that `packets` `[F]` are decoded exactly.

    That is the keyframe before in decode order. For a leading frame of an open GOP, which is shown
    before that keyframe, it is the keyframe before that one, since the frame may refer to both
    GOPs.
    """
    starts, place, epoch = index.starts, index.place, index.epoch
    at = np.searchsorted(starts, packets, "right") - 1
    while True:
        leading = (at > 0) & (place[packets] < place[starts[at]])
        leading &= epoch[starts[np.maximum(at - 1, 0)]] == epoch[packets]
        if not leading.any():
            return starts[at]
        at = at - leading


def has_open_gops(index: PacketIndex) -> bool:
    """Whether some frames are shown before the keyframe that they follow in decode order."""
    packets = index.order
    before = index.starts[np.searchsorted(index.starts, packets, "right") - 1]
    return bool((decode_starts(index, packets) != before).any())


def earlier_start(index: PacketIndex, first: int, keyframes: int) -> int:
    """The packet `keyframes` keyframes before `first`, or fewer, across no discontinuity."""
    starts = index.starts
    at = int(np.searchsorted(starts, first, "right")) - 1
    back = max(0, at - keyframes)
    while back < at and index.epoch[starts[back]] != index.epoch[first]:
        back += 1
    return int(starts[back])
