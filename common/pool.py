"""A function called in several processes, its results in the order of what it is given.

The processes are forked when they are needed, so they have whatever this one has. At most `AHEAD` items for
each of them are on their way or waiting for their turn, which bounds memory. Items that come from a network
are read in a thread (`Fetched`), so that results need not wait for them. Does not know what is called.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from common import limited
from common.background import in_background
from common.limited import fork

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4
"""Items that a process may be ahead of the one whose turn it is."""
POLL = 0.05
"""Seconds between two looks whether a fetched item is there."""


class WorkerEnded(Exception):
    """A process ended with an item in its hands; the text says how."""


class Fetched(Generic[Item]):
    """The items of an iterator that may wait for a network: the next one is read in a thread.

    The thread has ended when an item is given, so that a fork for that item does not meet it in a read.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items, self._next = items, None  # type: tuple[Iterator[Item], Future[list[Item]] | None]

    def __iter__(self) -> Iterator[Item]:
        return self

    def is_there(self) -> bool:
        """Whether the next item, the end or an error can be had without waiting; begins to read it."""
        return self._begun().done()

    def __next__(self) -> Item:
        future, self._next = self._begun(), None
        for item in future.result():
            return item
        raise StopIteration

    def _begun(self) -> Future[list[Item]]:
        if self._next is None:
            self._next = in_background(lambda: list(islice(self._items, 1)), "reading")
        return self._next


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int,
    is_there: Callable[[], bool] | None = None,
) -> Iterator[Result]:
    """One result per item, in order. Items, results and exceptions are pickled; these are raised here, in
    their turn, as is what reading an item raises.

    is_there: whether the next item can be had without waiting; one that cannot is waited for only when no
    result is on its way. With one process everything happens in this one. WorkerEnded where a process was
    killed or crashed.
    """
    if processes == 1:
        yield from map(function, items)
        return
    crew: list[_Worker] = []
    try:
        yield from _results(function, iter(items), processes, crew, is_there)
    finally:
        for worker in crew:
            worker.end()


def _results(
    function: Callable[[Item], Result],
    items: Iterator[Item],
    processes: int,
    crew: list[_Worker],
    is_there: Callable[[], bool] | None,
) -> Iterator[Result]:
    idle: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, int]] = {}
    done: dict[int, tuple[Any, Exception | None]] = {}
    given = taken = 0
    more, broke_off = True, None
    while more or busy or done:
        while more and given - taken < AHEAD * processes and (idle or len(crew) < processes):
            if (busy or done) and is_there is not None and not is_there():
                break
            try:
                item = next(items)
            except StopIteration:
                more = False
                break
            except Exception as raised:
                more, broke_off = False, raised
                break
            if not idle:
                crew.append(_Worker(*fork(partial(_serve, function))))
                idle.append(crew[-1])
            worker = idle.pop()
            worker.give(item)
            busy[worker.answers] = (worker, given)
            given += 1
        # what is ready is taken in before the next result is used, so that no process waits for that
        patience = 0 if taken in done else POLL if is_there is not None and more else None
        for ready in wait(list(busy), patience) if busy else ():
            assert isinstance(ready, Connection)
            worker, number = busy.pop(ready)
            done[number] = worker.take()
            idle.append(worker)
        if taken in done:
            result, error = done.pop(taken)
            if error is not None:
                raise error
            yield result
            taken += 1
    if broke_off is not None:
        raise broke_off
    while crew:
        crew.pop().finish()


@dataclass(frozen=True)
class _Worker:
    pid: int
    calls: Connection
    answers: Connection

    def give(self, item: Any) -> None:
        try:
            self.calls.send(item)
        except OSError:
            raise WorkerEnded(self._way_it_ended()) from None

    def take(self) -> tuple[Any, Exception | None]:
        try:
            result, error = self.answers.recv()
        except (EOFError, OSError):
            raise WorkerEnded(self._way_it_ended()) from None
        return result, error

    def _way_it_ended(self) -> str:
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # `end` waits for it, too
        assert found is not None
        killed = found.si_code != os.CLD_EXITED
        return signal.Signals(found.si_status).name if killed else f"exit code {found.si_status}"

    def finish(self) -> None:
        """End an idle one, which first ends its own child, so that the CPU time of both is counted here."""
        self.calls.close()
        os.waitpid(self.pid, 0)
        self.answers.close()

    def end(self) -> None:
        self.calls.close()
        self.answers.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _serve(function: Callable[[Item], Result], calls: Connection, answers: Connection) -> None:
    """What a process does until it is ended, or its parent wants no more or is gone."""
    while True:
        try:
            item = calls.recv()
        except EOFError:
            limited.end()
            return
        try:
            answer: tuple[Result | None, Exception | None] = (function(item), None)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = (None, error)
        answers.send(answer)
