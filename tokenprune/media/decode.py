"""The decoder: workers that share the plan's units and deliver frames in groups, in order."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import DecodeError, MediaError
from tokenprune.media.demux import PacketReader
from tokenprune.media.index import Ints, PacketIndex
from tokenprune.media.pictures import Resizer
from tokenprune.media.plan import Unit, plan_units
from tokenprune.media.worker import Packets, UnitDecoder


@dataclass(frozen=True, eq=False)
class Group:
    """Decoded frames, a stretch of those asked for.

    Attributes:
        frames: uint8 `[G, 3, H, W]`.
        first: number of its first frame among those asked for.
        substituted: `[G]` bool, True where a damaged frame was replaced by the nearest earlier one.
        wait_seconds: time the caller waited for it.
    """

    frames: Tensor
    first: int
    substituted: Tensor
    wait_seconds: float


class FrameDecoder:
    """Decodes frames by rank on several threads; use it as a context manager.

    Memory is bounded: no frame is written that lies more than `window` frames after the last
    group delivered. The unit that holds the next frame due is always under way, and never waits.

    Args:
        index: the packet index of the file.
        ranks: `[F]` presentation ranks, strictly increasing.
        size: height and width of the frames.
        group: frames in a group; the last may be smaller.
        window: frames in memory at most, besides the one being written by each worker.
        workers: number of threads.
    """

    def __init__(
        self,
        index: PacketIndex,
        ranks: Ints,
        size: tuple[int, int],
        *,
        group: int,
        window: int,
        workers: int,
    ) -> None:
        self._index, self._ranks, self._size = index, ranks, size
        self._group, self._window = group, max(window, group)
        units = plan_units(index, ranks)
        self._units = iter(units)
        self._codec_threads = max(1, workers // len(units))
        self._change = threading.Condition()
        self._turn = threading.Lock()  # units are begun in order
        self._blocks: dict[int, Tensor] = {}
        self._left: dict[int, int] = {}  # rows still to be written, by block
        self._substituted: set[int] = set()
        self._decoders: list[UnitDecoder] = []
        self._delivered = 0
        self._error: BaseException | None = None
        self._closed = False
        self._reader = PacketReader(index)
        self._threads = [
            threading.Thread(target=self._work, name=f"tokenprune-decode-{n}", daemon=True)
            for n in range(min(workers, len(units)))
        ]

    def __enter__(self) -> "FrameDecoder":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, wait for them, and close the file."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._reader.close()
        self._blocks.clear()
        self._left.clear()  # else a group that was ready would be looked for

    @property
    def pictures_decoded(self) -> int:
        """Pictures that came out of all decoders so far."""
        return sum(decoder.pictures for decoder in self._decoders)

    def groups(self) -> Iterator[Group]:
        """The groups, in order.

        Raises:
            DecodeError: nothing near a wanted frame could be decoded, or a worker failed.
        """
        for number in range(-(-len(self._ranks) // self._group)):
            begin = time.perf_counter()
            with self._change:
                while self._left.get(number) != 0 and not self._is_over():
                    self._change.wait(1.0)  # a worker's last sign comes just before its end
                if self._left.get(number) != 0:
                    self._fail()
                frames = self._blocks.pop(number)
                first = number * self._group
                self._delivered = first + len(frames)
                rows = range(first, self._delivered)
                substituted = torch.tensor([row in self._substituted for row in rows])
                self._change.notify_all()
            yield Group(frames, first, substituted, time.perf_counter() - begin)

    def _is_over(self) -> bool:
        """Whether no worker will write anything more."""
        return self._error is not None or self._closed or not any(map(_alive, self._threads))

    def _fail(self) -> None:
        name = self._index.info.path
        if isinstance(self._error, MediaError):
            raise self._error
        if self._error is not None:
            raise DecodeError(f"cannot decode {name!r}: {self._error}") from self._error
        raise DecodeError(f"cannot decode {name!r}: the reader was closed, or a worker ended early")

    def _work(self) -> None:
        """One worker: take the next unit, decode it, until there is none."""
        try:
            resize = Resizer(self._size, self._index.info.rotation)
            decoder = UnitDecoder(self._index, self._reader, self._codec_threads)
            self._decoders.append(decoder)

            def store(row: int, picture: Any, is_substitute: bool, in_order: bool) -> None:
                if in_order:  # else an earlier frame is missing, maybe the one awaited: no waiting
                    self._await_room(row)
                self._store(resize, row, picture, is_substitute)

            try:
                while (task := self._next_unit()) is not None:
                    decoder.decode(*task, store)
            finally:
                decoder.close()
        except _Stop:
            pass
        except BaseException as error:  # shown where the frames are awaited
            with self._change:
                self._error = self._error or error
        finally:
            with self._change:
                self._change.notify_all()

    def _next_unit(self) -> tuple[Unit, Packets] | None:
        with self._turn:
            unit = next(self._units, None)
            if unit is None:
                return None
            self._await_room(unit.row)
            return unit, self._reader.read(unit.first, unit.last)

    def _store(self, resize: Resizer, row: int, picture: Any, is_substitute: bool) -> None:
        block, at = self._block(row)
        resize(picture, block[at].numpy())
        with self._change:
            if is_substitute:
                self._substituted.add(row)
            self._left[row // self._group] -= 1
            if self._left[row // self._group] == 0:
                self._change.notify_all()

    def _await_room(self, row: int) -> None:
        """Wait until a row lies in the window; leave the worker when the decoder is closed."""
        with self._change:
            self._change.wait_for(
                lambda: row < self._delivered + self._window or self._closed or self._error
            )
            if self._closed or self._error:
                raise _Stop

    def _block(self, row: int) -> tuple[Tensor, int]:
        """The block of memory that holds a row, and where in it."""
        number, at = divmod(row, self._group)
        with self._change:
            if number not in self._blocks:
                count = min(self._group, len(self._ranks) - number * self._group)
                self._blocks[number] = torch.empty((count, 3, *self._size), dtype=torch.uint8)
                self._left[number] = count
            return self._blocks[number], at


class _Stop(Exception):
    """Unwinds a worker whose decoder was closed, or whose fellow failed."""


def _alive(thread: threading.Thread) -> bool:
    return thread.is_alive()
