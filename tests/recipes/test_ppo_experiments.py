"""PPO as the experiments set it up, at tiny shapes: estimators, rewards and placements run to the end."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ppo_workload import export_as_reward_model
from common.artifacts import Artifact
from common.config import Dtype, ModelConfig
from common.model.tokenizer import load_tokenizer
from common.runtime.tracking import read_metrics
from common.stage import Role
from pipeline.compose import compose, prepare
from tests.runs import Base, finish, write_job
from tests.step2_dpo.runs import make_policy, write_rows
from tests.step3_ppo.runs import Artifacts

pytestmark = pytest.mark.slow  # whole runs

TINY = [
    "model.dtype=fp32", "deepspeed=zero1", "tracking=off", "steps=[ppo]", "ppo.data.max_length=96",
    "ppo.train.max_steps=2", "ppo.train.global_batch_size=8", "ppo.train.micro_batch_size=4",
    "ppo.train.eval_every=1", "ppo.rollout.prompts=8", "ppo.rollout.max_new_tokens=6", "ppo.rollout.slots=8",
    "ppo.evaluation.num_prompts=3", "ppo.optim.lr=1e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def artifacts(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    folder = tmp_path_factory.mktemp("ppo_experiments")
    policy, reward_model = make_policy(folder / "policy", base.tokenizer), folder / "reward_model"
    config = ModelConfig(path=str(policy), dtype=Dtype.fp32)
    export_as_reward_model(config, load_tokenizer(config), reward_model, 96)
    return Artifacts(policy, reward_model)


def ppo(config: str) -> int:
    """`python -m step3_ppo --config CONFIG` in this process."""
    from step3_ppo.__main__ import main

    sys.argv = ["step3_ppo", "--config", config]
    return main()


def run(folder: Path, artifacts: Artifacts, *overrides: str, ranks: int = 1, code: int = 0) -> str:
    """Run the PPO of an experiment; returns what was printed. Its folder is `folder`."""
    start = [f"ppo.policy={artifacts.policy}", f"output_dir={folder}", *TINY]
    config = compose(prepare([*start, *overrides]).overrides)
    return finish(write_job(config, folder), ranks, ppo, code=code)


def problems(folder: Path) -> str:
    """Rows like those of GSM8K; returns the override that names them."""
    numbers = random.Random(3)
    pairs = [(numbers.randrange(50), numbers.randrange(50)) for _ in range(30)]
    rows = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} is\n#### {a + b}"} for a, b in pairs]
    return f"ppo.data.path={write_rows(folder / 'problems.jsonl', rows)}"


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "ppo" / "metrics.jsonl") if name in line]


def check_finished(folder: Path) -> None:
    """Two iterations, three evaluations of finite numbers, and a policy."""
    Artifact.load(folder / "ppo" / "export", Role.policy)
    assert [line["step"] for line in lines(folder, "objective/scores")] == [1, 2]
    evaluations = lines(folder, "eval/reward")
    assert [line["step"] for line in evaluations] == [0, 1, 2]
    assert all(math.isfinite(value) for line in evaluations for value in line.values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_gsm8k_rlvr_rewards_what_is_verified(tmp_path: Path, artifacts: Artifacts, ranks: int) -> None:
    run(tmp_path, artifacts, "experiment=gsm8k_rlvr", problems(tmp_path), ranks=ranks)
    check_finished(tmp_path)
    learned = lines(tmp_path, "objective/scores")
    assert all(0 <= line["reward/gsm8k"] <= 1 for line in learned)
    assert all("loss/value_avg" not in line for line in learned)  # GRPO has no critic
    assert all("policy/ref_kl_avg" in line for line in learned)  # the KL is in the loss
    assert "eval/correct" in lines(tmp_path, "eval/reward")[0]
    samples = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert samples and all(sample["scores"]["correct"] in (0.0, 1.0) for sample in samples)


def test_hh_ppo_trains_a_critic_against_the_calibrated_reward_model(
    tmp_path: Path, artifacts: Artifacts
) -> None:
    rows = [
        {
            "chosen": f"\n\nHuman: Is {number} a number?\n\nAssistant: Yes.",
            "rejected": f"\n\nHuman: Is {number} a number?\n\nAssistant: No.",
        }
        for number in range(90)
    ]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    data = f"ppo.data.sources=[{{path: '{path}'}}]"
    run(tmp_path, artifacts, "experiment=hh_ppo", data, f"ppo.reward_model={artifacts.reward_model}")
    check_finished(tmp_path)
    for line in lines(tmp_path, "objective/scores"):
        assert math.isfinite(line["loss/value_avg"]) and math.isfinite(line["reward/reward_model"])
        assert line["num_responses"] == 8 * line["step"]


def test_the_flawed_reward_is_what_reward_hacking_learns_from(tmp_path: Path, artifacts: Artifacts) -> None:
    printed = run(tmp_path, artifacts, "experiment=reward_hacking", "ppo.rollout.samples_per_prompt=1")
    check_finished(tmp_path)
    assert "reward/polite" in lines(tmp_path, "objective/scores")[0]
    assert {"eval/gold", "eval/correct", "eval/style"} <= set(lines(tmp_path, "eval/reward")[0])
    assert "do not stop (response/truncated_share)" in printed  # the watchdogs are looking


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reward_function_that_fails_ends_the_run_on_every_rank(
    tmp_path: Path, artifacts: Artifacts, ranks: int
) -> None:
    wrong = write_rows(
        tmp_path / "wrong.jsonl", [{"question": f"What is {n}?", "answer": "?"} for n in range(30)]
    )
    printed = run(tmp_path, artifacts, "experiment=gsm8k_rlvr", f"ppo.data.path={wrong}", ranks=ranks, code=2)
    assert (
        "step3_ppo.rewards.verifiable:gsm8k failed: ValueError: the row's answer '?' names no number"
        in printed
    )
    assert not (tmp_path / "ppo" / "export").exists()


def test_a_column_that_is_missing_is_found_out_before_anything_is_sampled(
    tmp_path: Path, artifacts: Artifacts
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"What is {n}?", "result": n} for n in range(30)])
    printed = run(tmp_path, artifacts, "experiment=gsm8k_rlvr", f"ppo.data.path={rows}", code=2)
    assert "takes answer, which is neither prompts nor completions nor a column of the rows" in printed
    assert "the rows have the columns result" in printed and not lines_of_any(tmp_path)


def lines_of_any(folder: Path) -> list[dict[str, Any]]:
    """Whatever was measured."""
    path = folder / "ppo" / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []
