"""Decoding in worker processes, which write rows into memory that they share with this one.

A process is for callers that run much Python beside the decoder: a thread would have to wait for
the GIL several times a packet.
"""

import json
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from tokenprune.errors import DecodeError, MediaError
from tokenprune.media.decode.plan import DecodeUnit
from tokenprune.media.decode.rows import Pixels, Ring, Rows
from tokenprune.media.decode.worker import UnitDecoder
from tokenprune.media.index.index import PacketIndex

__all__ = ["Job", "LimitRequest", "Message", "ProcessWorker", "RowStored", "UnitDone", "serve"]

# Nothing that is imported here imports torch, which would cost each process seconds and hundreds of
# MiB. The package is looked for where the caller found it, by whatever means; and the caller's main
# module is not imported, so scripts need no guard.
BOOT = """
import json, sys, types
descriptor, folder, sys.path[:] = json.loads(sys.argv[1])
package = sys.modules["tokenprune"] = types.ModuleType("tokenprune")
package.__path__ = [folder]
from tokenprune.media.decode.process import serve
serve(descriptor)
"""


@dataclass(frozen=True, eq=False)
class Job:
    """The first message to a worker process: all that stays the same."""

    index: PacketIndex
    size: tuple[int, int]
    slots: int
    workers: int
    number: int
    threads: int
    descriptor: int


@dataclass(frozen=True)
class LimitRequest:
    """A worker asks how far it may write; if it waits, until a row may be written."""

    row: int
    waits: bool


@dataclass(frozen=True)
class RowStored:
    """A worker has written a row."""

    row: int
    is_substitute: bool


class UnitDone:
    """A worker has decoded its unit."""


Message = LimitRequest | RowStored | UnitDone | Exception


class ProcessWorker:
    """Drives a worker process, from a thread of this process.

    Args:
        index: the packet index.
        size: height and width of the rows.
        threads: frame threads inside the codec.
        rows: the rows, whose memory is `ring`.
        ring: shared memory.
        number: of this worker, whose counters it uses.
    """

    def __init__(
        self,
        index: PacketIndex,
        size: tuple[int, int],
        threads: int,
        rows: Rows,
        ring: Ring,
        number: int,
    ) -> None:
        self._rows = rows
        ours, theirs = socket.socketpair()
        folder = str(Path(__file__).parents[2])
        with theirs:
            arguments = json.dumps([theirs.fileno(), folder, [p for p in sys.path if p]])
            self._process = subprocess.Popen(
                [sys.executable, "-c", BOOT, arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), ring.descriptor),
                start_new_session=True,  # an interrupt of the caller is the caller's to handle
            )
        self._connection = Connection(ours.detach())
        slots, workers = len(ring.rows), len(ring.counters)
        self._send(Job(index, size, slots, workers, number, threads, ring.descriptor))

    def decode(self, unit: DecodeUnit) -> None:
        """See `UnitDecoder`."""
        self._send(unit)
        while not isinstance(message := self._receive(), UnitDone):
            if isinstance(message, Exception):
                raise message
            if isinstance(message, RowStored):
                self._rows.stored(message.row, message.is_substitute)
            else:
                if message.waits:
                    self._rows.await_room(message.row)
                self._rows.check()
                self._send(self._rows.limit)

    def kill(self) -> None:
        """End the process at once; a thread that waits for its message is woken."""
        self._process.kill()

    def close(self) -> None:
        """End the process and wait for its end."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            self._raise_ended()

    def _receive(self) -> Message:
        try:
            message: Message = self._connection.recv()
            return message
        except (OSError, EOFError):
            self._raise_ended()

    def _raise_ended(self) -> NoReturn:
        """Raise why the process has ended."""
        self._rows.check()  # it was ended on purpose
        code = self._process.wait()
        why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise RuntimeError(f"a decoding process died ({why}); is there enough memory for it?")


class _RemoteRows:
    """The rows, as a worker process sees them."""

    def __init__(self, connection: Connection, ring: Ring) -> None:
        self._connection, self._ring = connection, ring
        self._limit = 0

    def offer(self, row: int, *, waits: bool) -> Pixels | None:
        """See `RowSink`."""
        if row >= self._limit:
            self._connection.send(LimitRequest(row, waits))
            self._limit = self._connection.recv()
        return self._ring[row] if row < self._limit else None

    def stored(self, row: int, is_substitute: bool) -> None:
        """See `RowSink`."""
        self._connection.send(RowStored(row, is_substitute))

    def check(self) -> None:
        """See `RowSink`; a process is not asked to stop, but killed."""


def serve(descriptor: int) -> None:
    """Run as a worker process: decode units until the caller is gone.

    Args:
        descriptor: of the socket to the caller.
    """
    connection = Connection(descriptor)
    try:
        job: Job = connection.recv()
        decoder = None
        while True:
            unit: DecodeUnit = connection.recv()
            try:
                decoder = decoder or _decoder(job, connection)
                decoder.decode(unit)
            except (BrokenPipeError, ConnectionResetError, EOFError):
                raise
            except MediaError as error:
                connection.send(error)
            except Exception as error:  # of any kind, perhaps one that cannot be sent
                connection.send(DecodeError(f"{type(error).__name__}: {error}"))
            else:
                connection.send(UnitDone())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _decoder(job: Job, connection: Connection) -> UnitDecoder:
    ring = Ring(job.slots, job.size, job.workers, job.descriptor)
    rows = _RemoteRows(connection, ring)
    return UnitDecoder(job.index, job.size, job.threads, rows, ring.counters[job.number])
