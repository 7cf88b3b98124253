"""Cases of the fuzzer end well, and a fault that is planted is found by it."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common import artifacts
from common.data import columns
from common.fields import Range
from common.runtime import progress
from pipeline import checks
from step3_ppo.config import PPOConfig
from tests.fuzz import driver, workers
from tests.fuzz.odd import raw
from tests.fuzz.targets import every_target


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, driver.Target]]:
    with every_target() as every:
        yield {target.name: target for target in every}


@pytest.mark.slow
def test_two_thousand_cases_end_without_a_finding(targets: dict[str, driver.Target]) -> None:
    report = driver.run([*targets.values()], 0, range(2_000))
    assert report.findings == []
    assert report.outcomes.keys() == targets.keys()
    for name, outcomes in report.outcomes.items():
        assert outcomes["refused"] and outcomes["accepted"] + outcomes["used"], name


def ignored(*_: Any) -> None:
    """In place of a check."""


def broken(*_: Any) -> None:
    """In place of a check."""
    raise KeyError("x")


PLANTED: list[tuple[str, str, Any, str, Any]] = [
    ("silent", "settings", Range, "holds", lambda self, value: True),
    ("silent", "settings", PPOConfig, "check", ignored),
    ("silent", "settings", Range, "holds", lambda self, value: value != self.maximum),
    ("traceback", "settings", checks, "check", broken),
    ("silent", "artifact", artifacts, "file_sha256", lambda path: "0" * 64),
    ("silent", "rows", columns, "text", lambda columns, name, *, empty=True: str(columns[name])),
    ("raw", "rows", progress, "shown", str),
]
"""What is found, where, and what was put in the place of which function."""


@pytest.mark.parametrize(("kind", "target", "owner", "name", "instead"), PLANTED)
def test_a_planted_fault_is_found(
    targets: dict[str, driver.Target],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    target: str,
    owner: Any,
    name: str,
    instead: Callable[..., Any],
) -> None:
    def first_of(numbers: Iterable[int]) -> driver.Finding | None:
        tried = (driver.run([targets[target]], 0, [number]).findings for number in numbers)
        return next((found for (found,) in filter(None, tried)), None)

    monkeypatch.setattr(owner, name, instead)
    found = first_of(range(300))
    assert found is not None and found.kind == kind
    again = first_of([found.number])
    assert again is not None and (again.kind, again.case) == (kind, found.case)
    monkeypatch.undo()
    assert first_of([found.number]) is None


class Endless:
    """Waits for ever, in what takes every error for a refusal."""

    name, share = "endless", 1

    def draw(self, draw: random.Random) -> str:
        return "a case"

    def outcome(self, case: str, folder: Path) -> str:
        while True:
            try:
                while True:
                    pass
            except Exception:
                return "refused"


def test_what_takes_too_long_is_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "SECONDS", 0.05)
    (found,) = driver.run([Endless()], 0, [7]).findings
    assert (found.kind, found.number, found.case) == ("hang", 7, "'a case'")


class Deadly:
    """Ends the process for one case in four."""

    name, share = "deadly", 1

    def draw(self, draw: random.Random) -> float:
        return draw.random()

    def outcome(self, case: float, folder: Path) -> str:
        if case < 0.25:
            os.abort()
        return "accepted"


@contextlib.contextmanager
def deadly() -> Iterator[list[driver.Target]]:
    yield [Deadly()]


def test_a_case_that_ends_its_process_is_found_and_the_others_are_tried() -> None:
    target = Deadly()
    fatal = []
    for number in range(40):
        draw = random.Random(f"0 {number}")
        draw.choices([target], [1])
        if target.draw(draw) < 0.25:
            fatal.append(number)
    assert 3 < len(fatal) < 20
    report = workers.run(0, 40, 2, targets=deadly)
    assert sorted(found.number for found in report.findings if found.kind == "crash") == fatal
    assert report.outcomes["deadly"]["accepted"] > 0


@pytest.mark.parametrize("sign", ["\x1b", "\x07", "\r", "\x7f", "\x9b", "\u202e", "\u2066", "\ud800"])
def test_what_steers_a_terminal_is_raw(sign: str) -> None:
    assert raw(f"a{sign}b") == sign
    assert raw("a\n\té漢👩\u200d🔬") == ""
