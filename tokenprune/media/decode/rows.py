"""Rows: the memory that decoded frames are written to, and the window that bounds it.

A row is the place of one frame asked for in the output `[F, 3, H, W]`.
"""

import mmap
import os
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokenprune.media.decode.effort import Effort, WorkSpan
from tokenprune.media.index.index import Bools, Ints

__all__ = ["Pixels", "Ring", "RowSink", "Rows", "Stopped"]

Pixels = NDArray[np.uint8]  # a row `[3, H, W]`, or several


class Stopped(Exception):
    """Ends a worker: the reader was closed, or another worker failed."""


class RowSink(Protocol):
    """What a worker needs to know about the rows it writes."""

    def offer(self, row: int, *, waits: bool) -> Pixels | None:
        """Memory `[3, H, W]` for a row.

        None if the row lies outside the window and the caller does not wait.

        Raises:
            Stopped: nothing is to be written any more.
        """

    def stored(self, row: int, is_substitute: bool) -> None:
        """Note that a row is complete."""

    def check(self) -> None:
        """Raise `Stopped` if nothing is to be written any more."""


class Ring:
    """A ring buffer of rows in shared memory: row r is in slot r modulo its length.

    The memory has no name. Workers inherit its file descriptor, so nothing can be left behind,
    however the processes end. Behind the slots lie the workers' counters.

    Args:
        slots: rows at most.
        size: height and width of the rows.
        workers: number of workers that count.
        descriptor: of the memory to attach to; None makes it.
    """

    def __init__(
        self, slots: int, size: tuple[int, int], workers: int, descriptor: int | None = None
    ) -> None:
        shape = (slots, 3, *size)
        total = int(np.prod(shape))
        padded = -(-total // 8) * 8
        length = padded + workers * 16
        self.descriptor = _anonymous_file(length) if descriptor is None else descriptor
        memory = mmap.mmap(self.descriptor, length)  # lives as long as an array views it
        self.rows: Pixels = np.frombuffer(memory, np.uint8, total).reshape(shape)
        counters: Ints = np.frombuffer(memory, np.int64, workers * 2, padded)
        self.counters = counters.reshape(workers, 2)  # frames decoded, bytes read

    def __getitem__(self, row: int) -> Pixels:
        slot: Pixels = self.rows[row % len(self.rows)]
        return slot

    def close(self) -> None:
        """Close the descriptor; the memory is freed with the last array that views it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _anonymous_file(length: int) -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tokenprune")
    else:
        with tempfile.TemporaryFile() as file:  # it has no name either
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, length)
    return descriptor


def _block(count: int, size: tuple[int, int]) -> Pixels:
    """Memory for rows that goes back to the system as soon as no array views it.

    `malloc` may keep what a thread frees in that thread's arena: groups of some MiB would pile up.
    """
    shape = (count, 3, *size)
    # No huge pages are asked for: in a virtual machine that lends its free memory to others, those
    # cost more than a frame takes to decode.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return np.frombuffer(mmap.mmap(-1, int(np.prod(shape)), **flags), np.uint8).reshape(shape)


class Rows:
    """The rows asked for, passed from the workers to the caller in groups.

    No row is written that lies `window` rows or more after the last group taken.

    Args:
        bounds: `[G + 1]` rows where groups begin, and the number of rows.
        size: height and width of the rows.
        window: how far writing may run ahead of taking.
        ring: shared memory of `window` slots; None for memory of this process alone.
    """

    def __init__(
        self, bounds: Ints, size: tuple[int, int], window: int, ring: Ring | None = None
    ) -> None:
        self._bounds, self._size, self._window, self._ring = bounds, size, window, ring
        self._begins = bounds[:-1].tolist()
        self._changed = threading.Condition()
        self._blocks: dict[int, Pixels] = {}
        self._left = np.diff(bounds)
        self._effort = Effort(len(self._left))
        self._substituted: set[int] = set()
        self._taken = 0  # rows
        self._error: BaseException | None = None
        self._error_row = 0
        self._closed = False

    @property
    def limit(self) -> int:
        """Rows before this one may be written."""
        return self._taken + self._window

    @property
    def failed(self) -> bool:
        """Whether no unit is to be begun any more, since rows of one will never come."""
        return self._error is not None

    def check(self) -> None:
        """See `RowSink`."""
        if self._closed:
            raise Stopped

    def await_room(self, row: int) -> None:
        """Wait until a row lies in the window.

        Raises:
            Stopped: it will not, since the reader was closed, or rows before it will never come.
        """
        with self._changed:
            if row >= self.limit:  # waiting is no work
                self._effort.note(self._group(row))
                self._effort.end()
                self._changed.wait_for(lambda: row < self.limit or self._closed or self.failed)
                self._effort.begin()
                if row >= self.limit:
                    raise Stopped
        self.check()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, the time of this thread counts as work on the rows that it stores."""
        with self._changed:
            self._effort.begin()
        try:
            yield
        finally:
            with self._changed:
                self._effort.end()

    def effort(self, number: int) -> tuple[WorkSpan, ...]:
        """When workers decoded a group: `time.perf_counter` where each span began and ended."""
        with self._changed:
            return self._effort.spans(number)

    def offer(self, row: int, *, waits: bool) -> Pixels | None:
        """See `RowSink`."""
        if waits:
            self.await_room(row)
        self.check()
        with self._changed:
            if row >= self.limit:
                return None
            number = self._group(row)
            if number not in self._blocks:
                count = int(self._bounds[number + 1] - self._bounds[number])
                self._blocks[number] = _block(count, self._size)
            place: Pixels = self._blocks[number][row - int(self._bounds[number])]
            return place

    def stored(self, row: int, is_substitute: bool) -> None:
        """See `RowSink`."""
        with self._changed:
            if is_substitute:
                self._substituted.add(row)
            number = self._group(row)
            self._effort.note(number)
            self._left[number] -= 1
            if self._left[number] == 0:
                self._changed.notify_all()

    def fail(self, error: BaseException, row: int | None = None) -> None:
        """Begin no more units; the error is raised where rows are missing, the earliest one first.

        Args:
            error: what happened.
            row: the first that may never come, before which all are being decoded; None for all
                rows that are still missing.
        """
        with self._changed:
            row = self._taken if row is None else row
            if self._error is None or row < self._error_row:
                self._error, self._error_row = error, row
            self._changed.notify_all()

    def _is_awaited(self, number: int) -> bool:
        """Whether a group is not complete yet, but may be."""
        will_fail = self.failed and self._error_row < int(self._bounds[number + 1])
        return bool(self._left[number]) and not (self._closed or will_fail)

    def close(self) -> None:
        """End all writing, and free what was not taken."""
        with self._changed:
            self._closed = True
            self._blocks.clear()
            self._changed.notify_all()

    def wake(self) -> None:
        """Make the caller that waits for a group check again whether workers are alive."""
        with self._changed:
            self._changed.notify_all()

    def take(
        self,
        number: int,
        *,
        is_alive: Callable[[], bool],
        progress: Callable[[], int],
        timeout_seconds: float,
    ) -> tuple[Pixels, Bools]:
        """The frames `[G, 3, H, W]` of a group, and which are substitutes, once all are there.

        Args:
            number: of the group; they are taken in order.
            is_alive: whether a worker is still at work.
            progress: a number that changes while workers make progress.
            timeout_seconds: how long to wait without progress.

        Raises:
            TimeoutError: no worker made progress for too long.
            Exception: what made a worker fail.
        """
        done, moved = progress(), time.monotonic()
        with self._changed:
            while self._is_awaited(number) and is_alive():
                self._changed.wait(min(1.0, timeout_seconds))
                if done != progress():
                    done, moved = progress(), time.monotonic()
                elif time.monotonic() - moved > timeout_seconds:
                    raise TimeoutError(
                        f"nothing was decoded for {timeout_seconds:g} seconds; is the file on a"
                        " disk that hangs? Otherwise give a larger timeout_seconds"
                    )
            if self._closed or self._left[number]:
                raise self._error or RuntimeError("the reader was closed, or a worker ended early")
            first, end = int(self._bounds[number]), int(self._bounds[number + 1])
            frames = self._frames(number, first, end)
            self._taken = end
            self._changed.notify_all()
            substituted = np.array([row in self._substituted for row in range(first, end)])
            self._substituted.difference_update(range(first, end))
        return frames, substituted

    def _frames(self, number: int, first: int, end: int) -> Pixels:
        if self._ring is None:
            return self._blocks.pop(number)
        slots = self._ring.rows
        if len(self._left) == 1:  # a read: no slot is written again
            return slots
        taken: Pixels = slots[np.arange(first, end) % len(slots)]
        return taken

    def _group(self, row: int) -> int:
        return bisect_right(self._begins, row) - 1
