"""What the account of the demo's chain reads from a run, and when it says that a bar is missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo_chain
from benchmarks.measure import Tick


def evaluation(step: int, gold: float, greedy: float, **others: float) -> dict[str, Any]:
    usual = {"correct": 0.9, "style": 0.3, "reward": 0.0, "length": 7.0, "stop_rate": 1.0, "kl": 0.0}
    sampled = {**usual, "gold": gold, **others}
    return {
        "step": step,
        **{f"eval/{name}": value for name, value in sampled.items()},
        "eval/greedy/gold": greedy,
    }


def write_run(folder: Path, *evaluations: dict[str, Any]) -> Path:
    iterations = [
        {"step": n, "time/rollout": 2.0, "time/score": 0.5, "time/learn": 1.0, "objective/kl": 0.1}
        for n in (1, 2)
    ]
    files = {
        "reward": [{"step": 9, "loss": 0.1}, {"step": 9, "eval/accuracy": 0.97}],
        "ppo": [evaluations[0], *iterations, *evaluations[1:]],
    }
    for step, lines in files.items():
        (folder / step).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / step / "metrics.jsonl").write_text(text)
    return folder


def test_figures_are_those_before_the_first_and_after_the_last_iteration(tmp_path: Path) -> None:
    run = write_run(
        tmp_path, evaluation(0, 0.5, 0.4), evaluation(1, 0.7, 0.6), evaluation(2, 0.9, 0.95, kl=2.0)
    )
    seen = demo_chain.figures(run)
    assert (seen["before"]["gold"], seen["after"]["gold"]) == (0.5, 0.9)
    assert (seen["before_greedy"], seen["after_greedy"]) == ({"gold": 0.4}, {"gold": 0.95})
    assert (seen["reward_accuracy"], seen["after"]["kl"], seen["iterations"]) == (0.97, 2.0, 2)
    assert (seen["rollout_seconds"], seen["score_seconds"], seen["learn_seconds"]) == (4.0, 1.0, 2.0)
    assert demo_chain.missed_bars(seen) == []
    assert "PPO greedy" in demo_chain.rendered(
        {"0": {**seen, "wall_seconds": 9.0, "cpu_seconds": 9.0, "steps": STEP_TIMES}}
    )


STEP_TIMES = {step: {"wall_seconds": 3.0, "cpu_seconds": 3.0} for step in demo_chain.STEPS}


def test_a_run_that_was_not_evaluated_before_ppo_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, evaluation(1, 0.5, 0.4), evaluation(2, 0.9, 0.9))
    with pytest.raises(ValueError, match="no evaluation before and after PPO"):
        demo_chain.figures(run)


@pytest.mark.parametrize(
    ("before", "after", "missed"),
    [
        ({"gold": 0.29}, {}, "SFT gold at least 0.3: MISSED (0.290)"),
        ({"gold": 0.66}, {}, "SFT gold at most 0.65: MISSED (0.660)"),
        ({}, {"gold": 0.84}, "PPO gold at least 0.85: MISSED (0.840)"),
        ({}, {"correct": 0.89}, "correct share not lower than SFT's: MISSED (-0.010)"),
        ({}, {"kl": 5.0}, "KL under 5 nats: MISSED (5.000)"),
        ({}, {"stop_rate": 0.97}, "stop rate at least 0.98: MISSED (0.970)"),
    ],
)
def test_a_bar_that_is_missed_is_named_with_its_number(
    tmp_path: Path, before: dict[str, float], after: dict[str, float], missed: str
) -> None:
    run = write_run(
        tmp_path,
        {**evaluation(0, 0.5, 0.4), **{f"eval/{name}": value for name, value in before.items()}},
        {**evaluation(2, 0.9, 0.9), **{f"eval/{name}": value for name, value in after.items()}},
    )
    assert demo_chain.missed_bars(demo_chain.figures(run)) == [missed]


def test_a_reward_model_that_orders_too_few_pairs_misses_its_bar(tmp_path: Path) -> None:
    seen = demo_chain.figures(write_run(tmp_path, evaluation(0, 0.5, 0.4), evaluation(2, 0.9, 0.9)))
    seen["reward_accuracy"] = 0.949
    assert demo_chain.missed_bars(seen) == ["reward accuracy at least 0.95: MISSED (0.949)"]


def test_a_step_lasts_from_the_end_of_the_one_before_to_its_own() -> None:
    lines = ["sft: starting", "sft: done", "reward: starting", "reward: done", "ppo: done", "report"]
    ticks = [Tick(1, 1.0, 0.5), Tick(3, 30.0, 25.0), Tick(4, 70.0, 60.0), Tick(6, 170.0, 150.0)]
    assert demo_chain.times_of_steps(lines, ticks) == {
        "sft": {"wall_seconds": 30.0, "cpu_seconds": 25.0},
        "reward": {"wall_seconds": 40.0, "cpu_seconds": 35.0},
        "ppo": {"wall_seconds": 100.0, "cpu_seconds": 90.0},
    }
