"""When tokens come, and how much memory an answer takes at its peak."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["PeakMemory", "Stopwatch", "resident"]


class Stopwatch:
    """A streamer that notes when tokens come; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if value.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class PeakMemory:
    """Measures memory at its peak beyond what was taken at the start.

    On an accelerator these are the bytes of tensors, elsewhere those of the process.

    Args:
        device: Whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        # Earlier work had a peak of its own: Linux forgets it on this word.
        Path("/proc/self/clear_refs").write_text("5")
        self._before = resident("VmRSS")

    def extra_bytes(self) -> int:
        """Bytes at the peak since the start, beyond those at the start."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) - self._before
        return resident("VmHWM") - self._before


def resident(name: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`), or at its peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
