"""PPO against a reward model that others published, which reads text with a tokenizer of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from common.artifacts import read_json, write_json
from common.config import ModelConfig
from common.stage import Role
from common.training.import_model import import_model
from pipeline.export import checkpoint_of, lay_out
from step3_ppo.config import CriticStart, PPOJob
from step3_ppo.rollout import Experience
from tests.common.training.exporting import published
from tests.runs import Base
from tests.step3_ppo.runs import Artifacts, lines_of, make_artifacts, make_job, run_job, watched

SCORER = AutoModelForSequenceClassification
# the documents of a batch stand beside each other in another order
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Path:
    return published(folder / "scorer", SCORER, torch.float32, labels=1, max_position_embeddings=512)


@pytest.fixture(scope="module")
def artifacts(base: Base, folder: Path, scorer: Path) -> Artifacts:
    ours = make_artifacts(folder, base.tokenizer)
    theirs = import_model(ModelConfig(path=str(scorer)), Role.reward_model, folder / "imported")
    return Artifacts(ours.policy, theirs)


def job_of(folder: Path, artifacts: Artifacts, **train: Any) -> PPOJob:
    job = make_job(folder, artifacts, **train)
    job.ppo.critic.start = CriticStart.policy
    return job


@pytest.fixture(scope="module")
def run_dir(folder: Path, artifacts: Artifacts) -> Path:
    run_job(job_of(folder, artifacts), folder / "runs" / "whole")
    return folder / "runs" / "whole"


@torch.no_grad()
def plain_scores(scorer: Path, policy: Path, experience: Experience, questions: list[str]) -> np.ndarray:
    """What plain transformers says of the conversations, read from nothing but the two folders."""
    model, reads = SCORER.from_pretrained(scorer).eval(), AutoTokenizer.from_pretrained(scorer)
    writes: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(policy)
    found = []
    for response, question in zip(experience.responses, questions, strict=True):
        answer = writes.decode(response.tokens, skip_special_tokens=True)
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = reads.apply_chat_template(said, return_dict=False)
        found.append(float(model(input_ids=torch.tensor([ids])).logits[0, 0]))
    return np.array(found)


def questions_of(policy: Path, experience: Experience) -> list[str]:
    writes = AutoTokenizer.from_pretrained(policy)
    asked = [writes.decode(response.prompt, skip_special_tokens=True) for response in experience.responses]
    return [text.removeprefix("user\n").partition("\n")[0] for text in asked]


def test_rewards_are_calibrated_scores_of_plain_transformers(
    run_dir: Path, scorer: Path, artifacts: Artifacts
) -> None:
    calibration = read_json(run_dir / "ppo" / "calibration.json")
    for experience in watched(run_dir)["experiences"]:
        questions = questions_of(artifacts.policy, experience)
        assert all(question.startswith("What is ") for question in questions)
        expected = plain_scores(scorer, artifacts.policy, experience, questions)
        assert len(set(expected)) > 2
        assert experience.scores["reward_model"] == pytest.approx(expected, abs=TOLERANCE)
        units = np.clip(
            (experience.scores["reward_model"] - calibration["mean"]) / calibration["std"], -10, 10
        )
        stopped = np.array([response.stopped for response in experience.responses])
        assert experience.rewards == pytest.approx(units - ~stopped)


def test_the_first_batch_has_mean_0_and_deviation_1_in_these_units(run_dir: Path) -> None:
    """The same prompts as the first iteration's, with draws of their own."""
    calibration = read_json(run_dir / "ppo" / "calibration.json")
    assert calibration["prompts"] * calibration["samples"] == 8
    first = watched(run_dir)["experiences"][0].scores["reward_model"]
    spread = abs(first.mean() - calibration["mean"]) / calibration["std"]
    assert 0 < spread < 3 and 0.2 < first.std() / calibration["std"] < 5


@pytest.mark.parametrize("shared", [1, 2], ids=["rows of their own", "rows that they share"])
def test_ranks_of_zero_3_score_alike(run_dir: Path, folder: Path, artifacts: Artifacts, shared: int) -> None:
    job = job_of(folder, artifacts, max_steps=1)
    job.deepspeed.stage, job.launch.sequence_parallel = 3, shared
    run_job(job, folder / "runs" / f"two {shared}", ranks=2)
    one, two = (watched(at)["experiences"][0] for at in (run_dir, folder / "runs" / f"two {shared}"))
    assert two.scores["reward_model"] == pytest.approx(one.scores["reward_model"], abs=TOLERANCE)
    assert two.rewards == pytest.approx(one.rewards, abs=1e-3)  # divided by a small deviation


def test_a_resumed_run_counts_in_the_units_in_which_it_began(folder: Path, artifacts: Artifacts) -> None:
    where = folder / "runs" / "resumed"
    printed = run_job(job_of(folder, artifacts, max_steps=1), where)
    assert "8 responses of the policy, from which rewards count" in printed
    file = where / "ppo" / "calibration.json"
    kept = read_json(file)
    write_json(file, {**kept, "mean": kept["mean"] + kept["std"]})
    (where / "ppo" / "export").rename(where / "moved")
    run_job(job_of(folder, artifacts, max_steps=2), where)
    last = watched(where)["experiences"][-1]
    stopped = np.array([response.stopped for response in last.responses])
    expected = (last.scores["reward_model"] - kept["mean"]) / kept["std"] - 1 - ~stopped
    assert last.rewards == pytest.approx(expected)
    assert [line["step"] for line in lines_of(where)] == [1, 2]


def test_an_exported_checkpoint_is_not_calibrated_anew(run_dir: Path, tmp_path: Path) -> None:
    lay_out(checkpoint_of(run_dir, "last"), tmp_path / "taken")
    kept = read_json(run_dir / "ppo" / "calibration.json")
    assert read_json(tmp_path / "taken" / "ppo" / "calibration.json") == kept


def test_what_was_measured_of_another_reward_model_does_not_count(folder: Path, artifacts: Artifacts) -> None:
    where = folder / "runs" / "other"
    file = where / "ppo" / "calibration.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"reward_model": "of another", "mean": 1e6, "std": 1.0}))
    run_job(job_of(folder, artifacts, max_steps=1), where)
    assert read_json(file)["mean"] != 1e6
