"""How many CPU cores this process may use: affinity mask, and quota of a container."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from tokenprune.errors import MediaError

__all__ = ["cpu_limit", "worker_count"]


def worker_count(workers: int | None) -> int:
    """The number of workers asked for, checked; None means one for each core we may use.

    Raises:
        MediaError: the number is below 1.
    """
    if workers is None:
        return cpu_limit()
    if workers < 1:
        raise MediaError(f"workers must be at least 1, got {workers}; None means all cores")
    return workers


def cpu_limit() -> int:
    """Cores this process may use: the least of affinity mask and cgroup quota."""
    count: int | None = getattr(os, "process_cpu_count", os.cpu_count)()
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    return max(1, min(count or 1, _quota()))


def _quota() -> int:
    """Cores granted by the cgroups (v2 and v1) we are in, rounded up."""
    granted = [1 << 16]
    for folder in _cgroups():
        for read in (_quota_v2, _quota_v1):
            try:
                granted.append(max(1, math.ceil(read(folder))))
            except (OSError, ValueError):
                continue
    return min(granted)


def _cgroups() -> Iterator[Path]:
    """Folders of our cgroups and of all above them; in a container only its own is seen."""
    root = Path("/sys/fs/cgroup")
    yield from (root, root / "cpu")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "" or "cpu" in kinds.split(","):
            mount = root / "cpu" if kinds else root
            group = mount / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if mount in folder.parents)


def _quota_v2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text().split()
    return float(int(quota)) / int(period)  # "max" is no number: no limit


def _quota_v1(folder: Path) -> float:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    if quota < 0:
        raise ValueError("no limit")
    return quota / int((folder / "cpu.cfs_period_us").read_text())
