"""Time stamps that do not make an accelerator wait."""

from __future__ import annotations

import math
import time

import torch
from torch import nn

__all__ = ["Clock", "Mark"]


class Mark:
    """A moment in the work of a module's device; of none, where a forward is traced to compile."""

    def __init__(self, module: nn.Module) -> None:
        self._event: torch.cuda.Event | None = None
        if torch.compiler.is_compiling():
            self._seconds = math.nan  # asking for the time would break the graph
            return
        self._seconds = time.perf_counter()
        parameter = next(module.parameters(), None)
        if parameter is not None and parameter.device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(parameter.device))

    def seconds_since(self, earlier: Mark) -> float:
        """Seconds between two moments, nan if one is of no time; waits for the later one."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000.0

    def later(self, seconds: float) -> float:
        """Seconds from this moment to when `time.perf_counter` shows some."""
        return seconds - self._seconds


class Clock:
    """One time for what the CPU does and what the device of a module does.

    Args:
        module: Whose device counts.
        at: The time it shows now, in seconds.
    """

    def __init__(self, module: nn.Module, at: float = 0.0) -> None:
        parameter = next(module.parameters(), None)
        if parameter is not None and parameter.device.type == "cuda":
            torch.cuda.synchronize(parameter.device)  # from here on both are at the same moment
        self._start = Mark(module)
        self._at = at

    def of(self, mark: Mark) -> float:
        """Seconds it showed at a moment; nan if that is of no time."""
        return self._at + mark.seconds_since(self._start)

    def of_host(self, seconds: float) -> float:
        """Seconds it showed when `time.perf_counter` showed some."""
        return self._at + self._start.later(seconds)
