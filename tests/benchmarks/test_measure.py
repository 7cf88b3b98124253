"""Measuring a process from outside, and the arithmetic of the tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import data_scale, measure

BUSY = """
import sys, time
for step in range(3):
    end = time.process_time() + 0.15
    while time.process_time() < end: pass
    with open(sys.argv[1], "a") as file: file.write("line\\n")
time.sleep(1)
"""


def test_a_child_is_seen_at_each_of_its_steps(tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    command = [sys.executable, "-c", BUSY, str(steps)]
    usage, ticks = measure.run_measured(command, log=tmp_path / "log", steps_file=steps)
    seen = [tick.step for tick in ticks]
    assert seen == sorted(set(seen)) and seen[-1] == 3  # a busy machine may see two steps at once
    assert 0.4 < ticks[-1].cpu_seconds <= usage.cpu_seconds + 0.02  # clock ticks of 10 ms
    assert usage.peak_rss_mb > 1


def test_cpu_time_of_grandchildren_counts(tmp_path: Path) -> None:
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    command = [sys.executable, "-c", start, BUSY, str(tmp_path / "steps")]
    usage, _ = measure.run_measured(command, log=tmp_path / "log")
    assert usage.cpu_seconds > 0.4


def test_cpu_time_of_what_has_ended_counts_at_the_next_step(tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    start = """
import subprocess, sys, time
subprocess.run([sys.executable, "-c", sys.argv[1].replace("time.sleep(1)", ""), sys.argv[2] + ".inner"])
open(sys.argv[2], "a").write("line\\n")
time.sleep(1)
"""
    command = [sys.executable, "-c", start, BUSY, str(steps)]
    _, ticks = measure.run_measured(command, log=tmp_path / "log", steps_file=steps)
    assert [tick.step for tick in ticks] == [1] and ticks[0].cpu_seconds > 0.4


def test_a_child_that_fails_shows_the_end_of_its_output(tmp_path: Path) -> None:
    with pytest.raises(measure.ChildFailed, match="status 3(.|\n)*the reason"):
        measure.run_measured(
            [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], log=tmp_path / "log"
        )


def test_the_steady_rate_leaves_out_the_first_steps() -> None:
    ticks = [measure.Tick(1, 10.0, 8.0), measure.Tick(2, 12.0, 9.0), measure.Tick(4, 16.0, 13.0)]
    rate = measure.steady_rate(ticks, [100, 200, 310, 400], skip=2)
    assert rate == {"tokens_per_cpu_second": 50.0, "tokens_per_second": 50.0}


def test_a_rate_is_of_what_is_counted() -> None:
    ticks = [measure.Tick(2, 1.0, 1.0), measure.Tick(3, 2.0, 1.5)]
    rate = measure.steady_rate(ticks, [8, 16, 24], unit="pairs")
    assert rate == {"pairs_per_cpu_second": 16.0, "pairs_per_second": 8.0}


def test_too_few_steps_for_a_rate_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        measure.steady_rate([measure.Tick(2, 1.0, 1.0)], [10, 20], skip=2)


def test_medians_are_taken_number_by_number() -> None:
    runs = [{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 7.0}, {"a": 2.0, "b": 8.0}]
    assert measure.median_of(runs) == {"a": 2.0, "b": 8.0}


def test_results_say_on_what_machine_they_were_taken(tmp_path: Path) -> None:
    written = json.loads(measure.write_results("x", {"answer": 42}, to=tmp_path).read_text())
    assert written["answer"] == 42
    assert {"cpu", "cores", "packages", "commit", "date", "load_average"} <= written["machine"].keys()


def test_memory_growth_is_counted_from_ten_thousand_rows() -> None:
    records = [
        {"rows": 1_000, "peak_rss_mb": 100.0},
        {"rows": 10_000, "peak_rss_mb": 200.0},
        {"rows": 1_010_000, "peak_rss_mb": 250.0},
    ]
    assert data_scale.growth_of(records) == 50.0  # 50 MB for a million rows


def test_a_rank_s_memory_is_compared_between_the_two_largest_sizes() -> None:
    sizes = ((1_000, 9.0), (1_000_000, 5.0), (3_000_000, 5.4), (3_000_000, 5.2))
    records = [{"rows": rows, "rank_own_mb": own} for rows, own in sizes]
    assert data_scale.bytes_per_row(records) == pytest.approx(0.1)  # 0.2 MB for two million rows


def test_a_synthetic_row_is_the_same_each_time() -> None:
    assert data_scale.row(20) == {
        "question": "How is 20 spelled, and what follows?",
        "answer": "two zero; 20, 21, 22, 23, 24.",
    }
