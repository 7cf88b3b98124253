"""Measuring sides in turn: what counts as a step, ratios, verdicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import comparison
from benchmarks.comparison import BEST, DEFAULT, OURS, Contest

WORK = """
import json, sys, time
for step in range(1, 6):
    end = time.process_time() + 0.05
    while time.process_time() < end: pass
    line = {"step": step, "num_tokens": step * 10}
    with open(sys.argv[1], "a") as file: file.write(json.dumps(line) + "\\n")
    time.sleep(0.1)
"""


def contest(folder: Path, unit: str = "tokens") -> Contest:
    return Contest(folder, 1, unit, comparison.running_tokens)


def test_ratios_compare_ours_with_every_other_side(tmp_path: Path) -> None:
    pairs = contest(tmp_path, "pairs")
    speeds = {OURS: 3.0, BEST: 2.0, DEFAULT: 1.0, "TRL, another": 6.0}
    medians = {name: dict.fromkeys(pairs.names, speed) for name, speed in speeds.items()}
    warm = {OURS: dict.fromkeys(pairs.names, 1.0), BEST: dict.fromkeys(pairs.names, 4.0)}
    ratios = comparison.ratios_of(pairs, medians, warm)
    assert ratios["pairs_per_cpu_second_to_trl_best"] == 1.5
    assert ratios["wall_seconds_to_trl_default"] == 3.0
    assert ratios["cpu_seconds_to_trl_another"] == 0.5
    assert ratios["warm_wall_seconds_to_trl_best"] == 0.25
    lines = comparison.verdicts("pairs", ratios)
    assert "1.50 x TRL's best in pairs per CPU-second" in lines[0] and lines[0].endswith(": met")
    assert lines[1].endswith(": not met")


@pytest.mark.parametrize(("wall", "cpu", "met"), [(0.6, 0.6, True), (0.61, 0.5, False), (0.5, 0.61, False)])
def test_the_whole_process_must_be_short_in_both_times(wall: float, cpu: float, met: bool) -> None:
    ratios = {
        "tokens_per_cpu_second_to_trl_best": 2.0, "tokens_per_cpu_second_to_trl_default": 2.0,
        "wall_seconds_to_trl_best": wall, "cpu_seconds_to_trl_best": cpu, "wall_seconds_to_trl_default": 1.0,
    }  # fmt: skip
    assert comparison.verdicts("tokens", ratios)[1].endswith(": met" if met else ": not met")


def test_each_number_is_compared_with_the_setting_of_trl_that_is_best_at_it() -> None:
    ratios = {
        "pairs_per_cpu_second_to_trl_best": 1.4, "pairs_per_cpu_second_to_trl_best_in_step": 1.8,
        "wall_seconds_to_trl_best": 0.5, "wall_seconds_to_trl_best_in_step": 0.7,
        "cpu_seconds_to_trl_best": 0.4, "cpu_seconds_to_trl_best_in_step": 0.5,
        "pairs_per_cpu_second_to_trl_default": 9.0, "wall_seconds_to_trl_default": 0.1,
    }  # fmt: skip
    steady, whole, _ = comparison.verdicts("pairs", ratios)
    assert "1.40 x" in steady and steady.endswith(": not met")
    assert "0.70 x" in whole and "0.50 x" in whole and whole.endswith(": not met")


def test_evaluations_are_not_steps(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "num_tokens": 5}, {"step": 1, "eval/accuracy": 0.5}, {"step": 2, "tokens": 9}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert comparison.running_tokens(file) == [5, 9]


@pytest.mark.slow
def test_sides_are_run_in_turn_and_twice_with_a_warm_cache(tmp_path: Path) -> None:
    started: list[str] = []

    def start(name: str) -> comparison.Start:
        def command(folder: Path, cache: Path) -> tuple[list[str], Path]:
            started.append(name)
            folder.mkdir(parents=True)
            cache.mkdir(parents=True, exist_ok=True)
            return [sys.executable, "-c", WORK, str(folder / "steps")], folder / "steps"

        return command

    sides = {OURS: start("a"), BEST: start("b"), DEFAULT: start("c")}
    result = comparison.compare(contest(tmp_path / "whole"), sides, repeats=2)
    assert started == ["a", "b", "c", "a", "b", "c", "a", "b"]
    assert result["medians"][OURS]["steps"] == 5 and result["medians"][OURS]["tokens"] == 50
    assert result["ratios"].keys() >= {"tokens_per_cpu_second_to_trl_best", "wall_seconds_to_trl_default"}

    started.clear()
    brief = comparison.compare(contest(tmp_path / "brief"), sides, repeats=1, brief=True)
    assert started == ["a", "b"]
    assert brief["ratios"].keys() == {key for key in result["ratios"] if key.endswith("_to_trl_best")} - {
        "warm_wall_seconds_to_trl_best", "warm_cpu_seconds_to_trl_best",
    }  # fmt: skip
    assert len(comparison.verdicts("tokens", brief["ratios"])) == 2
