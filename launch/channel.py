"""A connection between two machines of a run, in lines of JSON.

Takes a connected socket; sends and returns messages, dictionaries with what to `do`. Knows nothing of what
they mean. Whatever goes wrong closes it, and nothing is raised: the caller looks at `is_open`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import select
import socket
import struct
from typing import Any

SEND_SECONDS = 10.0
_LONGEST_LINE = 2**16
_SIOCGIFADDR = 0x8915  # linux/sockios.h


class Channel:
    """A connection to another machine, in lines of JSON. Closed by a failure of any kind."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""
        self.is_open = True
        self.own_address = str(connection.getsockname()[0]).removeprefix("::ffff:")
        """this machine's, as the other one sees it"""
        connection.settimeout(SEND_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # a machine that lost its power or its cable says nothing: it is lost after half a minute of silence
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)

    def fileno(self) -> int:
        """For select()."""
        return self._socket.fileno()

    def send(self, does: str, **values: Any) -> None:
        """Send one message."""
        try:
            self._socket.sendall(json.dumps({"do": does, **values}).encode() + b"\n")
        except OSError:
            self.close()

    def receive(self, seconds: float = 0.0) -> list[dict[str, Any]]:
        """The messages that are there, or that come within so many seconds."""
        try:
            if not self.is_open or not select.select([self], [], [], seconds)[0]:
                return []
            read = self._socket.recv(_LONGEST_LINE)
        except (OSError, ValueError):
            read = b""
        *lines, self._buffer = (self._buffer + read).split(b"\n")
        if not read or len(self._buffer) > _LONGEST_LINE:
            self.close()
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            messages = [None]
        if not all(isinstance(message, dict) and "do" in message for message in messages):
            self.close()  # something that is not one of us
            return []
        return messages

    def close(self) -> None:
        """Hang up."""
        self.is_open = False
        with contextlib.suppress(OSError):
            self._socket.close()


def interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address; None when there is none, or where Linux is not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
