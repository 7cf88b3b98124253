"""A function called in several processes, its results in the order of what it is given.

The processes are forked when they are needed, so they have whatever this one has. At most `AHEAD` items for
each of them are on their way or waiting for their turn, which bounds memory. Does not know what is called.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from common import limited
from common.limited import fork

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4
"""Items that a process may be ahead of the one whose turn it is."""


class WorkerEnded(Exception):
    """A process ended with an item in its hands; the text says how."""


def in_order(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """One result per item, in order. Items, results and exceptions are pickled; these are raised here, in
    their turn.

    With one process everything happens in this one. WorkerEnded where a process was killed or crashed.
    """
    if processes == 1:
        yield from map(function, items)
        return
    crew: list[_Worker] = []
    try:
        yield from _results(function, iter(items), processes, crew)
    finally:
        for worker in crew:
            worker.end()


def _results(
    function: Callable[[Item], Result], items: Iterator[Item], processes: int, crew: list[_Worker]
) -> Iterator[Result]:
    idle: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, int]] = {}
    done: dict[int, tuple[Any, Exception | None]] = {}
    given = taken = 0
    more = True
    while more or busy or done:
        while more and given - taken < AHEAD * processes and (idle or len(crew) < processes):
            try:
                item = next(items)
            except StopIteration:
                more = False
                break
            if not idle:
                crew.append(_Worker(*fork(partial(_serve, function))))
                idle.append(crew[-1])
            worker = idle.pop()
            worker.give(item)
            busy[worker.answers] = (worker, given)
            given += 1
        # what is ready is taken in before the next result is used, so that no process waits for that
        for ready in wait(list(busy), 0 if taken in done else None) if busy else ():
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
