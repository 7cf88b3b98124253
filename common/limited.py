"""Calls over what strangers wrote, such as chat templates, in a child process with bounds on time and memory.

In a process of its own because one instruction can take an hour (`10 ** 10 ** 9`) while no handler of signals
runs, and because a limit on memory holds for all of a process. The child is forked at the first call and
serves those that follow, until `end` or the end of this process. Does not know what is called.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import mmap
import os
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS = 10.0
"""CPU time for one item."""
MEMORY = 2**31
"""Bytes beside those that the child has when it is called."""


class LimitError(Exception):
    """A call did not come back; the text says why. number: of the item that it was given."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """One result per item, in order. All is pickled, also an exception, which is raised here.

    Raises LimitError where an item takes longer than `SECONDS`, needs more than `MEMORY`, or crashes.
    """
    with _lock:
        child = _child or _start()
        child.at[0] = 0
        try:
            child.calls.send((SECONDS, MEMORY, function, items))
            results, error = child.answers.recv()
        except (EOFError, OSError):
            raise LimitError(_way_it_ended(end()), child.at[0]) from None
        except BaseException:
            end()
            raise
    if isinstance(error, MemoryError):
        raise LimitError(f"needs more than {MEMORY / 2**30:g} GiB of memory", child.at[0])
    if error is not None:
        raise error
    return list(results)


def end() -> int:
    """End the child, if there is one, with the memory that it holds; how it ended, as an exit code."""
    global _child
    if _child is None:
        return 0
    child, _child = _child, None
    child.calls.close()
    child.answers.close()
    os.kill(child.pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])


def _way_it_ended(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"takes more than {SECONDS:g} s"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"ends the process that it runs in ({how})"


@dataclass(frozen=True)
class _Child:
    pid: int
    calls: Connection
    answers: Connection
    at: memoryview
    """which item it is given, shared with it"""


_child: _Child | None = None
_lock = threading.Lock()


def _start() -> _Child:
    global _child
    at = memoryview(mmap.mmap(-1, 8)).cast("q")
    _child = _Child(*fork(functools.partial(_serve, at)), at)
    return _child


def fork(serve: Callable[[Connection, Connection], None]) -> tuple[int, Connection, Connection]:
    """A child that calls `serve` with the ends of two pipes, of calls and of answers, and is gone after it,
    whatever it raises. Its pid, and our ends of both.

    It touches nothing of this process's but its memory: not its files, nor the signals that it waits for.
    """
    calls, ours = Pipe(duplex=False)
    theirs, answers = Pipe(duplex=False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:  # no signal comes to the child before it has left this process's handlers
        if (pid := os.fork()) == 0:
            try:
                _leave_alone({calls.fileno(), answers.fileno()})
                serve(calls, answers)
            finally:
                os._exit(0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    calls.close()
    answers.close()
    return pid, ours, theirs


def _forget() -> None:
    """The child of a process is not that of one which is forked from it."""
    global _child, _lock
    _child, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _serve(at: memoryview, calls: Connection, answers: Connection) -> NoReturn:
    """All that the child does, until its parent is gone."""
    while True:
        seconds, memory, function, items = calls.recv()
        _limit_memory(memory)
        results = []
        try:
            for at[0], item in enumerate(items):
                signal.setitimer(signal.ITIMER_PROF, seconds)
                results.append(function(item))
            answers.send((results, None))
        except Exception as error:
            answers.send((None, error))


def _leave_alone(files: set[int]) -> None:
    """Touch nothing of the parent's: its objects, its files but these and the standard ones, its signals."""
    gc.freeze()
    faulthandler.disable()
    # the numbers stay taken: an object of the parent's that is closed here later closes its own, none of ours
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in set(map(int, os.listdir("/proc/self/fd"))) - files - {0, 1, 2, nothing}:
        with contextlib.suppress(OSError):
            os.fstat(number)  # the folder that was listed is closed again
            os.dup2(nothing, number, inheritable=False)
    os.close(nothing)
    # a group's signals are for the parent, with which this process ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _limit_memory(more: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limits = [limit for limit in (hard, used + more) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
