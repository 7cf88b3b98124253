"""Restarts: who is started again, how often, and what is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.local import PROJECT, Job
from launch.supervise import Outcome, died, supervise

PROGRAM = """
import os, signal, sys
from pathlib import Path
folder, end, times, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), os.environ["RANK"]
starts = folder / f"starts_{rank}"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if int(rank) == int(os.environ["WORLD_SIZE"]) - 1 and len(starts.read_text()) <= times:
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(end))
"""
"""The last rank ends as it is told, so many times; then it and the others end well."""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_module.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def go(end: str, times: int, restarts: int, ranks: int = 1) -> tuple[int, int, list[str]]:
    """Exit status, how often the last rank was started, and what was said."""
    lines: list[str] = []
    job = Job("some_module", (".", end, str(times)), ranks)
    outcome = supervise(job, name="sft", restarts=restarts, say=lines.append)
    assert not outcome.stopped
    return outcome.status, len(Path(f"starts_{ranks - 1}").read_text()), lines


def test_a_rank_that_was_killed_is_started_again_and_each_restart_is_said() -> None:
    status, starts, lines = go("killed", 2, restarts=3)
    assert (status, starts) == (0, 3)
    assert lines == [
        f"sft: rank 0 died (SIGKILL); starting again from the last checkpoint, restart {number} of 3"
        for number in (1, 2)
    ]


def test_all_ranks_are_started_again_when_one_of_several_was_killed() -> None:
    status, starts, lines = go("killed", 1, restarts=1, ranks=2)
    assert (status, starts, len(Path("starts_0").read_text())) == (0, 2, 2)
    assert lines == ["sft: rank 1 died (SIGKILL); starting again from the last checkpoint, restart 1 of 1"]


@pytest.mark.parametrize(
    ("end", "before", "after", "oom_killed"),
    [("killed", 3, 4, True), ("killed", 3, 3, False), ("1", 3, 4, False)],
)
def test_a_rank_that_dies_while_the_kernel_kills_for_want_of_memory_was_out_of_it(
    end: str, before: int, after: int, oom_killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([before, after])
    monkeypatch.setattr("launch.supervise.oom_kills", lambda: next(counts))
    assert supervise(Job("some_module", (".", end, "1"))).oom_killed is oom_killed


LIMITED = """
import os, signal, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from launch.local import Job
from launch.supervise import died, supervise
print(died(supervise(Job("hungry_module", ()))))
"""


@pytest.fixture
def limited() -> Iterator[Path]:
    """A control group whose processes may have 256 MB; removed at the end."""
    own = Path("/proc/self/cgroup").read_text()
    old = re.search(r":memory:(.*)$", own, re.MULTILINE)
    root = Path("/sys/fs/cgroup", *(["memory", old[1].lstrip("/")] if old is not None else []))
    group = root / f"rlhf_test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        limit = group / ("memory.max" if old is None else "memory.limit_in_bytes")
        if not limit.exists():
            pytest.skip("control groups do not limit memory here")
        limit.write_text(str(256 * 2**20))
        yield group
    finally:
        group.rmdir()


def test_a_rank_that_the_kernel_kills_for_want_of_memory_is_told_from_one_that_somebody_killed(
    limited: Path,
) -> None:
    Path("hungry_module.py").write_text("held = b'x' * 2**30\n")
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limited)],
        env={**os.environ, "PYTHONPATH": f"{PROJECT}:{Path.cwd()}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "rank 0 died (SIGKILL, out of memory)\n"


def test_after_the_last_restart_the_status_is_that_of_the_failure() -> None:
    assert go("killed", 9, restarts=2)[:2] == (137, 3)
    Path("starts_0").unlink()
    assert go("killed", 9, restarts=0)[:2] == (137, 1)


@pytest.mark.parametrize("status", [2, 143])
def test_what_a_person_has_to_fix_or_asked_for_is_not_started_again(status: int) -> None:
    assert go(str(status), 9, restarts=3) == (status, 1, [])


def test_a_machine_that_is_lost_is_the_cause_and_no_restart_brings_it_back() -> None:
    lost = Outcome(1, lost="machine 1 (b) is gone")
    assert not lost.is_restartable and Outcome(1).is_restartable
    assert min([Outcome(137, (0, -9)), lost, Outcome(0)], key=lambda outcome: outcome.gravity) is lost


def test_of_several_machines_the_one_whose_rank_was_killed_explains_the_others() -> None:
    killed = Outcome(137, (1, -9), where="machine 1 (b)")
    outcomes = [Outcome(143, (2, 143)), Outcome(1, (0, 1)), Outcome(0), killed]
    assert min(outcomes, key=lambda outcome: outcome.gravity) is killed
    assert died(killed) == "rank 1 on machine 1 (b) died (SIGKILL)"
    assert died(Outcome(1, (0, 1))) == "rank 0 failed (exit status 1)"
    hanging = Outcome(75, (0, 75))  # its message names the rank, which the agent has killed meanwhile
    assert min([killed, hanging], key=lambda outcome: outcome.gravity) is hanging
    assert died(hanging) == "a rank hangs" and hanging.is_restartable
    starved = Outcome(137, (1, -9), oom_killed=True)
    assert died(starved) == "rank 1 died (SIGKILL, out of memory)"
    agent = Outcome(137, where="machine 1 (b)")
    assert died(agent) == "torchrun's agent on machine 1 (b) died (SIGKILL)"
