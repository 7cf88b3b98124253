"""The fault matrix goes on where it was interrupted, and a trial is judged by its exit status."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fault_matrix
from benchmarks.fault_matrix import KILLED, Run
from benchmarks.kill_resume import Point


def test_the_same_command_goes_on_after_the_last_kind_of_trials_that_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, str, int]] = []
    written: list[Any] = []

    def measured(
        folder: Path, point: Point, counts: Mapping[str, int], seed: int
    ) -> Iterator[dict[str, Any]]:
        for kind, count in counts.items():
            asked.append((point.step_name, point.stage, kind, count))
            if len(asked) == 4:
                raise KeyboardInterrupt
            yield {
                "kind": kind,
                "step_name": point.step_name,
                "stage": point.stage,
                "differences": [],
                "faults": [],
            }

    monkeypatch.setattr(fault_matrix, "measured", measured)
    monkeypatch.setattr(fault_matrix, "write_results", lambda name, result: written.append(result["results"]))
    monkeypatch.setattr(fault_matrix.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fault_matrix", "--trials", "8", "--steps", "sft", "dpo"])
    with pytest.raises(KeyboardInterrupt):
        fault_matrix.main()
    assert written == []
    assert fault_matrix.main() == 0
    kinds = [("kill", 2), ("commit", 0), ("term", 1)]
    every = [(step, stage, *kind) for step in ("sft", "dpo") for stage in (2, 3) for kind in kinds]
    assert asked == [*every[:4], *every[3:]]
    assert [(r["step_name"], r["stage"], r["kind"]) for r in written[0]] == [case[:3] for case in every]
    assert list(tmp_path.iterdir()) == []


class Ended:
    """An attempt whose ranks end with this status, or never."""

    def __init__(self, status: int | None) -> None:
        self.status = status

    def finish(self, seconds: float) -> int:
        if self.status is None:
            raise subprocess.TimeoutExpired("ranks", seconds)
        return self.status

    def kill(self) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "is_done", "hits", "faults"),
    [
        (KILLED, False, 1, []),
        (1, False, 1, ["step, rank 1: ended with 1"]),
        (0, False, 1, ["step, rank 1: ended with 0"]),
        (0, True, 0, []),
        (None, False, 1, ["step, rank 1: a rank was there after 60 s"]),
    ],
)
def test_ranks_have_to_end_in_time_with_the_status_that_says_why(
    status: int | None,
    is_done: bool,
    hits: int,
    faults: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert KILLED == 128 + signal.SIGKILL
    monkeypatch.setattr(Run, "is_done", is_done)
    run = Run(tmp_path / "resolved.yaml", Point(2, 3), {}, seed=0)
    run._judge(Ended(status), "step, rank 1", KILLED)  # type: ignore[arg-type]
    seen = json.loads(json.dumps(run.seen.as_json()))
    assert (seen["trials"], seen["missed"], seen["faults"]) == (hits, int(is_done), faults)
