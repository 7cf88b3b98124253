"""Cases shared by several processes, so that one which ends its process is a finding and not the end.

Takes a seed and the number of cases; returns one report of all. A process that dies is followed by another,
which goes on behind the case that it died of.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from tests.fuzz import driver
from tests.fuzz.driver import Finding, Report
from tests.fuzz.targets import every_target

CHUNK = 500
"""Cases after which a process sends what became of them."""

Say = Callable[[str], None]
Targets = Callable[[], AbstractContextManager[Sequence[driver.Target]]]


def run(
    seed: int, cases: int, workers: int, *, say: Say = lambda line: None, targets: Targets = every_target
) -> Report:
    """Try the cases from 0 on. say: as of `driver.run`. targets: makes what each process tries."""
    context = multiprocessing.get_context("spawn")
    total, parts = Report(seed), [range(first, cases, workers) for first in range(workers)]
    running: dict[Connection, tuple[SpawnProcess, Sequence[int], Any]] = {}

    def begin(numbers: Sequence[int]) -> None:
        ours, theirs = context.Pipe(duplex=False)
        at = context.Value("q", -1)
        process = context.Process(target=_work, args=(targets, seed, numbers, at, theirs))
        process.start()
        theirs.close()
        running[ours] = (process, numbers, at)

    for part in parts:
        begin(part)
    while running:
        for pipe in wait(list(running)):
            assert isinstance(pipe, Connection)
            process, numbers, at = running[pipe]
            try:
                _add(total, pipe.recv(), say)
                continue
            except EOFError:
                del running[pipe]
                process.join()
            if process.exitcode:
                number = at.value
                what = (
                    f"the process ended with {process.exitcode}; cases since its last report are not counted"
                )
                _add(total, Report(seed, 1, findings=[Finding("crash", number, "", "", what)]), say)
                begin([each for each in numbers if each > number])
    return total


def _work(targets: Targets, seed: int, numbers: Sequence[int], at: Any, pipe: Connection) -> None:
    def noted(chunk: Sequence[int]) -> Iterator[int]:
        for number in chunk:
            at.value = number
            yield number

    with targets() as made:
        for first in range(0, len(numbers), CHUNK):
            pipe.send(driver.run(made, seed, noted(numbers[first : first + CHUNK])))


def _add(total: Report, part: Report, say: Say) -> None:
    before = total.cases // 1_000
    total.cases += part.cases
    total.findings += part.findings
    total.seconds.update(part.seconds)
    for name, outcomes in part.outcomes.items():
        total.outcomes.setdefault(name, type(outcomes)()).update(outcomes)
    for finding in part.findings:
        say(f"{finding.kind}: case {finding.number} ({finding.target})\n  {finding.case}\n  {finding.what}")
    if total.cases // 1_000 > before:
        say(f"{total.cases} cases, {len(total.findings)} findings")
