"""A stranger: what he tries on the ports, processes and files of a run that is not his.

Started by `benchmarks/attack.py` as root, perhaps on another machine: becomes another user, and knows nothing
of the project. Reads orders, lines of JSON, and obeys the newest one until its input ends; writes lines of
JSON, the last of which has what he did, what he heard and what he got at.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import random
import resource
import select
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOBODY = 65534
FLOOD = 1100
"""Connections that are held open at once."""
KINDS = (
    "nothing", "HTTP", "TLS", "noise", "lines", "hellos", "pickles", "recorded", "flood",
    "processes", "files",
)  # fmt: skip
SPARED = ("noise", "flood")
"""Not done to torch's own ports, to which the rest is said once in each phase: gloo keeps all connections."""
NONCE = b"0" * 64
HELLO = b'{"do": "hello", "node_rank": 1, "ranks": 1, "command": {}, "host": "stranger"}\n'


class Canary:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def messages(order: dict[str, Any]) -> dict[str, list[bytes]]:
    """What is said, by its kind."""
    pickled = pickle.dumps(Canary(order["canary"]))
    sized = [len(pickled).to_bytes(size, kind) + pickled for size, kind in ((8, "little"), (4, "big"))]
    guessed = NONCE + b"\n" + NONCE
    lost = b'{"do": "lost"}\n{"do": "ended", "status": 1}\n'
    return {
        "nothing": [b""],
        "HTTP": [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"],
        "TLS": [bytes.fromhex("16030100c5010000c10303") + bytes(200)],
        "noise": [random.randbytes(1 << 16), bytes(4096), b"\x01" + bytes(7) + b"\x01" + bytes(4096)],
        "lines": [b"\xff" * (1 << 21), b"0" * 63, b"[" * 60_000 + b"\n"],
        "hellos": [HELLO, guessed + HELLO, guessed + lost, lost],
        "pickles": [pickled, *sized, base64.b64encode(pickled) + b"\n"],
        "recorded": [bytes.fromhex(text) for text in order["recorded"]],
    }


class Stranger:
    """What he did, heard and got at; `newest` gives the order that counts, and None once there is none."""

    def __init__(self, newest: Callable[[], dict[str, Any] | None]) -> None:
        self._newest = newest
        self.connections: dict[str, int] = {}  # by phase
        self.refused: dict[str, int] = {}
        self.most_at_once = self.bytes_sent = self.denied = self.rounds = 0
        self.heard: set[str] = set()
        self.got_at: set[str] = set()
        self._said: set[tuple[str, Any, str]] = set()

    def attack(self) -> None:
        """Everything once, each thing as the newest order says; until there is none."""
        for kind in KINDS:
            order = self._newest()
            if order is None:
                return
            phase = order["phase"]
            for port in map(place, order["ports"]):
                for message in messages(order).get(kind, []):
                    self.say(port, message)
                if kind == "flood":
                    self.flood(port)
            for port in map(place, order["torch"]):
                if kind not in SPARED and (phase, port, kind) not in self._said:
                    self._said.add((phase, port, kind))
                    for message in messages(order).get(kind, []):
                        self.say(port, message)
            if kind == "processes":
                for process in order["processes"]:
                    self.look_into(process, order["looks_for"])
            if kind == "files":
                for folder in order["folders"]:
                    self.search(Path(folder), order["looks_for"])
        self.rounds += 1

    def connect(self, port: Any, seconds: float = 1.0) -> socket.socket | None:
        """A connection, counted in the phase of now; None where there is nobody, or nobody for us in time."""
        order = self._newest()
        if order is None:
            return None
        phase = order["phase"]
        kind = (
            socket.AF_UNIX if isinstance(port, str) else socket.AF_INET6 if ":" in port[0] else socket.AF_INET
        )
        connection = socket.socket(kind)
        connection.settimeout(seconds)
        try:
            connection.connect(port)
        except OSError:
            connection.close()
            self.refused[phase] = self.refused.get(phase, 0) + 1
            return None
        self.connections[phase] = self.connections.get(phase, 0) + 1
        return connection

    def say(self, port: Any, message: bytes) -> None:
        """Say it, and hear what comes within a moment."""
        connection = self.connect(port)
        if connection is None:
            return
        heard = b""
        with contextlib.closing(connection), contextlib.suppress(OSError):
            self.bytes_sent += len(message)
            connection.sendall(message)
            connection.settimeout(0.05)
            while part := connection.recv(1 << 16):
                heard += part
        if heard:
            self.heard.add(heard.hex())

    def flood(self, port: Any) -> None:
        """Hold many connections open at once; in half of them something has been said."""
        with contextlib.ExitStack() as stack:
            for number in range(FLOOD):
                # A full queue drops a request for a connection; the system asks again after 1, 3, 7 and 15 s.
                connection = self.connect(port, 1.0 if number == 0 else 30.0)
                if connection is None:
                    break
                stack.enter_context(contextlib.closing(connection))
                self.most_at_once = max(self.most_at_once, number + 1)
                if number % 2:
                    with contextlib.suppress(OSError):
                        connection.sendall(random.randbytes(16))

    def look_into(self, process: int, looks_for: list[str]) -> None:
        """Read what the system tells of a process, and try to end it."""
        for name in ("environ", "mem", "maps", "cmdline", "status", "stack", "io", "fd/1", "cwd", "root"):
            path = Path(f"/proc/{process}/{name}")
            if name == "mem":
                self.open(path, os.O_RDWR)  # what is in it is anybody's who can open it
            else:
                self.read(path, looks_for)
        for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
            try:
                os.kill(process, number)
                self.got_at.add(f"process {process} can be sent {number.name}")
            except OSError:  # also of one that is gone
                self.denied += 1

    def search(self, folder: Path, looks_for: list[str]) -> None:
        """Read every file that can be read, and try to write and to leave one of his own."""
        for path, _, names in os.walk(folder):
            for name in names:
                self.read(Path(path, name), looks_for)
                self.open(Path(path, name), os.O_WRONLY)
            if not os.stat(path).st_mode & stat.S_ISVTX:  # /tmp is for everyone
                self.open(Path(path, "stranger"), os.O_WRONLY | os.O_CREAT)

    def open(self, path: Path, flags: int) -> None:
        try:
            os.close(os.open(path, flags))
            self.got_at.add(f"{path} can be written")
        except OSError:
            self.denied += 1

    def read(self, path: Path, looks_for: list[str]) -> None:
        try:
            content = path.read_bytes() if not path.is_fifo() else b""
        except OSError:
            self.denied += 1
            return
        if any(bytes.fromhex(secret) in content for secret in looks_for):
            self.got_at.add(f"{path} tells a secret")


def place(port: Any) -> Any:
    """Of JSON as `connect` takes it: a path, or an address and a port."""
    return port.replace("@", "\0", 1) if isinstance(port, str) else tuple(port)


class Orders:
    """Lines on the standard input, of which the newest counts; None once that has ended."""

    def __init__(self) -> None:
        self._newest: dict[str, Any] | None = None
        self._rest = b""

    def newest(self) -> dict[str, Any] | None:
        """Wait for the first one, not for others."""
        while self._newest is None or select.select([0], [], [], 0.0)[0]:
            part = os.read(0, 1 << 20)
            if not part:
                return None
            *lines, self._rest = (self._rest + part).split(b"\n")
            self._newest = json.loads(lines[-1]) if lines else self._newest
        return self._newest


def main() -> None:
    """Become another user, and attack until the input ends; a line after each round and at the end."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    orders = Orders()
    stranger = Stranger(orders.newest)
    while orders.newest() is not None:
        stranger.attack()
        told = {name: value for name, value in vars(stranger).items() if not name.startswith("_")}
        told |= {name: sorted(value) for name, value in told.items() if isinstance(value, set)}
        print(json.dumps(told), flush=True)
        time.sleep(1)


if __name__ == "__main__":
    main()
