"""A function in several processes: results in order, errors raised here, and nothing left behind."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import limited
from common.errors import UserError
from common.pool import AHEAD, Fetched, WorkerEnded, in_order


def work(number: int) -> tuple[int, int]:
    if number == 1000:
        raise UserError("a thousand", hint="less")
    if number == 2000:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number, os.getpid()


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_the_order_of_their_items(processes: int) -> None:
    found = list(in_order(work, range(50), processes))
    assert [square for square, _ in found] == [number * number for number in range(50)]
    pids = {pid for _, pid in found}
    assert (os.getpid() in pids) == (processes == 1) and len(pids) <= processes


def test_no_more_is_read_ahead_than_is_said() -> None:
    given = []

    def items() -> Iterator[int]:
        for number in range(100):
            given.append(number)
            yield number

    for taken, _ in enumerate(in_order(work, items(), 2)):
        assert len(given) <= taken + 1 + AHEAD * 2


def test_nothing_is_started_for_nothing() -> None:
    assert list(in_order(work, [], 3)) == []


def test_an_error_is_raised_here_in_its_turn() -> None:
    results = in_order(work, [*range(20), 1000], 2)
    assert [next(results)[0] for _ in range(20)] == [number * number for number in range(20)]
    with pytest.raises(UserError, match="a thousand\n.*less") as error:
        next(results)
    assert "in work" in error.value.__notes__[0]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_what_is_made_is_given_while_the_next_item_is_long_in_coming(processes: int) -> None:
    released = threading.Event()

    def slow() -> Iterator[int]:
        yield from range(9)
        assert released.wait(60)
        yield from range(9, 12)

    items = Fetched(slow())
    results = in_order(work, items, processes, items.is_there)
    assert [next(results)[0] for _ in range(9)] == [number * number for number in range(9)]
    assert not released.is_set()
    released.set()
    assert [square for square, _ in results] == [81, 100, 121]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("fetched", [False, True])
def test_what_reading_an_item_raises_comes_behind_the_results_of_those_before_it(
    processes: int, fetched: bool
) -> None:
    def breaks_off() -> Iterator[int]:
        yield from range(5)
        raise UserError("cut off", hint="again")

    items = Fetched(breaks_off()) if fetched else breaks_off()
    results = in_order(work, items, processes, items.is_there if isinstance(items, Fetched) else None)
    assert [next(results)[0] for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(UserError, match="cut off"):
        next(results)


def children() -> set[str]:
    (own,) = Path("/proc/self/task").glob(f"{os.getpid()}/children")
    return set(own.read_text().split())


def test_a_process_that_is_killed_is_an_error_and_none_is_left() -> None:
    before = children()
    with pytest.raises(WorkerEnded, match="SIGKILL"):
        list(in_order(work, [1, 2000, *range(20)], 2))
    assert children() == before


def test_who_stops_early_leaves_no_process() -> None:
    results = in_order(work, range(100), 2)
    _, pid = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def busy(number: int) -> None:
    limited.each(burn, [0.1])


def burn(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_the_time_of_a_worker_s_own_child_is_counted_as_this_process_s_children_s() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    list(in_order(busy, range(4), 2))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime >= 0.39
