"""A DPO run whose reference is another model than the policy that it starts from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from common.artifacts import file_sha256, read_manifest
from common.config import LoraConfig
from step2_dpo.config import DPOJob
from tests.runs import Base
from tests.step2_dpo.runs import lines_of, make_job, make_policy, run_job, series

ANSWERS = ("chosen", "rejected")


@pytest.fixture(scope="module")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    make_policy(folder / "policy", base.tokenizer)
    make_policy(folder / "other", base.tokenizer, seed=1, num_hidden_layers=1)
    return folder


def job_of(folder: Path, policy: str, reference: str | None) -> DPOJob:
    job = make_job(folder, folder / policy, max_steps=3)
    job.dpo.sampling.num_prompts = 0
    job.dpo.reference = None if reference is None else str(folder / reference)
    return job


@pytest.fixture(scope="module")
def of_the_other(folder: Path) -> Path:
    """A run that starts from the other model, whose log-probabilities are therefore in its metrics."""
    run_job(job_of(folder, "other", None), run_dir := folder / "runs" / "other")
    return run_dir


@pytest.mark.parametrize(("ranks", "stage", "adapters"), [(1, 2, False), (2, 3, True), (2, 1, False)])
def test_rewards_are_differences_from_the_log_probabilities_of_the_model_that_is_named(
    folder: Path, of_the_other: Path, ranks: int, stage: int, adapters: bool
) -> None:
    job = job_of(folder, "policy", "other")
    job.deepspeed.stage, job.model.lora = stage, LoraConfig(enabled=adapters, r=4)
    run_dir = folder / "runs" / f"{ranks} ranks, stage {stage}"
    job.dpo.data.cache_dir = str(run_dir / "cache")  # in the other one the numbers are already
    printed = run_job(job, run_dir, ranks)
    assert "computing the reference log-probabilities" in printed
    for part in ("", "eval/"):
        (first, *_), (others, *_) = (lines_of(path, f"{part}loss") for path in (run_dir, of_the_other))
        for answer in ANSWERS:
            logps, reward = first[f"{part}logps/{answer}"], first[f"{part}rewards/{answer}"]
            known = logps - reward / job.dpo.beta
            assert known == pytest.approx(others[f"{part}logps/{answer}"], rel=1e-5)
        assert first[f"{part}loss"] != pytest.approx(math.log(2), rel=1e-3)


def test_a_policy_that_is_named_as_its_own_reference_gives_the_bits_of_one_that_is_not(folder: Path) -> None:
    found = []
    for reference in (None, "policy"):
        job, run_dir = job_of(folder, "policy", reference), folder / "runs" / f"named {reference}"
        job.dpo.data.cache_dir = str(run_dir / "cache")
        assert "computing the reference log-probabilities" in run_job(job, run_dir)
        found.append([series(run_dir, name) for name in ("loss", "rewards/margins", "grad_norm")])
        found[-1].append(file_sha256(run_dir / "dpo" / "export" / "model.safetensors"))
    assert found[0] == found[1] and found[0][0][0] == math.log(2)


def test_the_manifest_tells_the_reference_from_the_policy(folder: Path) -> None:
    run_job(job_of(folder, "policy", "other"), run_dir := folder / "runs" / "told apart")
    manifest = read_manifest(run_dir / "dpo" / "export")
    policy, reference = manifest.details["parents"]
    assert policy["manifest_sha256"] == file_sha256(folder / "policy" / "manifest.json")
    assert reference["manifest_sha256"] == file_sha256(folder / "other" / "manifest.json")
    assert (policy.get("taken_as"), reference["taken_as"]) == (None, "reference")
    card = (run_dir / "dpo" / "export" / "README.md").read_text()
    assert card.count("that training started from") == 1 and "* Reference of the loss: manifest" in card
