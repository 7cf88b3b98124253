"""Servers that take their time."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def saying(parts: Callable[[], Iterator[bytes]]) -> Iterator[tuple[int, threading.Event]]:
    """A server that says these bytes, one part every 10 ms, to whoever comes, whatever he says.

    Gives its port, and an event that is set when he has hung up before all was said.
    """
    hung_up, closing = threading.Event(), threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(5.0)
            connection.recv(2**16)
            try:
                for part in parts():
                    connection.sendall(part)
                    if closing.wait(0.01):
                        return
            except OSError:
                hung_up.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while not closing.is_set():
                    answer(listener.accept()[0])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1], hung_up
        finally:
            closing.set()
            with contextlib.suppress(OSError):
                socket.create_connection(listener.getsockname()).close()
            thread.join()


def dripping(*beginning: bytes) -> Callable[[], Iterator[bytes]]:
    """The parts, and the last of them again without an end."""
    return lambda: itertools.chain(beginning, itertools.repeat(beginning[-1]))
