"""Calls that nobody waits for: a thread of its own makes them, one after the other, in the order they
came.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Background:
    """One such thread, which ends with the process. Calls must not raise."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def close(self, seconds: float) -> bool:
        """Take no more; whether all calls were made within so many seconds."""
        self._calls.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
