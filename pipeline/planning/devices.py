"""What memory there is on this machine, in bytes. Asks the kernel and the driver's own tool."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")
"""What the kernel says of the container that this process is in."""


def machine_memory() -> dict[str, int]:
    """All numbers of /proc/meminfo: MemTotal, MemAvailable, ..."""
    lines = re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return {name: 1024 * int(number) for name, number in lines}


def container_limit() -> int | None:
    """Memory that the container may use; None without a limit."""
    try:
        return int((GROUP / "memory.max").read_text())
    except (OSError, ValueError):  # no such file, or the word max
        return None


def host_memory() -> int | None:
    """Memory of this machine, or of the container where that has a limit; None where it cannot be seen."""
    try:
        total = machine_memory()["MemTotal"]
    except (OSError, KeyError):
        return None
    return min(total, container_limit() or total)


def gpu_memory() -> int | None:
    """Memory of the smallest GPU; None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        return min(int(line) for line in asked.stdout.split()) * 2**20
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def host_memory_per_rank(gpu: bool, ranks_here: int) -> float | None:
    """A rank's share of host memory beside its GPU; None where that cannot be seen, and on the CPU, where
    it is `memory_per_rank`."""
    total = host_memory() if gpu else None
    return None if total is None else total / ranks_here


def memory_per_rank(gpu: bool, ranks_here: int) -> int | None:
    """What a rank may use: a GPU, or its share of this machine."""
    if gpu:
        return gpu_memory()
    total = host_memory()
    return None if total is None else total // ranks_here
