"""What is recorded and said of how a step ended, with a fake step."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.supervise import Outcome
from pipeline import run, state
from tests.pipeline.test_run import PATIENCE_SECONDS, fake_step, go, status  # noqa: F401


def test_launches_are_in_order_and_a_step_has_its_length_whatever_the_clock_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter(f"2026-01-01T{hour:02d}:00:00+00:00" for hour in range(23, 0, -1))
    monkeypatch.setattr(state, "now", lambda: next(times))  # set back an hour whenever it is looked at
    monkeypatch.setenv("FAKE_STEP", "crash")
    assert go()[0] == 1 and status()["launch"] == 1
    monkeypatch.setenv("FAKE_STEP", "done")
    assert go()[0] == 0 and status()["launch"] == 2
    assert status()["launched"] > status()["ended"]  # type: ignore[operator]
    seconds = status()["seconds"]
    assert isinstance(seconds, int) and 0 <= seconds < PATIENCE_SECONDS
    assert state.next_launch(Path("runs/a")) == 3


@pytest.mark.parametrize(
    ("oom_killed", "said"),
    [
        (True, "the machine was out of memory: its kernel killed a process meanwhile"),
        (False, "perhaps it ran out of memory"),
    ],
)
def test_a_rank_that_was_killed_is_said_to_have_been_out_of_memory_where_the_kernel_counted_it(
    oom_killed: bool, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(run, "supervise", lambda *job, **how: Outcome(137, (1, -9), oom_killed=oom_killed))
    monkeypatch.setattr(run, "show_ways_out", lambda *run, is_certain: asked.append(is_certain))
    assert go()[0] == 137
    assert asked == [oom_killed]
    assert capsys.readouterr().err.splitlines() == [
        "sft failed (killed by signal 9)",
        f"  {said}; the same command goes on from its last save",
    ]
