"""The embedded default for real, on one seed: it meets its bars, and a flawed reward shows for what it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import demo_chain
from common.runtime.tracking import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, demo_chain.Figures]:
    """The folder of the run, and what the benchmark reads out of it."""
    folder = tmp_path_factory.mktemp("demo")
    return folder / "seed0", demo_chain.run(folder, 0, [])


def test_the_chain_meets_every_bar_on_scores(chain: tuple[Path, demo_chain.Figures]) -> None:
    assert demo_chain.missed_bars(chain[1]) == []


def test_a_flawed_reward_rises_while_gold_falls_and_the_watchdog_says_so(
    chain: tuple[Path, demo_chain.Figures], tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "pipeline", "run", "experiment=reward_hacking", "steps=[ppo]",
        f"ppo.policy={chain[0] / 'sft' / 'export'}", f"output_dir={tmp_path}", "tracking=off",
    ]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = read_metrics(tmp_path / "reward_hacking" / "ppo" / "metrics.jsonl")
    first, *_, last = [line for line in lines if "eval/gold" in line]
    assert last["eval/reward"] > first["eval/reward"] + 1
    assert last["eval/gold"] < first["eval/gold"] - 0.2
    assert "reward hacking: the reward rose from" in said and "gold fell from" in said
