"""When workers were decoding which group of frames."""

import threading
import time
from collections import defaultdict

__all__ = ["Effort", "WorkSpan"]

WorkSpan = tuple[float, float]
"""When some work began and ended, in seconds of `time.perf_counter`."""

GAP_SECONDS = 1e-3  # shorter pauses of a worker are none


class Effort:
    """Records when workers decode; each reports from its own thread. Its users hold a lock.

    The time between two rows belongs to the group of the later one: frames in between were decoded
    for its sake.

    Args:
        groups: how many.
    """

    def __init__(self, groups: int) -> None:
        self._since: dict[int, float] = {}  # by thread that is at work
        self._spans: list[dict[int, list[WorkSpan]]] = [defaultdict(list) for _ in range(groups)]

    def begin(self) -> None:
        """This thread starts to work."""
        self._since[threading.get_ident()] = time.perf_counter()

    def note(self, group: int) -> None:
        """What this thread has done since its last report was for this group."""
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
        """This thread pauses."""
        self._since.pop(threading.get_ident(), None)

    def spans(self, group: int) -> tuple[WorkSpan, ...]:
        """When workers were at a group, by their beginning; those of several may overlap."""
        return tuple(sorted(span for one in self._spans[group].values() for span in one))
