"""What users get wrong with PPO, met by the step itself: one clear error, status 2, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.config import SourceConfig
from common.model.tokenizer import train_tokenizer
from step3_ppo.config import Estimator, PPOJob
from tests.step2_dpo.runs import write_rows
from tests.step3_ppo.runs import (
    Artifacts,
    lines_of,
    make_artifacts,
    make_job,
    questions,
    run_job,
    without_reward_model,
)

FUNCTIONS = "tests.step3_ppo.reward_functions"


@pytest.fixture
def job(folder: Path, artifacts: Artifacts) -> PPOJob:
    return make_job(folder, artifacts, max_steps=1)


def refused(job: PPOJob, run_dir: Path, ranks: int = 1) -> str:
    """The one error that a person reads, without line breaks; nothing was exported."""
    printed = run_job(job, run_dir, ranks, code=2)
    assert "Traceback" not in printed, printed
    assert printed.count("error: ") == 1, printed
    assert not (run_dir / "ppo" / "export").exists()
    return " ".join(printed.partition("error: ")[2].split())


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("broken", ["broken failed: ZeroDivisionError", "reward_functions.py:"]),
        ("nan_for_empty", ["nan_for_empty returned nan as score", "for the completion ''"]),
        ("too_few", ["too_few returned 7 scores for 8 completions"]),
        ("texts", ["texts returned '1.0' as score 0"]),
        ("nothing", ["nothing returned None where a list of numbers is needed"]),
    ],
)
def test_a_reward_function_that_goes_wrong_is_named(
    job: PPOJob, tmp_path: Path, function: str, said: list[str]
) -> None:
    without_reward_model(job, Estimator.rloo).ppo.rewards[0].function = f"{FUNCTIONS}:{function}"
    job.ppo.evaluation.num_prompts, job.ppo.train.max_steps = 0, 4  # until a completion is empty
    job.ppo.train.global_batch_size = 8
    error = refused(job, tmp_path / "run")
    assert all(words in error for words in said), error


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_function_of_the_evaluation_that_goes_wrong_ends_all_ranks(
    job: PPOJob, tmp_path: Path, ranks: int
) -> None:
    job.ppo.evaluation.functions = {"gold": f"{FUNCTIONS}:texts"}
    error = refused(job, tmp_path / "run", ranks)
    assert "texts returned '1.0' as score 0" in error


def test_a_column_that_the_evaluation_wants_is_missed_before_anything_is_sampled(
    job: PPOJob, tmp_path: Path
) -> None:
    job.ppo.evaluation.functions = {"right": f"{FUNCTIONS}:right"}
    error = refused(job, tmp_path / "run")
    assert "takes answer, which is neither prompts nor completions nor a column" in error
    assert not (tmp_path / "run" / "ppo" / "metrics.jsonl").exists()


def rows_of(job: PPOJob, path: Path, rows: list[dict[str, Any]]) -> PPOJob:
    job.ppo.data.sources = [SourceConfig(path=str(write_rows(path, rows)))]
    return job


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "what a day"}], ["plain text has no prompt"]),
        ([{"left": "a", "right": "b"}], ["needs prompts", "left, right"]),
        ([{"prompt": "word " * 80}], ["no row is left", "ppo.data.max_length"]),
        ([{"prompt": ""}], ["rows.jsonl:1"]),
        ([], ["rows.jsonl"]),
    ],
    ids=["text", "columns", "too long", "empty", "no rows"],
)
def test_a_file_without_a_usable_prompt_says_why(
    job: PPOJob, tmp_path: Path, rows: list[dict[str, Any]], said: list[str]
) -> None:
    error = refused(rows_of(job, tmp_path / "rows.jsonl", rows), tmp_path / "run")
    assert all(words in error for words in said), error


def test_held_out_prompts_that_are_all_too_long_say_so(job: PPOJob, tmp_path: Path) -> None:
    job.ppo.data.eval_fraction = None
    job.ppo.data.eval_path = str(write_rows(tmp_path / "held_out.jsonl", [{"prompt": "word " * 80}]))
    error = refused(job, tmp_path / "run")
    assert "held_out" in error and "no row is left" in error


def test_without_held_out_prompts_a_run_evaluates_nothing(job: PPOJob, tmp_path: Path) -> None:
    job.ppo.data.eval_fraction = 0.0
    run_job(job, tmp_path / "run")
    assert lines_of(tmp_path / "run", "eval/reward") == [] and len(lines_of(tmp_path / "run")) == 1
    assert not (tmp_path / "run" / "ppo" / "samples.jsonl").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reward_model_that_reads_text_otherwise_is_refused(
    folder: Path, artifacts: Artifacts, tmp_path: Path, ranks: int
) -> None:
    texts = (json.dumps(row) for row in questions())
    train_tokenizer(texts, 280).save_pretrained(tmp_path / "tokenizer")
    other = make_artifacts(tmp_path, tmp_path / "tokenizer").reward_model
    job = make_job(folder, Artifacts(artifacts.policy, other))
    error = refused(job, tmp_path / "run", ranks)
    assert "do not read text alike" in error and "tokenizer" in error
    assert str(artifacts.policy) in error and str(other) in error


def test_artifacts_in_each_others_place_are_refused(
    folder: Path, artifacts: Artifacts, tmp_path: Path
) -> None:
    swapped = make_job(folder, Artifacts(artifacts.reward_model, artifacts.reward_model))
    error = refused(swapped, tmp_path / "reward model as policy")
    assert "ppo.policy=" in error and "reward_model" in error
    swapped = make_job(folder, Artifacts(artifacts.policy, artifacts.policy))
    error = refused(swapped, tmp_path / "policy as reward model")
    assert "ppo.reward_model=" in error and "policy" in error


def test_a_damaged_reward_model_is_refused(folder: Path, artifacts: Artifacts, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "reward_model"
    shutil.copytree(artifacts.reward_model, copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    error = refused(make_job(folder, Artifacts(artifacts.policy, copy)), tmp_path / "run")
    assert f"ppo.reward_model={copy}" in error and "model.safetensors" in error


def test_a_warm_up_of_the_critic_that_leaves_the_actor_no_iteration_is_refused(
    job: PPOJob, tmp_path: Path
) -> None:
    job.ppo.critic.warmup_iterations = 1
    error = refused(job, tmp_path / "run")
    assert "ppo.critic.warmup_iterations=1 leaves nothing of the run's 1 iterations to the actor" in error
