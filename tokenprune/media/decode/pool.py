"""The pool of decoding workers: they share the plan's units and deliver groups in order."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import DecodeError, MediaError
from tokenprune.media.decode.effort import WorkSpan
from tokenprune.media.decode.plan import DecodeUnit, plan_units
from tokenprune.media.decode.process import ProcessWorker
from tokenprune.media.decode.rows import Ring, Rows, Stopped
from tokenprune.media.decode.worker import UnitDecoder
from tokenprune.media.index.index import Ints, PacketIndex

__all__ = ["DecodedGroup", "FrameDecoder", "WorkerKind"]

WorkerKind = Literal["thread", "process"]
AHEAD_BYTES = 32 << 20  # of frames decoded ahead at most, if that is more than a group
CLOSE_SECONDS = 5.0  # after this a thread is left behind: it hangs in the file system


@dataclass(frozen=True, eq=False)
class DecodedGroup:
    """Consecutive ones of the frames asked for, decoded.

    Attributes:
        frames: uint8 `[G, 3, H, W]`.
        first: row of its first frame among those asked for.
        substituted: `[G]` bool, True where a damaged frame was replaced by the nearest earlier one.
        wait_seconds: time the caller waited for it.
        effort: when workers decoded it, by `time.perf_counter`; empty where that is not known.
    """

    frames: Tensor
    first: int
    substituted: Tensor
    wait_seconds: float
    effort: tuple[WorkSpan, ...] = ()


class FrameDecoder:
    """Decodes frames by rank in several workers; use it as a context manager.

    Memory is bounded: no frame is written that lies `window` frames or more after the last group
    delivered. The decode unit that holds the next frame due is always being decoded, and never
    waits.

    Args:
        index: the packet index of the file.
        ranks: `[F]` presentation ranks, strictly increasing.
        size: height and width of the frames.
        bounds: `[G + 1]` rows at which groups begin, and F.
        window: frames in memory at most, besides those delivered; fewer where they are large, but
            a group always.
        workers: how many.
        worker_kind: threads of this process, or processes that share memory with it.
        timeout_seconds: give up when no worker makes progress for so long.
    """

    def __init__(
        self,
        index: PacketIndex,
        ranks: Ints,
        size: tuple[int, int],
        *,
        bounds: Ints,
        window: int,
        workers: int,
        worker_kind: WorkerKind = "thread",
        timeout_seconds: float = 60.0,
    ) -> None:
        self._index, self._size, self._bounds = index, size, bounds
        self._timeout = timeout_seconds
        units = plan_units(index, ranks, workers)
        self._units = iter(units)
        self._turn = threading.Lock()  # units are begun in order
        largest = int(np.diff(bounds).max())
        window = min(window, AHEAD_BYTES // (3 * size[0] * size[1]))
        window = min(len(ranks), max(window, largest))
        # Units being decoded at a time; one more may be begun. Cores that are left serve the codec
        # as frame threads.
        at_once = max(1, len(units) * window // len(ranks))
        self._codec_threads = max(1, workers // at_once)
        workers = min(workers, len(units), at_once + 1)
        self._ring = Ring(window, size, workers) if worker_kind == "process" else None
        self._counters = np.zeros((workers, 2), np.int64) if not self._ring else self._ring.counters
        self._rows = Rows(bounds, size, window, self._ring)
        self._processes: list[ProcessWorker] = []
        self._threads = [
            threading.Thread(
                target=self._work, args=(number,), name=f"tokenprune-decode-{number}", daemon=True
            )
            for number in range(workers)
        ]

    def __enter__(self) -> "FrameDecoder":
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # the system has no more threads to give
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers and wait for them."""
        self._rows.close()
        for process in list(self._processes):
            process.kill()
        end = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))
        if self._ring:
            self._ring.close()

    @property
    def pictures_decoded(self) -> int:
        """Frames that came out of all decoders so far, those not asked for included."""
        return int(self._counters[:, 0].sum())

    @property
    def bytes_read(self) -> int:
        """Bytes of the video's packets that all workers read so far."""
        return int(self._counters[:, 1].sum())

    def groups(self) -> Iterator[DecodedGroup]:
        """The groups, in order.

        Raises:
            DecodeError: nothing near a wanted frame could be decoded, a worker failed, or none made
                progress in time.
        """
        for number, first in enumerate(self._bounds[:-1].tolist()):
            begin = time.perf_counter()
            frames, substituted = self._take(number)
            waited = time.perf_counter() - begin
            yield DecodedGroup(frames, first, substituted, waited, self._rows.effort(number))

    def _take(self, number: int) -> tuple[Tensor, Tensor]:
        try:
            frames, substituted = self._rows.take(
                number,
                is_alive=lambda: any(thread.is_alive() for thread in self._threads),
                progress=lambda: int(self._counters.sum()),
                timeout_seconds=self._timeout,
            )
            return torch.from_numpy(frames), torch.from_numpy(substituted)
        except MediaError:
            raise
        except Exception as error:
            raise DecodeError(f"cannot decode {self._index.info.path!r}: {error}") from error

    def _work(self, number: int) -> None:
        """One worker: take the next unit, decode it, until there is none."""
        unit = None
        try:
            worker = self._worker(number)
            try:
                while (unit := self._next_unit()) is not None:
                    with self._rows.at_work():
                        worker.decode(unit)
            finally:
                worker.close()
        except Stopped:
            pass
        except BaseException as error:  # shown where the frames are awaited
            self._rows.fail(error, unit.row if unit else None)
        finally:
            self._rows.wake()

    def _worker(self, number: int) -> UnitDecoder | ProcessWorker:
        index, size, threads = self._index, self._size, self._codec_threads
        if self._ring is None:
            return UnitDecoder(index, size, threads, self._rows, self._counters[number])
        worker = ProcessWorker(index, size, threads, self._rows, self._ring, number)
        self._processes.append(worker)
        return worker

    def _next_unit(self) -> DecodeUnit | None:
        with self._turn:
            unit = None if self._rows.failed else next(self._units, None)
            if unit is not None:
                self._rows.await_room(unit.row)
            return unit
