"""A connection between two machines of a run, in lines that carry the proof of who wrote them.

Takes a connected socket and the secret that the machines of a run share; sends and returns messages,
dictionaries with what to `do`. Each side begins with a nonce. Their key is the HMAC of both nonces under the
secret, and every line after them begins with its HMAC under that key, over the side that wrote it and its
number: nothing can be forged, repeated or sent back. Machine 0 proves first, with an empty message. Lines are
JSON, read once they are proved, and not encrypted. Whatever goes wrong closes the connection, and nothing is
raised: the caller looks at `is_open`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import secrets
import select
import socket
import struct
import time
from typing import Any

Message = dict[str, Any]

SEND_SECONDS = 10.0
_LONGEST_LINE = 2**16
_SEAL = 64
"""Characters of a nonce and of an HMAC-SHA256, in hexadecimal."""
_SIOCGIFADDR = 0x8915  # linux/sockios.h


class Channel:
    """A connection to another machine. Closed by a failure of any kind."""

    def __init__(self, connection: socket.socket, secret: bytes, *, is_machine_0: bool) -> None:
        self._socket, self._secret, self._is_machine_0 = connection, secret, is_machine_0
        self._buffer = b""
        self._key: bytes | None = None
        self._nonce = secrets.token_hex(_SEAL // 2).encode()
        self._sent = self._received = 0
        self.is_open = True
        self.since = time.monotonic()
        self.own_address = str(connection.getsockname()[0])
        """this machine's, as the other one sees it"""
        self.address = str(connection.getpeername()[0])
        """the other machine's"""
        connection.settimeout(SEND_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # a machine that lost its power or its cable says nothing: it is lost after half a minute of silence
        silence = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
        for option in silence.keys() & vars(socket):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), silence[option])
        self._write(self._nonce)

    def fileno(self) -> int:
        """For select()."""
        return self._socket.fileno()

    def send(self, does: str, **values: Any) -> None:
        """Send one message."""
        text = json.dumps({"do": does, **values}).encode()
        self._write(self._seal(text, self._sent, by_machine_0=self._is_machine_0) + text)
        self._sent += 1

    def receive(self, seconds: float = 0.0) -> list[Message]:
        """The messages that are there, or that come within so many seconds; all of them are proved."""
        end = time.monotonic() + seconds
        messages: list[Message] = []
        while not messages and self._read(max(0.0, end - time.monotonic())):
            *lines, self._buffer = self._buffer.split(b"\n")
            for line in lines:
                if self._key is None:
                    self._agree(line)
                    continue
                seal = self._seal(line[_SEAL:], self._received, by_machine_0=not self._is_machine_0)
                if not hmac.compare_digest(line[:_SEAL], seal):
                    self.close()
                    break
                self._received += 1
                messages.append(json.loads(line[_SEAL:]))
            if len(self._buffer) > _LONGEST_LINE:
                self.close()
        return messages

    def close(self) -> None:
        """Hang up."""
        self.is_open = False
        with contextlib.suppress(OSError):
            self._socket.close()

    def _agree(self, nonce: bytes) -> None:
        if len(nonce) != _SEAL:
            return self.close()
        nonces = (self._nonce, nonce) if self._is_machine_0 else (nonce, self._nonce)
        self._key = hmac.digest(self._secret, b" ".join(nonces), "sha256")
        if self._is_machine_0:
            self.send("prove")

    def _seal(self, text: bytes, number: int, *, by_machine_0: bool) -> bytes:
        assert self._key is not None, "nothing is said before the nonces"
        return hmac.digest(self._key, b"%d %d %s" % (by_machine_0, number, text), "sha256").hex().encode()

    def _write(self, line: bytes) -> None:
        try:
            self._socket.sendall(line + b"\n")
        except OSError:
            self.close()

    def _read(self, seconds: float) -> bool:
        """Whether anything came within so many seconds."""
        try:
            if not self.is_open or not select.select([self], [], [], seconds)[0]:
                return False
            read = self._socket.recv(_LONGEST_LINE)
        except (OSError, ValueError):
            read = b""
        self._buffer += read
        if not read:
            self.close()
        return bool(read)


def interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address; None when there is none, or where Linux is not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
