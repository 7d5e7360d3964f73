"""Telling intact frames from damaged ones: those that rest on a corrupt packet."""

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from tokenprune.media.decode.plan import decode_starts
from tokenprune.media.index.index import PacketIndex

__all__ = ["CountingTracker", "DamageTracker", "DecodedFrame"]


class DecodedFrame(NamedTuple):
    """A frame that came out of a decoder.

    Attributes:
        place: its place in presentation order.
        frame: the PyAV frame.
        damaged: whether it, or one that it may refer to, is damaged.
    """

    place: int
    frame: Any
    damaged: bool


class DamageTracker:
    """Holds decoded frames back, in presentation order, until it is known whether they are intact.

    A frame may refer, directly or not, to any packet from its keyframe to its own. Frames that it
    refers to may be shown after it (it is then a B-frame), so their damage may show after it, too:
    it is certain once all that was fed to the decoder up to its own packet has come out. Decoders
    conceal damage by copying from other frames; here such a frame, and all that may refer to it,
    count as damaged.

    Args:
        index: the packet index.
        delay: how many packets late the decoder may report damage.
    """

    def __init__(self, index: PacketIndex, delay: int) -> None:
        self._index, self._delay = index, delay
        self._latest: dict[int, int] = {}  # by packet: the latest place fed up to it
        self._number: dict[int, int] = {}  # packet by place
        self._corrupt: list[int] = []  # packets
        self._held: deque[tuple[int, Any]] = deque()
        self._first = -1
        self._last = -1

    def feed(self, number: int, place: int, corrupt: bool) -> None:
        """Note the packet that goes into the decoder next."""
        if self._first < 0:
            self._first = number
        self._latest[number] = max(place, self._latest.get(self._last, place))
        self._number[place] = self._last = number
        if corrupt:
            self._corrupt.append(number)

    def fail(self) -> None:
        """Note that the decoder refused a packet."""
        self._note(max(self._first, self._last - self._delay))

    def take(self, frame: Any) -> list[DecodedFrame]:
        """Add a frame that came out; returns those that are certain now."""
        place = frame.pts
        if place not in self._number:
            return []
        if frame.is_corrupt:
            self._note(self._number[place])
        self._held.append((place, frame))
        certain = []
        while self._held and self._latest[self._number[self._held[0][0]]] <= place:
            certain.append(self._judge(*self._held.popleft()))
        return certain

    def rest(self) -> list[DecodedFrame]:
        """The frames still held, when no more come."""
        rest = [self._judge(*held) for held in self._held]
        self._held.clear()
        return rest

    def _note(self, number: int) -> None:
        # Leading frames of the first GOP lack their references in the one before, if it is open.
        # That harms no other frame.
        if self._start(number) >= self._first:
            self._corrupt.append(number)

    def _judge(self, place: int, frame: Any) -> DecodedFrame:
        if not self._corrupt:
            return DecodedFrame(place, frame, False)
        number = self._number[place]
        start = self._start(number)
        return DecodedFrame(place, frame, any(start <= bad <= number for bad in self._corrupt))

    def _start(self, number: int) -> int:
        return int(decode_starts(self._index, np.array([number]))[0])


class CountingTracker:
    """Numbers decoded frames by counting, where timestamps do not identify them.

    All that come after the first damage are in doubt, since one may be missing.
    """

    def __init__(self) -> None:
        self._count = 0
        self._damaged = False

    def feed(self, number: int, place: int, corrupt: bool) -> None:
        """Note the packet that goes into the decoder next."""
        self._damaged |= corrupt

    def fail(self) -> None:
        """Note that the decoder refused a packet."""
        self._damaged = True

    def take(self, frame: Any) -> list[DecodedFrame]:
        """Number a frame that came out."""
        self._damaged |= frame.is_corrupt
        self._count += 1
        return [DecodedFrame(self._count - 1, frame, self._damaged)]

    def rest(self) -> list[DecodedFrame]:
        """Nothing is held."""
        return []
