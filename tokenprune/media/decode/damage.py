"""Telling sound pictures from those that rest on damaged packets."""

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from tokenprune.media.decode.plan import decode_starts
from tokenprune.media.index.index import PacketIndex


class Decoded(NamedTuple):
    """A picture that came out of a decoder.

    Attributes:
        place: its place in presentation order.
        picture: the PyAV frame.
        damaged: whether it, or one that it may be built on, is damaged.
    """

    place: int
    picture: Any
    damaged: bool


class Sieve:
    """Holds pictures back, in presentation order, until it is known whether they are sound.

    A picture may be built on any packet from its keyframe to its own. Some of those are shown
    after it, so their damage shows after it too: it is certain once everything that was fed up to
    its own packet has come out. Players hide damage by patching pictures from others; here such a
    picture, and all that may be built on it, count as damaged.

    Args:
        index: the packet index.
        delay: how many packets late the decoder may report damage.
    """

    def __init__(self, index: PacketIndex, delay: int) -> None:
        self._index, self._delay = index, delay
        self._latest: dict[int, int] = {}  # by packet: the latest place fed up to it
        self._number: dict[int, int] = {}  # packet by place
        self._damage: list[int] = []  # packets
        self._held: deque[tuple[int, Any]] = deque()
        self._first = -1
        self._last = -1

    def feed(self, number: int, place: int, damaged: bool) -> None:
        """Note the packet that goes into the decoder next."""
        if self._first < 0:
            self._first = number
        self._latest[number] = max(place, self._latest.get(self._last, place))
        self._number[place] = self._last = number
        if damaged:
            self._damage.append(number)

    def fail(self) -> None:
        """Note that the decoder refused a packet."""
        self._note(max(self._first, self._last - self._delay))

    def take(self, picture: Any) -> list[Decoded]:
        """Add a picture that came out; gives those that are certain now."""
        place = picture.pts
        if place not in self._number:
            return []
        if picture.is_corrupt:
            self._note(self._number[place])
        self._held.append((place, picture))
        certain = []
        while self._held and self._latest[self._number[self._held[0][0]]] <= place:
            certain.append(self._judge(*self._held.popleft()))
        return certain

    def rest(self) -> list[Decoded]:
        """The pictures still held, when no more come."""
        rest = [self._judge(*held) for held in self._held]
        self._held.clear()
        return rest

    def _note(self, number: int) -> None:
        # A leading picture of the first group lacks what it is built on. That harms no other.
        if self._start(number) >= self._first:
            self._damage.append(number)

    def _judge(self, place: int, picture: Any) -> Decoded:
        if not self._damage:
            return Decoded(place, picture, False)
        number = self._number[place]
        start = self._start(number)
        return Decoded(place, picture, any(start <= bad <= number for bad in self._damage))

    def _start(self, number: int) -> int:
        return int(decode_starts(self._index, np.array([number]))[0])


class Counter:
    """Where times do not identify pictures: each comes in its turn, and all that come after the
    first damage are in doubt."""

    def __init__(self) -> None:
        self._count = 0
        self._damaged = False

    def feed(self, number: int, place: int, damaged: bool) -> None:
        """Note the packet that goes into the decoder next."""
        self._damaged |= damaged

    def fail(self) -> None:
        """Note that the decoder refused a packet."""
        self._damaged = True

    def take(self, picture: Any) -> list[Decoded]:
        """Number a picture that came out."""
        self._damaged |= picture.is_corrupt
        self._count += 1
        return [Decoded(self._count - 1, picture, self._damaged)]

    def rest(self) -> list[Decoded]:
        """Nothing is held."""
        return []
