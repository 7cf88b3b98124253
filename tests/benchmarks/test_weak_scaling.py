"""What the weak-scaling benchmark makes of its measurements, and that its command is one we know."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import weak_scaling
from benchmarks.workload import Workload
from pipeline.compose import compose


def test_efficiency_is_made_of_sharing_the_machine_and_being_one_run() -> None:
    rates = {"one rank": [90, 100, 400], "two runs of one rank": [180, 1, 190], "two ranks": [171, 170, 200]}
    found = weak_scaling.split(rates)
    assert found["efficiency"] == pytest.approx(171 / 200)
    assert found["of_sharing_the_machine"] == pytest.approx(180 / 200)
    assert found["of_sharing_the_machine"] * found["of_being_one_run"] == pytest.approx(found["efficiency"])
    assert "efficiency 0.855 (wanted 0.85): met" in weak_scaling.rendered({"rates": rates, **found})


def test_the_first_steps_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rates = [1.0, 2.0, 30.0, 50.0, 40.0]
    path.write_text(
        "".join(json.dumps({"step": n, "perf/tokens_per_second": r}) + "\n" for n, r in enumerate(rates))
    )
    assert weak_scaling.rate_of(path) == 40.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_has_as_many_rows_whatever_their_number(ranks: int, tmp_path: Path) -> None:
    arguments = argparse.Namespace(rows=16, steps=10, stage=2)
    made = Workload(tmp_path / "base", tmp_path / "rows.jsonl")
    _, _, _, verb, *overrides = weak_scaling.command(made, tmp_path, "r", ranks, arguments)
    config = compose(overrides)
    assert verb == "run" and config.sft.train.global_batch_size == 16 * ranks and config.deepspeed.stage == 2
