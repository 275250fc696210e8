"""How many cores this process may keep busy."""

import math
import os
from pathlib import Path
from typing import Final

_CGROUP: Final = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Logical cores that this process may run on (`taskset`, cpusets), at most as many as its CPU quota pays for.

    `cgroup` is where the control group's files lie. The quota is rounded up to whole cores; at least 1.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = cpu_quota(cgroup)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota(cgroup: Path) -> float | None:
    """CPU time per time that the group may use, in cores; None without a limit or without control groups.

    Version 2 (`cpu.max`: "max 100000" or "150000 100000") or 1 (`cpu/cpu.cfs_quota_us`, -1 for none, and the period).
    """
    try:
        words = _read(cgroup / "cpu.max") or _read(cgroup / "cpu/cpu.cfs_quota_us") + _read(
            cgroup / "cpu/cpu.cfs_period_us"
        )
        quota, period = (int(word) for word in words)
    except ValueError:
        # "max", or nothing that can be understood: no limit is known.
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
