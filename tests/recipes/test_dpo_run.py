"""The DPO step from beginning to end, as a user finds it afterwards."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from common.artifacts import file_sha256, read_manifest, verify, write_manifest
from common.config import Dtype, LoraConfig
from common.stage import Role
from step2_dpo.config import DPOConfig, DPOJob, LossType
from tests.runs import CHECKPOINT, EXPORT, Base, files_below, finish
from tests.step2_dpo.runs import (
    dpo,
    lines_of,
    make_job,
    make_policy,
    pairs,
    run_job,
    series,
    write_job,
    write_rows,
)

PREFERENCE = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "entropy", "mean_token_accuracy",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    make_policy(folder / "policy", base.tokenizer)
    return folder


@pytest.fixture(scope="module")
def run_dir(folder: Path) -> Path:
    run_dir = folder / "runs" / "whole"
    run_job(make_job(folder, folder / "policy", eval_every=2, save_every=3), run_dir)
    return run_dir


def job_of(folder: Path, **train: int) -> DPOJob:
    return make_job(folder, folder / "policy", **train)


def test_a_run_leaves_exactly_these_files(run_dir: Path) -> None:
    # every evaluation was the best one so far: after 2, 4 and 5 steps
    kept = (f"checkpoints/step_{step:08d}/{name}" for step in (4, 5) for name in CHECKPOINT)
    plain = ("metrics.jsonl", "samples.jsonl", "ledger.json", "logs/rank_0.log")
    assert files_below(run_dir / "dpo") == {*kept, *plain, *(f"export/{name}" for name in EXPORT)}


def test_every_line_has_the_metrics_that_users_know(run_dir: Path) -> None:
    training = {
        "step", "grad_norm", "learning_rate", "num_tokens", "num_trained_tokens", "epoch",
        "perf/tokens_per_second", "perf/memory_gb", "perf/peak_memory_gb", "perf/padding_share", *PREFERENCE,
    }  # fmt: skip
    assert [line["step"] for line in lines_of(run_dir)] == [1, 2, 3, 4, 5]
    for line in lines_of(run_dir):
        assert set(line) == training and all(math.isfinite(value) for value in line.values())
    evaluation = {"step", "eval/stop_rate", *(f"eval/{name}" for name in PREFERENCE)}
    assert [line["step"] for line in lines_of(run_dir, "eval/loss")] == [0, 2, 4, 5]
    assert all(set(line) == evaluation for line in lines_of(run_dir, "eval/loss"))
    assert evaluation == {"step", *DPOConfig().measured()}  # what early stopping may watch


def test_a_run_begins_at_log_2_and_learns_the_pairs(run_dir: Path) -> None:
    losses, margins = series(run_dir, "loss"), series(run_dir, "rewards/margins")
    assert losses[0] == math.log(2) and margins[0] == 0.0
    held_out = lines_of(run_dir, "eval/loss")[0]
    assert (
        held_out["eval/loss"] == pytest.approx(math.log(2)) and abs(held_out["eval/rewards/margins"]) < 1e-6
    )
    # the first step's learning rate is 0
    assert losses[-1] < math.log(2) and margins[-1] > 0 and losses[1] == math.log(2)
    for line in lines_of(run_dir):
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"])


def test_samples_answer_held_out_prompts(run_dir: Path) -> None:
    samples = [json.loads(line) for line in (run_dir / "dpo" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 0, 2, 2, 2, 4, 4, 4, 5, 5, 5]
    assert all(sample["prompt"].endswith("<|im_start|>assistant\n") for sample in samples)
    assert len({sample["prompt"] for sample in samples}) == 3


def test_the_artifact_verifies_and_names_its_parent_by_hash(folder: Path, run_dir: Path) -> None:
    manifest = verify(run_dir / "dpo" / "export")
    assert (manifest.kind, manifest.role) == ("artifact", Role.policy)
    policy = folder / "policy"
    (parent,) = manifest.details["parents"]
    assert parent == {
        "role": "policy",
        "path": str(policy.resolve()),
        "manifest_sha256": file_sha256(policy / "manifest.json"),
    }
    assert manifest.details["metrics"]["eval/loss"] == series(run_dir, "eval/loss")[-1]
    reference = manifest.details["reference"]
    (cached,) = folder.rglob(f"reference/{reference['file']}")
    assert reference["sha256"] == file_sha256(cached)
    for name in ("tokenizer_hash", "chat_template_hash", "terminators", "pad_token_id", "eos_token_id"):
        assert manifest.details[name] == read_manifest(policy).details[name]
    weights = "model.safetensors"
    assert manifest.files[weights] != read_manifest(policy).files[weights]


def test_the_same_command_after_the_end_changes_no_bit(run_dir: Path) -> None:
    before = verify(run_dir / "dpo" / "export").files
    metrics = (run_dir / "dpo" / "metrics.jsonl").read_text()
    printed = finish(run_dir, 1, dpo)
    assert "reference log-probabilities: from the cache" in printed
    assert verify(run_dir / "dpo" / "export").files == before
    assert (run_dir / "dpo" / "metrics.jsonl").read_text() == metrics


def test_a_policy_overwritten_in_place_is_a_new_reference(base: Base, folder: Path) -> None:
    policy = make_policy(folder / "overwritten", base.tokenizer, seed=1)
    job = make_job(folder, policy, max_steps=2, eval_every=0)
    job.dpo.sampling.num_prompts = 0
    printed = run_job(job, folder / "runs" / "before")
    assert "computing the reference log-probabilities" in printed
    assert "reference log-probabilities: from the cache" in run_job(job, folder / "runs" / "again")
    make_policy(policy, base.tokenizer, seed=2)
    printed = run_job(job, folder / "runs" / "after")
    assert "computing the reference log-probabilities (changed since the last time: weights)" in printed
    # with the old numbers this loss would be another
    assert series(folder / "runs" / "after", "loss")[0] == math.log(2)
    logps = [series(folder / "runs" / name, "logps/chosen")[0] for name in ("before", "after")]
    assert abs(logps[0] - logps[1]) > 0.1


@pytest.mark.slow
def test_pairs_seen_again_in_other_company_begin_at_margin_0_all_the_same(base: Base, folder: Path) -> None:
    # large enough that in bf16 a pair's last bits depend on the pairs beside it, with most CPUs' kernels
    policy = make_policy(folder / "wide", base.tokenizer, hidden_size=512, intermediate_size=1536)
    job = make_job(folder, policy, max_steps=6, eval_every=0, save_every=0)  # an epoch: half the pairs twice
    job.model.dtype = Dtype.bf16
    job.dpo.train.micro_batch_size, job.dpo.data.packing = 4, False  # four pairs, then two
    job.dpo.data.sources[0].weight, job.dpo.sampling.num_prompts = 1.5, 0
    run_job(job, folder / "runs" / "again in bf16")
    # none of the first step's pairs stands twice in it
    assert series(folder / "runs" / "again in bf16", "rewards/margins")[0] == 0.0
    assert series(folder / "runs" / "again in bf16", "loss")[0] == math.log(2)


def test_every_objective_begins_at_its_own_value_and_label_smoothing_is_felt(folder: Path) -> None:
    ends = {}
    for name, settings, start in (
        ("plain", {}, math.log(2)),
        ("smoothed", {"label_smoothing": 0.2}, math.log(2)),
        ("ipo", {"loss_type": LossType.ipo, "beta": 0.5}, 1.0),
        ("hinge", {"loss_type": LossType.hinge}, 1.0),
        ("per token", {"length_normalized": True}, math.log(2)),
    ):
        job = job_of(folder, max_steps=4)
        job.dpo.data.eval_fraction, job.dpo.optim.lr = 0.0, 1e-2
        for field, value in settings.items():
            setattr(job.dpo, field, value)
        run_job(job, folder / "runs" / name)
        losses = series(folder / "runs" / name, "loss")
        assert losses[0] == pytest.approx(start, rel=1e-15) and losses[-1] < losses[0]
        ends[name] = losses[-1]
    assert ends["smoothed"] > ends["plain"] + 0.01
    assert len(set(ends.values())) == 5


def test_the_sft_term_is_added(folder: Path) -> None:
    job = job_of(folder, max_steps=1)
    job.dpo.sft_weight, job.dpo.data.eval_fraction = 0.5, 0.0
    run_job(job, folder / "runs" / "with the SFT term")
    # a random model of 300 tokens: about log 300 per token
    loss = series(folder / "runs" / "with the SFT term", "loss")[0]
    assert loss - math.log(2) == pytest.approx(0.5 * math.log(300), rel=0.1)


@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_begin_at_the_base_and_are_merged(folder: Path, stage: int) -> None:
    job = job_of(folder)
    job.model.lora, job.deepspeed.stage = LoraConfig(enabled=True, r=4), stage
    job.dpo.optim.lr = 1e-2
    run_dir = folder / "runs" / f"adapters {stage}"
    run_job(job, run_dir)
    assert series(run_dir, "loss")[0] == math.log(2) and series(run_dir, "loss")[-1] < math.log(2)
    assert (run_dir / "dpo" / "export" / "adapter" / "adapter_config.json").exists()


def test_without_warm_up_the_default_learning_rates_are_those_of_dpo(folder: Path) -> None:
    rates = []
    for adapters in (False, True):
        job = job_of(folder, max_steps=2)
        job.model.lora.enabled, job.dpo.optim.lr, job.dpo.optim.warmup_ratio = adapters, None, 0.0
        job.dpo.data.eval_fraction = 0.0
        run_job(job, folder / "runs" / f"default {adapters}")
        rates.append(series(folder / "runs" / f"default {adapters}", "learning_rate")[0])
    assert rates == [5e-7, 5e-6]


def test_held_out_pairs_the_other_way_round_give_a_warning(folder: Path) -> None:
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs()]
    job = job_of(folder, max_steps=8)
    job.dpo.data.eval_fraction = None
    job.dpo.data.eval_path = str(write_rows(folder / "swapped.jsonl", swapped[:12]))
    job.dpo.optim.lr = 1e-2
    printed = run_job(job, folder / "runs" / "swapped")
    assert "are the columns chosen and rejected swapped" in printed
    assert "eval/rewards/margins" in printed


def test_a_damaged_policy_is_refused_by_every_rank(base: Base, folder: Path) -> None:
    policy = make_policy(folder / "damaged", base.tokenizer)
    with (policy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    printed = run_job(make_job(folder, policy), folder / "runs" / "damaged", ranks=2, code=2)
    assert printed.count("error: ") == 1 and "dpo.policy=" in printed and "model.safetensors" in printed


def test_a_reward_model_is_not_a_policy(folder: Path) -> None:
    reward = folder / "reward"
    shutil.copytree(folder / "policy", reward)
    manifest = read_manifest(reward)
    write_manifest(reward, type(manifest)("artifact", Role.reward_model, manifest.files, manifest.details))
    printed = run_job(make_job(folder, reward), folder / "runs" / "reward", code=2)
    assert "is a reward_model, where a policy is needed" in printed


def test_the_preview_shows_both_answers_to_a_prompt(folder: Path) -> None:
    run_dir = write_job(job_of(folder), folder / "runs" / "preview")
    printed = finish(run_dir, 1, dpo, "--preview")
    assert "prompt (" in printed and "chosen:" in printed and "rejected:" in printed
    assert not (run_dir / "dpo" / "metrics.jsonl").exists()
