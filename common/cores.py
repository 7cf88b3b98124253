"""How many processors this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def count_cores() -> int:
    """CPU cores this process may use: its affinity, or less where the container has a quota."""
    affine = getattr(os, "sched_getaffinity", None)
    cores = len(affine(0)) if affine is not None else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or the word max: no quota
        return cores
