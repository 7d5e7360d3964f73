"""One call of an object at a time: those of other threads wait."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, cast

from tokenprune.errors import TokenPruneError

__all__ = ["Turn", "takes_a_turn"]


class Turn:
    """A lock that says so where waiting for it would never end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    def __enter__(self) -> None:
        if self._thread == threading.get_ident():
            raise TokenPruneError(
                "this session is in the middle of a call, and was called again from within it, as "
                "by a streamer; call it when it has returned, or from another thread, which waits"
            )
        self._lock.acquire()
        self._thread = threading.get_ident()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread = None
        self._lock.release()


_Method = TypeVar("_Method", bound=Callable[..., Any])


def takes_a_turn(method: _Method) -> _Method:
    """A method that waits until no other of its object runs; the object keeps a `Turn` as `_turn`.

    Raises:
        TokenPruneError: It is called from within another of them.
    """

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._turn:
            return method(self, *args, **kwargs)

    return cast(_Method, alone)
