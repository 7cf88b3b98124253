"""Memory that ran out: of a device, whose rank says how much it asked for, or of the machine.

Takes the exception that torch raises, or reads the kernel's count of processes that it killed. Imports
nothing heavy.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

OUT_OF_MEMORY = 12
"""Exit status of a rank whose device is out of memory (ENOMEM); the controller then names ways out."""

_SIZE = r"([\d.]+ [KMGT]?i?B)"


def shortage(error: BaseException) -> str | None:
    """In one line, for torch's OutOfMemoryError; None for any other error."""
    if type(error).__name__ != "OutOfMemoryError":
        return None
    text = str(error)
    asked = re.search(rf"Tried to allocate {_SIZE}", text)
    room = re.search(rf"total capacity of {_SIZE} of which {_SIZE} is free", text)
    said = "out of memory on the device"
    if asked is not None:
        said += f": {asked[1]} more were needed"
    if room is not None:
        said += f", {room[2]} of {room[1]} were free"
    return said


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed for want of memory: of this control group where that is
    counted, else of this machine; 0 where neither is.
    """
    for file in _counts(root):
        with contextlib.suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE):
                return int(found[1])
    return 0


def _counts(root: Path) -> Iterator[Path]:
    groups = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                yield groups / group.lstrip("/") / "memory.events"
            elif controllers == "memory":  # the first version of control groups
                yield groups / "memory" / group.lstrip("/") / "memory.oom_control"
    yield root / "proc/vmstat"
