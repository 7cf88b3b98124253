"""The reward step from beginning to end, as a user finds it afterwards."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from common.artifacts import Artifact, file_sha256, read_manifest, verify
from common.config import SourceConfig
from common.evidence import share_interval
from common.stage import Role
from step2_reward.config import RewardConfig, RewardJob
from tests.runs import CHECKPOINT, EXPORT, Base, files_below, finish, write_job
from tests.step2_dpo.runs import make_policy, pairs, write_rows
from tests.step2_reward.runs import lines_of, make_job, reward, run_job, series


@pytest.fixture(scope="module")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    make_policy(folder / "policy", base.tokenizer)
    return folder


@pytest.fixture(scope="module")
def run_dir(folder: Path) -> Path:
    run_dir = folder / "runs" / "whole"
    run_job(make_job(folder, folder / "policy", eval_every=2, save_every=3), run_dir)
    return run_dir


def job_of(folder: Path, **train: int) -> RewardJob:
    return make_job(folder, folder / "policy", **train)


def swapped_rows(path: Path, count: int) -> str:
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(count)]
    return str(write_rows(path, rows))


def test_a_run_leaves_exactly_these_files(run_dir: Path) -> None:
    # every evaluation was the best one so far: after 2, 4 and 5 steps
    kept = (f"checkpoints/step_{step:08d}/{name}" for step in (4, 5) for name in CHECKPOINT)
    plain = ("metrics.jsonl", "ledger.json", "logs/rank_0.log")
    exported = {f"export/{name}" for name in EXPORT if name != "generation_config.json"}
    assert files_below(run_dir / "reward") == {*kept, *plain, *exported}


def test_every_line_has_the_metrics_that_users_know(run_dir: Path) -> None:
    training = {
        "step", "loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "chosen_reward",
        "rejected_reward", "reward_length_correlation", "grad_norm", "learning_rate", "num_tokens", "epoch",
        "perf/tokens_per_second", "perf/memory_gb", "perf/peak_memory_gb", "perf/padding_share",
    }  # fmt: skip
    assert [line["step"] for line in lines_of(run_dir)] == [1, 2, 3, 4, 5]
    for line in lines_of(run_dir):
        assert set(line) == training and all(math.isfinite(value) for value in line.values())
    evaluation = {
        "step", "eval/loss", "eval/accuracy", "eval/margin", "eval/mean_reward", "eval/std_reward",
        "eval/expected_calibration_error", "eval/reward_length_correlation", "eval/accuracy_chosen_shorter",
    }  # fmt: skip
    assert [line["step"] for line in lines_of(run_dir, "eval/loss")] == [0, 2, 4, 5]
    assert all(set(line) == evaluation for line in lines_of(run_dir, "eval/loss"))
    not_here = {"eval/accuracy_chosen_longer", "eval/accuracy_same_length", "eval/{source}/accuracy"}
    assert evaluation | not_here == {"step", *RewardConfig().measured()}  # what early stopping may watch


def test_a_run_learns_to_order_the_pairs(run_dir: Path) -> None:
    losses = series(run_dir, "loss")
    # the first step's learning rate is 0, and a new head knows nothing
    assert losses[0] == pytest.approx(math.log(2), abs=0.1) and losses[-1] < 0.3
    assert series(run_dir, "eval/loss")[0] == pytest.approx(math.log(2), abs=0.1)
    assert series(run_dir, "eval/accuracy")[-1] == 1.0
    for line in lines_of(run_dir):
        assert line["margin"] == pytest.approx(line["chosen_reward"] - line["rejected_reward"])


def test_the_artifact_verifies_names_its_parent_and_carries_its_calibration(
    folder: Path, run_dir: Path
) -> None:
    details = Artifact.load(run_dir / "reward" / "export", Role.reward_model).manifest.details
    policy = folder / "policy"
    assert details["parents"] == [
        {
            "role": "policy",
            "path": str(policy.resolve()),
            "manifest_sha256": file_sha256(policy / "manifest.json"),
        }
    ]
    last = lines_of(run_dir, "eval/loss")[-1]
    assert details["calibration"] == {
        "mean": last["eval/mean_reward"],
        "std": last["eval/std_reward"],
        "accuracy": last["eval/accuracy"],
        "expected_calibration_error": last["eval/expected_calibration_error"],
        "accuracy_interval": list(share_interval(last["eval/accuracy"], 6)),
        "pairs": 6,
    }
    assert details["calibration"]["std"] > 0 and details["metrics"]["eval/loss"] == last["eval/loss"]
    for name in ("tokenizer_hash", "chat_template_hash", "terminators", "pad_token_id", "eos_token_id"):
        assert details[name] == read_manifest(policy).details[name]
    assert details["pad_token_id"] not in details["terminators"]


def test_the_same_command_after_the_end_changes_no_bit(run_dir: Path) -> None:
    before = (run_dir / "reward" / "export" / "manifest.json").read_bytes()
    metrics = (run_dir / "reward" / "metrics.jsonl").read_text()
    printed = finish(run_dir, 1, reward)
    assert "resuming from" in printed and "warning" not in printed
    assert (run_dir / "reward" / "export" / "manifest.json").read_bytes() == before
    assert (run_dir / "reward" / "metrics.jsonl").read_text() == metrics


def test_sources_are_measured_one_by_one(folder: Path) -> None:
    job = job_of(folder)
    paths = [job.reward.data.sources[0].path, swapped_rows(folder / "backwards.jsonl", 20)]
    job.reward.data.sources = [SourceConfig(path=path) for path in paths]
    run_job(job, folder / "runs" / "two sources")
    first, last = lines_of(folder / "runs" / "two sources", "eval/loss")
    assert first["step"] == 0 and set(first) == set(last)
    assert 0 <= last["eval/pairs/accuracy"] <= 1 and 0 <= last["eval/backwards/accuracy"] <= 1
    assert {"eval/accuracy_chosen_longer", "eval/accuracy_chosen_shorter"} <= set(last)


def test_without_held_out_pairs_training_pairs_calibrate_and_that_is_said(folder: Path) -> None:
    job = job_of(folder)
    job.reward.data.eval_fraction = 0.0
    run_dir = folder / "runs" / "nothing held out"
    printed = run_job(job, run_dir)
    assert "no pairs are held out: accuracy (100.0%) and calibration are those of" in (
        " ".join(printed.split())
    )
    details = verify(run_dir / "reward" / "export").details
    assert details["calibration"]["pairs"] == 30 and details["calibration"]["std"] > 0
    assert lines_of(run_dir, "eval/loss") == []


def test_held_out_pairs_the_other_way_round_give_a_warning(folder: Path) -> None:
    job = job_of(folder, max_steps=8)
    job.reward.data.eval_fraction = None
    job.reward.data.eval_path = swapped_rows(folder / "swapped.jsonl", 12)
    printed = " ".join(run_job(job, folder / "runs" / "swapped").split())
    assert "are the columns chosen and rejected swapped" in printed and "eval/margin -" in printed
    assert "warn_below_accuracy" not in printed  # one warning says it


def test_margins_and_centering_are_felt(folder: Path) -> None:
    rows = [{**row, "margin": 1.5} for row in pairs(12)]
    first = {}
    for name, path, weight in (
        ("plain", write_rows(folder / "plain.jsonl", pairs(12)), 0.0),
        ("margin", write_rows(folder / "margin.jsonl", rows), 0.0),
        ("centred", folder / "plain.jsonl", 0.5),
    ):
        job = job_of(folder, max_steps=1, global_batch_size=12)
        job.reward.data.sources = [SourceConfig(path=str(path))]
        job.reward.data.eval_fraction, job.reward.center_rewards_coefficient = 0.0, weight
        run_job(job, folder / "runs" / name)
        (first[name],) = lines_of(folder / "runs" / name)
    # of a model that knows nothing: log(1 + e^1.5) against log 2
    assert first["plain"]["loss"] == pytest.approx(math.log(2), abs=0.1)
    assert first["margin"]["loss"] == pytest.approx(math.log1p(math.exp(1.5)), abs=0.1)
    assert first["margin"]["margin"] == pytest.approx(first["plain"]["margin"], abs=1e-6)
    # both rewards of a pair are about the mean one
    squares = (2 * first["plain"]["mean_reward"]) ** 2
    assert first["centred"]["loss"] - first["plain"]["loss"] == pytest.approx(0.5 * squares, rel=0.1)


def test_the_default_learning_rates_are_those_of_reward_models(folder: Path) -> None:
    rates = []
    for adapters in (False, True):
        job = job_of(folder, max_steps=2)
        job.model.lora.enabled, job.reward.optim.lr, job.reward.optim.warmup_ratio = adapters, None, 0.0
        run_job(job, folder / "runs" / f"default {adapters}")
        rates.append(series(folder / "runs" / f"default {adapters}", "learning_rate")[0])
    assert rates == [1e-5, 1e-4]


def test_a_damaged_policy_is_refused_once_by_all_ranks(base: Base, folder: Path) -> None:
    policy = make_policy(folder / "damaged", base.tokenizer)
    weights = policy / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    printed = run_job(make_job(folder, policy), folder / "runs" / "damaged", ranks=2, code=2)
    assert printed.count("error: ") == 1 and "reward.policy=" in printed and "model.safetensors" in printed


def test_a_reward_model_is_not_a_policy(folder: Path, run_dir: Path) -> None:
    job = make_job(folder, run_dir / "reward" / "export")
    printed = run_job(job, folder / "runs" / "no policy", code=2)
    assert "is a reward_model, where a policy is needed" in " ".join(printed.split())


def test_the_preview_shows_both_answers_to_a_prompt(folder: Path) -> None:
    run_dir = write_job(job_of(folder), folder / "runs" / "preview")
    printed = finish(run_dir, 1, reward, "--preview")
    assert "prompt (" in printed and "chosen:" in printed and "rejected:" in printed
    assert not (run_dir / "reward" / "metrics.jsonl").exists()
