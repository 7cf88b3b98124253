"""When a run makes its report, and what it costs when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from pipeline import run
from tests.pipeline.fakes import attempt, status

pytestmark = pytest.mark.usefixtures("fake_steps")
MAKE_REPORT = run.make_report


@pytest.fixture
def reported(fake_steps: None, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the step's state was each time a report was asked for."""
    seen: list[object] = []
    monkeypatch.setattr(run, "make_report", lambda run_dir, say: seen.append(status()["status"]))
    return seen


@pytest.mark.parametrize(("behaviour", "state_then"), [("done", "done"), ("crash", "failed")])
def test_a_report_is_made_when_a_step_has_ended_well_or_not(
    behaviour: str, state_then: str, reported: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP", behaviour)
    attempt()
    assert [state_then] == reported


def test_a_report_that_is_there_is_named_and_not_made_again_for_nothing(reported: list[object]) -> None:
    attempt()
    Path("runs/a/report.html").write_text("a report")
    reported.clear()
    code, lines = attempt()
    assert (code, lines[-1], reported) == (0, "report    runs/a/report.html", [])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no\nlines"), "RuntimeError: no lines"),
        (UserError("no run", hint="none"), "no run"),
    ],
)
def test_a_report_that_cannot_be_made_costs_one_line_and_not_the_run(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.report

    def refuse(run_dir: Path) -> Path:
        raise error

    monkeypatch.setattr(pipeline.report, "report", refuse)
    monkeypatch.setattr(run, "make_report", MAKE_REPORT)
    code, lines = attempt()
    assert code == 0
    assert [line for line in lines if "report" in line] == [f"warning: no report of runs/a: {said}"]
