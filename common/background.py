"""Work in threads that end with the process: calls that nobody waits for, one after the other in the order
they came (`Background`), and one whose result is asked for later (`in_background`)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


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


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Begin `work` in a thread of this name, which does not keep the process from ending."""
    future: Future[T] = Future()
    threading.Thread(target=_into, args=(future, work), name=name, daemon=True).start()
    return future


def at_once(work: Callable[[], T]) -> Future[T]:
    """Do `work` now; what it raises is raised where the result is asked for."""
    future: Future[T] = Future()
    _into(future, work)
    return future


def _into(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
