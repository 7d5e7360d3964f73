"""When workers were at work on which group of frames."""

import threading
import time
from collections import defaultdict

Span = tuple[float, float]
"""When something began and ended, in seconds of `time.perf_counter`."""

GAP_SECONDS = 1e-3  # shorter pauses of a worker are none


class Effort:
    """Notes what workers do; each tells in its own thread. Its users hold a lock.

    The time between two rows belongs to the group of the later one: pictures in between were
    decoded for its sake.

    Args:
        groups: how many.
    """

    def __init__(self, groups: int) -> None:
        self._since: dict[int, float] = {}  # by thread that is at work
        self._spans: list[dict[int, list[Span]]] = [defaultdict(list) for _ in range(groups)]

    def begin(self) -> None:
        """This thread sets to work."""
        self._since[threading.get_ident()] = time.perf_counter()

    def note(self, group: int) -> None:
        """What this thread has done since it last told was for this group."""
        thread, now = threading.get_ident(), time.perf_counter()
        since = self._since.get(thread)
        if since is None:
            return  # it only looked for work
        spans = self._spans[group][thread]
        if spans and since - spans[-1][1] < GAP_SECONDS:
            since = spans.pop()[0]
        spans.append((since, now))
        self._since[thread] = now

    def end(self) -> None:
        """This thread rests."""
        self._since.pop(threading.get_ident(), None)

    def spans(self, group: int) -> tuple[Span, ...]:
        """When workers were at a group, by their beginning; several may have been at a time."""
        return tuple(sorted(span for one in self._spans[group].values() for span in one))
