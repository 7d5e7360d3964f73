"""Cores that may be used: affinity, and quotas of cgroups as Linux writes them."""

from pathlib import Path

import pytest

from tokenprune.media.decode import cores
from tokenprune.media.decode.cores import cpu_limit, worker_count


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"/sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"/sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"/sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"/sys/fs/cgroup/cpu.max": "1600000 100000"}, 8),  # more than there are
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/cpu.max": "300000 100000"}, 3),
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/b/cpu.max": "300000 100000",
                "/sys/fs/cgroup/a/cpu.max": "200000 100000",
            },
            2,
        ),
        (
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            {
                "/proc/self/cgroup": "3:memory:/m\n2:cpu,cpuacct:/x\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "250000",
                "/sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            3,
        ),
    ],
)
def test_cpu_limit(files, expected, monkeypatch):
    def read(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    assert 1 <= cpu_limit() <= 1 << 16
    assert worker_count(3) == 3
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 8)
    assert worker_count(None) == expected
