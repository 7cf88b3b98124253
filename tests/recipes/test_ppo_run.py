"""The PPO step from beginning to end, as a user finds it afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.artifacts import file_sha256, read_manifest, verify
from common.stage import Role
from step3_ppo.advantages import token_rewards
from step3_ppo.config import EvaluationConfig, PPOConfig
from step3_ppo.rollout import Experience
from tests.runs import finish
from tests.step3_ppo import reference
from tests.step3_ppo.runs import (
    Artifacts,
    lines_of,
    make_job,
    ppo,
    run_job,
    series,
    watched,
)

TEMPERATURE = 0.8
STATE = ("layout.json", "zero/mp_rank_00_model_states.pt", "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt")
CHECKPOINT = (
    "counters.json", "manifest.json", "lengths/lengths.npy",
    *(f"{part}/{name}" for part in ("actor", "critic") for name in STATE),
)  # fmt: skip
EXPORT = (
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
TRAINING = {
    "step", "reward/reward_model", "objective/scores", "objective/scores_std", "objective/kl",
    "objective/rlhf_reward", "objective/non_score_reward", "objective/entropy",
    "objective/advantages_abs_mean", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
    "policy/ref_kl_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio",
    "val/ratio_off", "val/first_ratio_error", "val/explained_variance", "val/num_eos_tokens",
    "response/length_mean", "response/length_max", "response/truncated_share", "kl_coef",
    "rollout/logprob_drift", "rollout/logprob_drift_max", "grad_norm", "critic/grad_norm",
    "learning_rate", "critic/learning_rate", "epoch", "num_tokens", "num_trained_tokens", "num_responses",
    "time/rollout", "time/score", "time/learn", "perf/rollout_tokens_per_second", "perf/slot_utilisation",
    "perf/rollout_balance",
    "perf/tokens_per_second", "perf/memory_gb", "perf/peak_memory_gb",
}  # fmt: skip
EVALUATION = {
    "step",
    *(f"eval/{name}{se}" for name in ("reward", "kl", "length", "stop_rate", "style") for se in ("", "_se")),
    *(f"eval/greedy/{name}{se}" for name in ("reward", "length", "stop_rate", "style") for se in ("", "_se")),
}
# fp32 sums in another order
TOLERANCE = 1e-5
# the same weights, but at other addresses: a kernel may round the last bit otherwise
LAST_BITS = 1e-6


@pytest.fixture(scope="module")
def run_dir(folder: Path, artifacts: Artifacts) -> Path:
    job = make_job(folder, artifacts, eval_every=2, save_every=2)
    job.ppo.rollout.temperature = TEMPERATURE
    job.ppo.evaluation.functions = {"style": "tests.step3_ppo.runs:shared"}
    run_job(job, folder / "runs" / "whole")
    return folder / "runs" / "whole"


@pytest.fixture(scope="module")
def experiences(run_dir: Path) -> list[Experience]:
    """Of the three iterations."""
    found: list[Experience] = watched(run_dir)["experiences"]
    assert len(found) == 3 and all(len(experience.responses) == 8 for experience in found)
    stopped = [response.stopped for response in found[0].responses]
    assert any(stopped) and not all(stopped)  # both kinds are looked at
    return found


def test_a_run_leaves_exactly_these_files(run_dir: Path) -> None:
    folder = run_dir / "ppo"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    # numbered by updates, of which an iteration has two: after iterations 2 and 3
    kept = (f"checkpoints/step_{update:08d}/{name}" for update in (4, 6) for name in CHECKPOINT)
    plain = ("metrics.jsonl", "samples.jsonl", "ledger.json", "logs/rank_0.log")
    assert found == {*kept, *plain, *(f"export/{name}" for name in EXPORT)}


def test_neither_actor_nor_critic_has_an_optimizers_state_in_the_export(run_dir: Path) -> None:
    assert watched(run_dir)["states"] == [0, 0]


def test_every_line_has_the_metrics_that_users_know(run_dir: Path) -> None:
    assert [line["step"] for line in lines_of(run_dir)] == [1, 2, 3]
    for line in lines_of(run_dir):
        assert set(line) == TRAINING and all(math.isfinite(value) for value in line.values())
    # before anything is learned, when due, and at the end
    assert [line["step"] for line in lines_of(run_dir, "eval/reward")] == [0, 2, 3]
    measured = PPOConfig(evaluation=EvaluationConfig(functions={"style": "m:f"})).measured()
    assert {"step", *measured} == EVALUATION  # what early stopping may watch
    for line in lines_of(run_dir, "eval/reward"):
        assert set(line) == EVALUATION and all(math.isfinite(value) for value in line.values())


def test_the_counts_are_those_of_the_responses(run_dir: Path, experiences: list[Experience]) -> None:
    of_prompts = [sum(len(r.prompt) for r in experience.responses) for experience in experiences]
    of_responses = [experience.num_tokens for experience in experiences]
    assert series(run_dir, "num_trained_tokens") == np.cumsum(of_responses).tolist()
    assert series(run_dir, "num_tokens") == np.cumsum(np.add(of_prompts, of_responses)).tolist()
    assert series(run_dir, "num_responses") == [8, 16, 24]
    assert series(run_dir, "epoch") == [4 / 24, 8 / 24, 12 / 24]
    for line, experience in zip(lines_of(run_dir), experiences, strict=True):
        stopped = sum(response.stopped for response in experience.responses)
        assert line["val/num_eos_tokens"] == stopped
        assert line["response/truncated_share"] == 1 - stopped / 8
        assert line["response/length_mean"] == experience.num_tokens / 8
        assert line["objective/scores"] == pytest.approx(experience.rewards.mean())


def test_a_run_begins_at_its_reference_and_every_iteration_at_ratio_1(run_dir: Path) -> None:
    lines = lines_of(run_dir)
    assert abs(lines[0]["objective/kl"]) < LAST_BITS < 1e-3 < abs(lines[-1]["objective/kl"])
    assert abs(lines_of(run_dir, "eval/kl")[0]["eval/kl"]) < LAST_BITS
    for line in lines:
        assert line["val/first_ratio_error"] == 0.0 < line["val/ratio_off"]
        assert line["rollout/logprob_drift"] < LAST_BITS and line["rollout/logprob_drift_max"] < TOLERANCE
        assert line["objective/rlhf_reward"] == pytest.approx(
            line["objective/scores"] - 0.05 * line["objective/kl"]
        )


def test_what_the_first_pass_is_compared_with_comes_from_the_same_micro_batches(run_dir: Path) -> None:
    """Elsewhere the last bits may differ, in half precision more than those."""
    seen = watched(run_dir)
    assert len(seen["scored"]) == 3 and len(seen["learned"]) == 6
    for iteration, scored in enumerate(seen["scored"]):
        assert scored == seen["learned"][2 * iteration] + seen["learned"][2 * iteration + 1]
        assert sorted(sum(scored, ())) == list(range(8))
    assert any(sum(scored, ()) != tuple(range(8)) for scored in seen["scored"])  # in an order of its own


def test_a_prompts_samples_stand_together_and_their_terminator_is_the_last_token(
    artifacts: Artifacts, experiences: list[Experience]
) -> None:
    terminators = read_manifest(artifacts.policy).details["terminators"]
    prompts = [{response.prompt_id for response in experience.responses} for experience in experiences]
    assert len(set.union(*prompts)) == 12  # none twice in half an epoch
    for experience in experiences:
        assert experience.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        for response in experience.responses:
            assert not set(response.tokens[:-1]) & set(terminators)
            assert (response.tokens[-1] in terminators) is response.stopped
            assert response.stopped or len(response.tokens) == 8
        # sampled, and not the likeliest: greedily, two samples of a prompt would be one
        pairs = [experience.responses[first : first + 2] for first in range(0, 8, 2)]
        assert sum(not np.array_equal(one.tokens, other.tokens) for one, other in pairs) >= 3


def plain(cls: Any, folder: Path) -> Any:
    return cls.from_pretrained(folder).eval()


def ids_of(*parts: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]


def test_the_log_probabilities_are_plain_transformers_at_the_sampling_temperature(
    artifacts: Artifacts, experiences: list[Experience]
) -> None:
    from transformers import AutoModelForCausalLM

    model, expected = plain(AutoModelForCausalLM, artifacts.policy), []
    for response in experiences[0].responses:
        with torch.no_grad():
            logits = model(ids_of(response.prompt, response.tokens)).logits[0, len(response.prompt) - 1 : -1]
        of_all = torch.log_softmax(logits / TEMPERATURE, -1)
        expected.append(of_all[torch.arange(len(response.tokens)), torch.from_numpy(response.tokens).long()])
    assert experiences[0].old_logprobs == pytest.approx(torch.cat(expected).numpy(), abs=TOLERANCE)
    assert experiences[0].old_logprobs == pytest.approx(experiences[0].ref_logprobs, abs=LAST_BITS)


def scores_of(model: Any, *documents: tuple[np.ndarray, ...]) -> np.ndarray:
    """What the head says at the last token of each, whatever that token is."""
    with torch.no_grad():
        hidden = [model.model(ids_of(*parts)).last_hidden_state[0, -1] for parts in documents]
        return model.score(torch.stack(hidden))[:, 0].double().numpy()


def test_a_reward_is_the_calibrated_score_at_the_last_token_less_the_penalty_for_not_stopping(
    artifacts: Artifacts, experiences: list[Experience]
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = plain(AutoModelForSequenceClassification, artifacts.reward_model)
    calibration = read_manifest(artifacts.reward_model).details["calibration"]
    for experience in experiences:  # the reward model does not learn
        raw = scores_of(model, *((r.prompt, r.tokens) for r in experience.responses))
        assert experience.scores["reward_model"] == pytest.approx(raw, abs=TOLERANCE)
        penalties = np.array([0.0 if r.stopped else 1.0 for r in experience.responses])
        expected = np.clip((raw - calibration["mean"]) / calibration["std"], -10, 10) - penalties
        assert experience.rewards == pytest.approx(expected, abs=1e-4)
        # a token earlier it would be another
        early = scores_of(model, *((r.prompt, r.tokens[:-1]) for r in experience.responses))
        assert np.abs(early - raw).min() > 100 * TOLERANCE


def test_a_value_is_read_where_its_token_is_predicted_and_begins_as_the_calibrated_reward(
    artifacts: Artifacts, experiences: list[Experience]
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = plain(AutoModelForSequenceClassification, artifacts.reward_model)
    calibration = read_manifest(artifacts.reward_model).details["calibration"]
    seen = [(r.prompt, r.tokens[:t]) for r in experiences[0].responses for t in range(len(r.tokens))]
    expected = (scores_of(model, *seen) - calibration["mean"]) / calibration["std"]
    assert experiences[0].values == pytest.approx(expected, abs=1e-4)
    assert experiences[0].values.std() > 0.01


def test_advantages_and_returns_are_those_of_loops_over_padded_rows(experiences: list[Experience]) -> None:
    for experience in experiences:
        lengths = np.diff(experience.offsets).tolist()
        kl, mask = reference.pad(experience.old_logprobs - experience.ref_logprobs, lengths)
        values, _ = reference.pad(experience.values, lengths)
        advantages, returns = reference.compute_advantages(
            "gae", experience.rewards.tolist(), experience.groups.tolist(), kl, values, mask, 0.05, 1.0, 0.95
        )
        assert returns is not None
        assert experience.advantages == pytest.approx(reference.flatten(advantages, mask), abs=TOLERANCE)
        assert experience.returns == pytest.approx(reference.flatten(returns, mask), abs=TOLERANCE)
    moved = experiences[-1]  # where the KL has a part in it
    kl = moved.old_logprobs.astype(np.float64) - moved.ref_logprobs
    charged = token_rewards(moved.rewards, moved.offsets, kl=kl, coef=0.05)
    assert np.abs(charged - token_rewards(moved.rewards, moved.offsets)).max() > 100 * TOLERANCE


def test_samples_show_sampled_and_greedy_responses_to_the_same_held_out_prompts(run_dir: Path) -> None:
    samples = [json.loads(line) for line in (run_dir / "ppo" / "samples.jsonl").read_text().splitlines()]
    columns = ["step", "prompt", "completion", "stopped", "mode", "reward", "kl", "scores"]
    assert all(list(sample) == columns for sample in samples)
    assert [sample["step"] for sample in samples] == [0] * 6 + [2] * 6 + [3] * 6
    assert [sample["mode"] for sample in samples] == [*["sampled"] * 3, *["greedy"] * 3] * 3
    assert len({sample["prompt"] for sample in samples}) == 3
    assert all(sample["prompt"].startswith("What is ") for sample in samples)
    assert all((sample["kl"] is None) is (sample["mode"] == "greedy") for sample in samples)
    for line in lines_of(run_dir, "eval/reward"):
        for mode, prefix in (("sampled", "eval/"), ("greedy", "eval/greedy/")):
            rows = [x for x in samples if (x["step"], x["mode"]) == (line["step"], mode)]
            assert line[f"{prefix}reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
            assert line[f"{prefix}style"] == pytest.approx(np.mean([row["scores"]["style"] for row in rows]))
            assert line[f"{prefix}stop_rate"] == pytest.approx(np.mean([row["stopped"] for row in rows]))
            if mode == "sampled":
                assert line["eval/kl"] == pytest.approx(np.mean([row["kl"] for row in rows]))


def test_the_artifact_verifies_and_names_both_parents_by_hash(run_dir: Path, artifacts: Artifacts) -> None:
    manifest = verify(run_dir / "ppo" / "export")
    assert (manifest.kind, manifest.role) == ("artifact", Role.policy)
    assert manifest.details["parents"] == [
        {
            "role": role,
            "path": str(parent.resolve()),
            "manifest_sha256": file_sha256(parent / "manifest.json"),
        }
        for role, parent in (("policy", artifacts.policy), ("reward_model", artifacts.reward_model))
    ]
    metrics = manifest.details["metrics"]
    assert metrics["eval/reward"] == series(run_dir, "eval/reward")[-1]
    assert metrics["objective/scores"] == series(run_dir, "objective/scores")[-1]
    for name in ("tokenizer_hash", "chat_template_hash", "terminators", "pad_token_id", "eos_token_id"):
        assert manifest.details[name] == read_manifest(artifacts.policy).details[name]
    weights = "model.safetensors"
    assert manifest.files[weights] != read_manifest(artifacts.policy).files[weights]


def test_plain_transformers_gives_the_live_models_logits(run_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    live = watched(run_dir)
    model = plain(AutoModelForCausalLM, run_dir / "ppo" / "export")
    with torch.no_grad():
        logits = model(live["probe"]).logits[0]
    assert live["probe"].numel() > 10 and logits.abs().max() > 1e-3
    assert float((logits - live["logits"]).abs().max() / logits.abs().max()) <= 1e-6


def test_the_same_command_after_the_end_changes_no_bit(run_dir: Path) -> None:
    before = verify(run_dir / "ppo" / "export").files
    files = [run_dir / "ppo" / name for name in ("metrics.jsonl", "samples.jsonl")]
    texts = [file.read_text() for file in files]
    assert "step_00000006, after iteration 3\n" in finish(run_dir, 1, ppo)
    assert verify(run_dir / "ppo" / "export").files == before
    assert [file.read_text() for file in files] == texts
