"""What is recorded and said of how a step ended, with a fake step."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from common.stage import Step
from launch.supervise import Outcome
from pipeline import plan, run, state
from tests.pipeline.fakes import PATIENCE_SECONDS, attempt, config, status

pytestmark = pytest.mark.usefixtures("fake_steps")
MAKE_REPORT = run.make_report


def test_launches_are_in_order_and_a_step_has_its_length_whatever_the_clock_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter(f"2026-01-01T{hour:02d}:00:00+00:00" for hour in range(23, 0, -1))
    monkeypatch.setattr(state, "now", lambda: next(times))  # set back an hour whenever it is looked at
    monkeypatch.setenv("FAKE_STEP", "crash")
    assert attempt()[0] == 1 and status()["launch"] == 1
    monkeypatch.setenv("FAKE_STEP", "done")
    assert attempt()[0] == 0 and status()["launch"] == 2
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
    assert attempt()[0] == 137
    assert asked == [oom_killed]
    assert capsys.readouterr().err.splitlines() == [
        "sft failed (killed by signal 9)",
        f"  {said}; the same command goes on from its last save",
    ]


def test_a_failure_after_a_signal_is_not_called_stopped() -> None:
    wired = plan.wire([Step.sft])[0]
    Path("runs/a/sft").mkdir(parents=True)
    current = {"step": "sft", "config": {}, "config_hash": "", "inputs": {}, "started": "", "launched": ""}
    assert run.conclude(Path("runs/a"), wired, current, Outcome(2, stopped=True), print) == 2
    assert status()["status"] == "failed"
    assert run.conclude(Path("runs/a"), wired, current, Outcome(143, stopped=True), print) == 143
    assert status()["status"] == "stopped"


@pytest.mark.parametrize(
    ("does", "code", "told"),
    [
        ("done", 0, ("end", "sft of runs/a finished")),
        ("crash", 1, ("failure", "sft of runs/a failed (exit status 1)")),
        ("user-error", 2, ("failure", "sft of runs/a failed (exit status 2)")),
        ("no-export", None, ("failure", "sft of runs/a failed: runs/a/sft/export is not finished")),
    ],
)
def test_the_webhook_is_told_once_how_a_step_ended(
    does: str, code: int | None, told: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    posted: list[tuple[str, str]] = []
    monkeypatch.setenv("FAKE_STEP", does)
    monkeypatch.setattr(
        run.Webhook,
        "post",
        lambda self, kind, step, text: posted.append((kind.value, text.partition(": there")[0])),
    )
    if code is None:
        with pytest.raises(UserError):
            attempt()
    else:
        assert attempt()[0] == code
    assert [(kind, text[: len(told[1])]) for kind, text in posted] == [told]
    if does == "done":
        attempt()  # done already: nothing has ended
        assert len(posted) == 1


def test_a_webhook_that_nobody_answers_fails_no_run() -> None:
    made = config()
    made.tracking.webhook = "http://127.0.0.1:9/secret"
    code, lines = attempt(made)
    assert code == 0
    assert [line for line in lines if "webhook" in line] == [
        "warning: tracking.webhook: an alert was not posted: ConnectionRefusedError; the run goes on"
    ]


@pytest.mark.parametrize("ended", [0, 1, 2])
def test_a_folder_that_was_removed_while_its_step_ran_is_said_and_not_made_again(
    ended: int, capsys: pytest.CaptureFixture[str]
) -> None:
    wired = plan.wire([Step.sft])[0]
    said = "sft failed: runs/a/sft was removed while it was running\n"
    assert run.conclude(Path("runs/a"), wired, {}, Outcome(ended), print) == (ended or 2)
    assert capsys.readouterr().err == ("" if ended == 2 else said)  # else the rank said so
    MAKE_REPORT(Path("runs/a"), pytest.fail)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("needed", "is_certain", "ways"),
    [("needs 9 GB and has 8 GB: 1 GB short", False, 1), ("needs 1 GB", False, 0), ("needs 1 GB", True, 1)],
)
def test_ways_to_need_less_memory_are_named_where_it_was_short(
    needed: str,
    is_certain: bool,
    ways: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pipeline.planning.ways_out", lambda *args, **more: [needed, "deepspeed=zero3"])
    run.show_ways_out(config(), Step.sft, 2, 2, is_certain=is_certain)
    assert capsys.readouterr().err == f"  {needed}\n" + ways * "  deepspeed=zero3\n"


def test_an_error_that_the_step_has_printed_is_not_commented(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_STEP", "user-error")
    code, lines = attempt()
    assert code == 2 and len(lines) == 1
    assert capfd.readouterr().err == "error: the fake step found something\n"


def test_a_step_that_ends_well_without_an_artifact_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP", "no-export")
    with pytest.raises(UserError, match="is not finished"):
        attempt()
    assert status()["status"] == "failed"
