"""`plan`'s memory beside what a process took: measured here for the demo, recorded for larger shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import memory_plan
from benchmarks.measure import PROJECT

ALLOWED = 0.15


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_the_estimate_for_the_demo_is_near_the_measured_peak(stage: int, tmp_path: Path) -> None:
    found = memory_plan.compare("demo", stage, threads=1, folder=tmp_path)
    assert abs(found["off_training"]) <= ALLOWED, found


def test_the_recorded_estimates_of_all_shapes_are_near_the_measured_peaks() -> None:
    recorded = json.loads((PROJECT / "benchmarks" / "results" / "memory_plan.json").read_text())["runs"]
    assert {(run["shape"], run["zero_stage"]) for run in recorded} == {
        (shape, stage) for shape in memory_plan.SHAPES for stage in (1, 2, 3)
    }
    for run in recorded:
        assert run["estimate"] == pytest.approx(sum(run["terms"].values()))
        assert abs(run["estimate"] / run["measured_training"] - 1) <= ALLOWED, run
