"""The plan: which runs of packets to decode, so that every wanted frame comes out and little else.

A run starts at a keyframe and ends at the packet of its last wanted frame. Packets outside all
runs are never fed to a decoder.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import MediaError
from tokenprune.media.index.index import Ints, PacketIndex


@dataclass(frozen=True, eq=False)
class Unit:
    """One run of packets, the work of one worker.

    Attributes:
        first: packet where decoding begins, a keyframe.
        last: packet of the last wanted frame, in decode order.
        row: row of the output that its first frame fills; the others follow.
        ranks: `[R]` presentation ranks of the wanted frames, increasing.
        size_bytes: what is read and decoded, the measure of its cost.
    """

    first: int
    last: int
    row: int
    ranks: Ints
    size_bytes: int


def plan_units(index: PacketIndex, ranks: Ints, workers: int = 1) -> list[Unit]:
    """Cut the wanted frames into units, in order.

    Runs that overlap are one unit, unless it is so long that other workers would have to wait for
    its end: then it is cut where little is decoded twice.

    Args:
        index: the packet index.
        ranks: `[F]` presentation ranks, strictly increasing.
        workers: how many will share the units.
    """
    if not index.timed:  # frames are told apart by counting, which must begin at the first packet
        last = min(len(index.pts), int(ranks[-1]) + 64) - 1
        return [Unit(0, last, 0, ranks, int(index.size[: last + 1].sum()))]
    packets = index.order[ranks]
    starts = decode_starts(index, packets)
    cost = _cost(index)
    longest = float(cost[-1]) if workers == 1 else _wanted(cost, starts, packets) / (4 * workers)
    units = []
    row = 0
    while row < len(ranks):
        first, last, end = int(starts[row]), int(packets[row]), row + 1
        while end < len(ranks) and starts[end] <= last:
            done, twice = cost[last + 1] - cost[first], cost[last + 1] - cost[starts[end]]
            if starts[end] > starts[end - 1] and done > longest and 4 * twice < done:
                break
            last = max(last, int(packets[end]))
            first = min(first, int(starts[end]))
            end += 1
        units.append(
            Unit(first, last, row, ranks[row:end], int(index.size[first : last + 1].sum()))
        )
        row = end
    return units


def _cost(index: PacketIndex) -> NDArray[np.float64]:
    """`[P + 1]` the cost of decoding all packets before each: some by the byte, some by the pixel.

    At the rates of usual files (1080p, 4 Mbit/s) both weigh the same.
    """
    pixels = index.info.height * index.info.width / 128
    return np.concatenate([[0.0], np.cumsum(index.size + pixels)])


def _wanted(cost: NDArray[np.float64], starts: Ints, packets: Ints) -> float:
    """The cost of all packets that lie between a wanted frame and its start, each counted once."""
    change = np.zeros(len(cost), np.int64)
    np.add.at(change, starts, 1)
    np.add.at(change, packets + 1, -1)
    return float(np.diff(cost)[np.cumsum(change)[:-1] > 0].sum())


def decode_starts(index: PacketIndex, packets: Ints) -> Ints:
    """The packets `[F]` to begin at so that `packets` `[F]` are decoded exactly.

    That is the keyframe before; or, for one that is shown before that keyframe (a leading picture
    of an open group), the keyframe before that, since it may refer to pictures of both groups.
    """
    starts, place, epoch = index.starts, index.place, index.epoch
    at = np.searchsorted(starts, packets, "right") - 1
    while True:
        back = (at > 0) & (place[packets] < place[starts[at]])
        back &= epoch[starts[np.maximum(at - 1, 0)]] == epoch[packets]
        if not back.any():
            return starts[at]
        at = at - back


def has_leading(index: PacketIndex) -> bool:
    """Whether some frames are shown before the keyframe that they follow: open groups."""
    packets = index.order
    before = index.starts[np.searchsorted(index.starts, packets, "right") - 1]
    return bool((decode_starts(index, packets) != before).any())


def earlier_start(index: PacketIndex, first: int, keyframes: int) -> int:
    """The packet `keyframes` keyframes before `first`, within the same stretch of the clock."""
    starts = index.starts
    at = int(np.searchsorted(starts, first, "right")) - 1
    back = max(0, at - keyframes)
    while back < at and index.epoch[starts[back]] != index.epoch[first]:
        back += 1
    return int(starts[back])


def worker_count(workers: int | None) -> int:
    """Check the number of workers asked for; None means one for each core we may use.

    Raises:
        MediaError: the number is below 1.
    """
    if workers is None:
        return cpu_limit()
    if workers < 1:
        raise MediaError(f"workers must be at least 1, got {workers}; None means all cores")
    return workers


def cpu_limit() -> int:
    """Cores this process may use: the least of affinity mask and container quota."""
    count: int | None = getattr(os, "process_cpu_count", os.cpu_count)()
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    return max(1, min(count or 1, _quota()))


def _quota() -> int:
    """Cores granted by the control groups (versions 2 and 1) we are in, rounded up."""
    granted = [1 << 16]
    for folder in _control_groups():
        for read in (_quota_v2, _quota_v1):
            try:
                granted.append(max(1, math.ceil(read(folder))))
            except (OSError, ValueError):
                continue
    return min(granted)


def _control_groups() -> Iterator[Path]:
    """Their folders, with those of all groups above them; in a container only its own is seen."""
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
