"""Which sockets a process and everything below it listen at, as Linux tells it in /proc."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

Place = tuple[str, int] | str
"""An address and a port, or the path of a Unix socket; `@` where that has no file."""

_TCP_LISTENS, _UNIX_LISTENS = "0A", "00010000"


def listening(parent: int) -> dict[int, list[Place]]:
    """Every process of the family, and the places at which it listens."""
    return {process: _places_of(process) for process in family_of(parent)}


def family_of(parent: int) -> list[int]:
    """A process and everything below it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                ancestor = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(ancestor, []).append(int(folder.name))
    found = [parent]
    for process in found:
        found += children.get(process, [])
    return found


def address_in(text: str) -> str:
    """An address of /proc/net, words in the machine's own order of bytes, as it is written elsewhere."""
    raw = b"".join(bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def _places_of(process: int) -> list[Place]:
    folder = Path(f"/proc/{process}")
    names = []
    try:
        for descriptor in (folder / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                names.append(os.readlink(descriptor))
        tcp = [(folder / "net" / kind).read_text().splitlines()[1:] for kind in ("tcp", "tcp6")]
        unix = (folder / "net" / "unix").read_text().splitlines()[1:]
    except OSError:  # it has ended
        return []
    held = {name.removeprefix("socket:[").rstrip("]") for name in names if name.startswith("socket:")}
    found: list[Place] = []
    for row in (line.split() for lines in tcp for line in lines):
        if row[3] == _TCP_LISTENS and row[9] in held:
            address, port = row[1].split(":")
            found.append((address_in(address), int(port, 16)))
    for row in map(str.split, unix):
        if row[3] == _UNIX_LISTENS and row[6] in held and len(row) > 7:
            found.append(row[7])
    return found
