"""Every way to do PPO, each by what it changes and nothing else does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.artifacts import read_manifest
from common.config import Dtype, LoraConfig, SourceConfig
from step3_ppo.config import (
    CriticStart,
    Estimator,
    KLController,
    KLPlacement,
    PPOConfig,
    PPOJob,
    RewardSourceConfig,
)
from step3_ppo.dry_run import forecast
from tests.runs import Base
from tests.step2_dpo.runs import write_rows
from tests.step3_ppo import reference
from tests.step3_ppo.runs import (
    Artifacts,
    lines_of,
    make_artifacts,
    make_job,
    questions,
    run_job,
    series,
    watched,
    weights_of,
    without_reward_model,
)

pytestmark = pytest.mark.slow  # a whole run of each

SHARED = "tests.step3_ppo.runs:shared"
Change = Callable[[PPOJob], object]


@pytest.fixture
def run(folder: Path, artifacts: Artifacts, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Run a changed job to its end; returns its folder."""

    def to_the_end(change: Change, name: str = "", ranks: int = 1, **train: Any) -> Path:
        job = make_job(folder, artifacts, **{"max_steps": 2, **train})
        job.ppo.evaluation.num_prompts = 0
        change(job)
        run_dir = folder / "runs" / f"{request.node.name} {name}".strip()
        run_job(job, run_dir, ranks)
        return run_dir

    return to_the_end


@pytest.fixture(scope="module")
def usual(folder: Path, artifacts: Artifacts) -> Path:
    """The run without any change."""
    job = make_job(folder, artifacts, max_steps=2)
    job.ppo.evaluation.num_prompts = 0
    run_job(job, folder / "runs" / "usual")
    return folder / "runs" / "usual"


def settings(**fields: Any) -> Change:
    """Set fields of `ppo`, given as kl__coef for ppo.kl.coef."""

    def change(job: PPOJob) -> None:
        for name, value in fields.items():
            place: Any = job.ppo
            *way, last = name.split("__")
            for part in way:
                place = getattr(place, part)
            setattr(place, last, value)

    return change


def last_weights(run_dir: Path, part: str = "actor") -> torch.Tensor:
    _, _, actor, critic = watched(run_dir)["updates"][-1]
    return torch.cat([weights.flatten() for weights in (actor if part == "actor" else critic)])


def assert_same_weights(one: Path, other: Path) -> None:
    for part in ("actor", "critic"):
        assert torch.equal(last_weights(one, part), last_weights(other, part))


def schedule(applied: int, updates: int) -> float:
    """The share of the peak that PPO's default (cosine to a tenth, here without warm-up) has then."""
    return 0.1 + 0.9 * (1 + math.cos(math.pi * applied / updates)) / 2


def counters_of(run_dir: Path) -> dict[str, Any]:
    newest = max((run_dir / "ppo" / "checkpoints").glob("step_*"))
    counters: dict[str, Any] = json.loads((newest / "counters.json").read_text())
    return counters


def expected_advantages(experience: Any, estimator: str, coef: float, gamma: float = 1.0) -> np.ndarray:
    lengths = np.diff(experience.offsets).tolist()
    kl, mask = reference.pad(experience.old_logprobs - experience.ref_logprobs, lengths)
    values = [[0.0] * len(row) for row in kl]
    if experience.values is not None:
        values, _ = reference.pad(experience.values, lengths)
    found, _ = reference.compute_advantages(
        estimator,
        experience.rewards.tolist(),
        experience.groups.tolist(),
        kl,
        values,
        mask,
        coef,
        gamma,
        0.95,
    )
    return np.array(reference.flatten(found, mask))


@pytest.mark.parametrize("estimator", [Estimator.grpo, Estimator.rloo, Estimator.reinforce_pp])
def test_an_estimator_without_a_critic_needs_no_reward_model_either(run: Any, estimator: Estimator) -> None:
    def change(job: PPOJob) -> None:
        without_reward_model(job, estimator)
        job.ppo.gamma = 0.9
        job.ppo.evaluation.num_prompts = 3

    run_dir = run(change)
    for number, experience in enumerate(watched(run_dir)["experiences"]):
        assert (
            experience.values is None and experience.returns is None and list(experience.scores) == ["shared"]
        )
        found = experience.advantages
        in_reward = 0.0 if estimator is Estimator.grpo else 0.05
        expected = expected_advantages(experience, estimator.value, in_reward, gamma=0.9)
        assert found == pytest.approx(expected, abs=1e-5) and found.std() > 0.1
        penalties = np.array([0.0 if response.stopped else 1.0 for response in experience.responses])
        assert experience.rewards == pytest.approx(experience.scores["shared"] - penalties)
        line = lines_of(run_dir)[number]
        assert not {"loss/value_avg", "critic/grad_norm", "val/explained_variance"} & set(line)
        assert line["reward/shared"] == pytest.approx(experience.scores["shared"].mean())
    assert [parent["role"] for parent in read_manifest(run_dir / "ppo" / "export").details["parents"]] == [
        "policy"
    ]
    assert not list((run_dir / "ppo" / "checkpoints").glob("*/critic"))
    assert [line["step"] for line in lines_of(run_dir, "eval/kl")] == [0, 2]


@pytest.mark.parametrize(
    ("estimator", "placement", "coef", "largest"),
    [
        (Estimator.grpo, KLPlacement.auto, 0.05, 0.05),  # k3 pulls; rewards in their own units pull with 2
        (Estimator.grpo, KLPlacement.auto, 1e-9, 1e-6),
        (Estimator.grpo, KLPlacement.reward, 0.05, 0.0),
        (Estimator.reinforce_pp, KLPlacement.reward, 0.05, 0.0),
        (Estimator.rloo, KLPlacement.reward, 0.05, 0.05),
    ],
)
def test_when_every_response_earns_the_same_nothing_but_the_kl_is_learned_from(
    run: Any, estimator: Estimator, placement: KLPlacement, coef: float, largest: float
) -> None:
    def change(job: PPOJob) -> None:
        without_reward_model(job, estimator, "solved_after_one")
        job.ppo.missing_eos_penalty = 0.0
        kl = replace(job.ppo.kl, placement=placement, coef=coef)
        job.ppo = replace(job.ppo, kl=kl)

    run_dir = run(change, max_steps=3)
    assert np.diff(series(run_dir, "objective/kl")).any()  # the actor has left the reference
    first, *solved = series(run_dir, "grad_norm")
    assert first > 0.1 and max(solved) <= largest


@pytest.mark.parametrize(
    ("rows", "epochs", "iterations"), [(3, 1.0, 1), (4, 1.0, 1), (5, 1.0, 2), (6, 2.0, 3)]
)
def test_the_plan_counts_the_iterations_that_are_run_and_each_has_all_its_responses(
    run: Any, folder: Path, rows: int, epochs: float, iterations: int
) -> None:
    def change(job: PPOJob) -> None:
        path = write_rows(folder / f"{rows} questions.jsonl", questions(rows))
        job.ppo.data.sources, job.ppo.data.eval_fraction = [SourceConfig(path=str(path))], 0.0

    run_dir = run(change, max_steps=None, epochs=epochs)
    assert forecast(run_dir / "resolved.yaml").total_steps == iterations
    lines = lines_of(run_dir)
    assert [line["num_responses"] for line in lines] == [8 * (n + 1) for n in range(iterations)]
    assert len(watched(run_dir)["updates"]) == 2 * iterations
    assert lines[-1]["epoch"] == iterations * 4 / rows


def test_a_weighted_sum_of_the_model_and_a_function_with_each_logged_apart(
    run: Any, artifacts: Artifacts
) -> None:
    sources = [RewardSourceConfig(model=True, weight=0.5), RewardSourceConfig(function=SHARED, weight=-2.0)]
    run_dir = run(settings(rewards=sources, missing_eos_penalty=0.25, reward_clip=0.3))
    calibration = read_manifest(artifacts.reward_model).details["calibration"]
    for line, experience in zip(lines_of(run_dir), watched(run_dir)["experiences"], strict=True):
        raw = (experience.scores["reward_model"] - calibration["mean"]) / calibration["std"]
        penalties = [0.0 if response.stopped else 0.25 for response in experience.responses]
        expected = 0.5 * np.clip(raw, -0.3, 0.3) - 2 * experience.scores["shared"] - penalties
        assert (np.abs(raw) > 0.3).any() and experience.rewards == pytest.approx(expected)
        for name in ("reward_model", "shared"):
            assert line[f"reward/{name}"] == pytest.approx(experience.scores[name].mean())


def test_a_kl_in_the_loss_is_not_taken_from_the_reward(run: Any) -> None:
    kept, free = (
        run(settings(kl__placement=KLPlacement.loss, kl__coef=coef), f"coef {coef}", max_steps=6)
        for coef in (1e-9, 1e3)
    )
    for run_dir in (kept, free):
        assert series(run_dir, "objective/non_score_reward") == [0.0] * 6
        assert series(run_dir, "policy/ref_kl_avg")[-1] > 0
        for experience in watched(run_dir)["experiences"]:
            expected = expected_advantages(experience, "gae", 0.0)
            assert experience.advantages == pytest.approx(expected, abs=1e-5)
    held, loose = (series(run_dir, "policy/ref_kl_avg")[-1] for run_dir in (free, kept))
    assert held < loose / 2  # it is pulled back
    assert series(free, "loss/policy_avg")[0] == pytest.approx(series(kept, "loss/policy_avg")[0], abs=1e-2)


def test_an_adaptive_coefficient_moves_with_the_measured_kl(run: Any) -> None:
    fields = {"kl__controller": KLController.adaptive, "kl__target": 0.05, "kl__horizon": 40.0}
    run_dir = run(settings(**fields), max_steps=4)
    coefs, measured = series(run_dir, "kl_coef"), series(run_dir, "objective/kl")
    assert coefs[0] == 0.05 and len(set(coefs)) == 4
    for before, kl, after in zip(coefs, measured, coefs[1:], strict=False):
        assert after == pytest.approx(before * (1 + min(max(kl / 0.05 - 1, -0.2), 0.2) * 8 / 40), rel=1e-12)
    # and it is what the next iteration's rewards pay
    for line, experience, coef in zip(lines_of(run_dir), watched(run_dir)["experiences"], coefs, strict=True):
        assert line["objective/non_score_reward"] == pytest.approx(-coef * line["objective/kl"])
        expected = expected_advantages(experience, "gae", coef)
        assert experience.advantages == pytest.approx(expected, abs=1e-5)


def test_without_a_coefficient_there_is_no_reference(run: Any) -> None:
    run_dir = run(settings(kl__coef=0.0, evaluation__num_prompts=2))
    assert all(experience.ref_logprobs is None for experience in watched(run_dir)["experiences"])
    assert lines_of(run_dir, "objective/kl") == lines_of(run_dir, "eval/kl") == []
    samples = (run_dir / "ppo" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 8 and all(json.loads(sample)["kl"] is None for sample in samples)


def test_while_the_critic_warms_up_the_actor_keeps_every_bit(run: Any, artifacts: Artifacts) -> None:
    run_dir = run(settings(critic__warmup_iterations=2), max_steps=3, save_every=1, keep_checkpoints=3)
    from safetensors.torch import load_file

    policy = load_file(artifacts.policy / "model.safetensors")
    for update, is_still in ((2, True), (4, True), (6, False)):
        weights = weights_of(run_dir, update)
        same = [torch.equal(weights[f"model.{name}"], policy[name]) for name in policy]
        assert all(same) if is_still else not any(same)
    critics = [torch.cat(critic) for *_, critic in watched(run_dir)["updates"]]
    assert all(not torch.equal(one, other) for one, other in zip(critics, critics[1:], strict=False))
    tokens = [tuple(r.tokens) for e in watched(run_dir)["experiences"][:2] for r in e.responses]
    assert len(set(tokens)) > 8  # an iteration draws anew all the same
    lines = lines_of(run_dir)
    assert ["loss/policy_avg" in line for line in lines] == ["grad_norm" in line for line in lines]
    assert ["loss/policy_avg" in line for line in lines] == [False, False, True]
    assert ["learning_rate" in line for line in lines] == [False, False, True]
    # of the last of the six updates of the critic and of the two of the actor, on the cosine
    assert lines[2]["critic/learning_rate"] == pytest.approx(5e-4 * schedule(5, 6))
    assert lines[2]["learning_rate"] == pytest.approx(5e-4 * schedule(1, 2))
    assert ["val/first_ratio_error" in line for line in lines] == [False, False, True]
    assert lines[2]["val/first_ratio_error"] == 0.0
    counters = counters_of(run_dir)
    assert (counters["applied"], counters["critic_applied"], counters["skipped"]) == (2, 6, 0)


def test_a_critic_from_the_policy_begins_with_values_of_0(run: Any, usual: Path) -> None:
    run_dir = run(settings(critic__start=CriticStart.policy))
    first, second = watched(run_dir)["experiences"]
    assert not first.values.any() and second.values.any()
    assert watched(usual)["experiences"][0].values.any()


def test_demonstrations_are_mixed_into_the_update(run: Any, usual: Path, folder: Path) -> None:
    rows = [{"prompt": f"Say {number}.", "completion": f"{number} {number}"} for number in range(12)]
    sources = [SourceConfig(path=str(write_rows(folder / "demonstrations.jsonl", rows)))]

    def change(job: PPOJob) -> None:
        job.ppo.ptx_weight, job.ppo.ptx_batch_size = 1.0, 3
        job.ppo.ptx_data.sources, job.ppo.ptx_data.eval_fraction = sources, 0.0
        job.ppo.ptx_data.max_length, job.ppo.ptx_data.cache_dir = 64, job.ppo.data.cache_dir

    run_dir = run(change)
    losses = series(run_dir, "loss/ptx_avg")
    assert losses[0] == pytest.approx(math.log(300), rel=0.2) and losses[1] < losses[0]
    assert lines_of(usual, "loss/ptx_avg") == []
    assert series(run_dir, "grad_norm")[0] > 1.2 * series(usual, "grad_norm")[0]
    assert (run_dir / "ppo" / "ptx" / "ledger.json").exists()
    # the artifact names the rows that it learned from by hash
    data = [read_manifest(folder / "ppo" / "export").details["data"] for folder in (run_dir, usual)]
    assert set(data[0]) - set(data[1]) == {"ptx", "ptx_rows_sha256"} and len(set(data[0].values())) == 5


def test_what_is_exported_is_the_average_where_there_is_one(run: Any, artifacts: Artifacts) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    # one update in an iteration, so that each has a checkpoint
    change = settings(ema_decay=0.6, evaluation__num_prompts=3)
    run_dir = run(change, max_steps=3, global_batch_size=8, save_every=1, keep_checkpoints=3)
    average = load_file(artifacts.policy / "model.safetensors")
    for update in (1, 2, 3):
        weights = weights_of(run_dir, update)
        average = {name: 0.6 * old + 0.4 * weights[f"model.{name}"] for name, old in average.items()}
    exported = load_file(run_dir / "ppo" / "export" / "model.safetensors")
    for name, expected in average.items():
        assert torch.allclose(exported[name], expected, atol=1e-6, rtol=0)
        assert not torch.allclose(exported[name], weights[f"model.{name}"], atol=1e-5, rtol=0)
    live = watched(run_dir)
    model = AutoModelForCausalLM.from_pretrained(run_dir / "ppo" / "export").eval()
    with torch.no_grad():
        assert torch.allclose(model(live["probe"]).logits[0], live["logits"], atol=1e-5)
    # and it is what is evaluated: the trained weights are further away
    kl = abs(series(run_dir, "eval/kl")[-1])
    assert kl > 0 and kl != pytest.approx(abs(series(run_dir, "objective/kl")[-1]), rel=1e-3)


def test_an_entropy_bonus_raises_the_entropy(run: Any, usual: Path) -> None:
    run_dir = run(settings(entropy_coef=10.0))
    assert series(run_dir, "policy/entropy_avg")[-1] > series(usual, "policy/entropy_avg")[-1] + 0.01


def test_an_iteration_ends_early_where_the_actor_has_moved_far_enough(run: Any) -> None:
    run_dir = run(settings(ppo_epochs=3, target_kl=1e-12), max_steps=2)
    # the first update finds ratio 1, the second that it has moved: it is the last one of its iteration
    assert [(step, update) for step, update, *_ in watched(run_dir)["updates"]] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert counters_of(run_dir)["applied"] == 4
    assert [line["step"] for line in lines_of(run_dir)] == [1, 2]
    (kept,) = (run_dir / "ppo" / "checkpoints").glob("step_*")
    assert kept.name == "step_00000012"


def test_every_pass_over_the_responses_has_its_own_order_and_all_of_them(run: Any, usual: Path) -> None:
    run_dir = run(settings(ppo_epochs=2))
    assert [update for step, update, *_ in watched(run_dir)["updates"]] == [0, 1, 2, 3] * 2
    assert lines_of(run_dir)[0]["val/first_ratio_error"] == 0.0 < lines_of(run_dir)[0]["val/ratio_off"]
    assert lines_of(run_dir)[0]["val/ratio_off"] > lines_of(usual)[0]["val/ratio_off"]
    # the first pass is the same one
    for one, other in zip(watched(run_dir)["updates"][:2], watched(usual)["updates"][:2], strict=True):
        assert one[:2] == other[:2]
    first = [watched(folder)["experiences"][0] for folder in (run_dir, usual)]
    assert all(
        np.array_equal(a.tokens, b.tokens)
        for a, b in zip(first[0].responses, first[1].responses, strict=True)
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adapters_of_actor_and_critic_begin_at_the_reference_that_lies_under_them(
    run: Any, stage: int
) -> None:
    def change(job: PPOJob) -> None:
        job.model.lora, job.deepspeed.stage = LoraConfig(enabled=True, r=4, dropout=0.1), stage
        job.ppo.optim.lr = job.ppo.critic.optim.lr = 1e-2
        job.ppo.evaluation.num_prompts = 2

    run_dir = run(change, max_steps=3)
    first, *_, last = lines_of(run_dir)
    assert first["objective/kl"] == 0.0 and abs(last["objective/kl"]) > 1e-4
    # the adapters' dropout is on in an update and off wherever something is measured
    assert series(run_dir, "eval/kl")[0] == 0.0
    assert all(line["rollout/logprob_drift_max"] < 1e-5 for line in lines_of(run_dir))
    critics = [torch.cat(critic) for *_, critic in watched(run_dir)["updates"]]
    assert all(not torch.equal(one, other) for one, other in zip(critics, critics[1:], strict=False))
    assert (run_dir / "ppo" / "export" / "adapter" / "adapter_config.json").exists()


def test_bf16_begins_at_its_reference_and_every_iteration_at_ratio_1_whatever_stands_beside_a_response(
    base: Base, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    # large enough that in bf16 a response's last bits depend on those beside it, with most CPUs' kernels
    wide = make_artifacts(tmp_path, base.tokenizer, hidden_size=512, intermediate_size=1536)
    job = make_job(tmp_path, wide, max_steps=2, micro_batch_size=4)
    job.model.dtype, job.ppo.data.packing, job.ppo.evaluation.num_prompts = Dtype.bf16, False, 2
    job.ppo.optim.lr = job.ppo.critic.optim.lr = 1e-5
    run_dir = tmp_path / "runs" / "bf16"
    run_job(job, run_dir)
    for line in lines_of(run_dir):
        assert line["val/first_ratio_error"] == 0.0 < line["val/ratio_off"]
        assert line["rollout/logprob_drift"] < 2e-2 and line["objective/entropy"] > 1
    assert abs(lines_of(run_dir)[0]["objective/kl"]) < 1e-6
    weights = load_file(run_dir / "ppo" / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_offloading_the_frozen_ones_changes_no_bit(run: Any, usual: Path) -> None:
    run_dir = run(settings(offload_frozen=True))
    assert_same_weights(run_dir, usual)
    assert series(run_dir, "objective/scores") == series(usual, "objective/scores")


def test_parameters_that_are_gathered_layer_by_layer_sample_the_same(run: Any) -> None:
    runs = []
    for gathers in (True, False):

        def change(job: PPOJob, gathers: bool = gathers) -> None:
            job.deepspeed.stage, job.ppo.rollout.gather_parameters = 3, gathers

        runs.append(run(change, f"gathers {gathers}", ranks=2))
    assert_same_weights(*runs)
    assert series(runs[0], "objective/scores") == series(runs[1], "objective/scores")


def test_defaults_are_those_of_the_specification(run: Any) -> None:
    rates: dict[str, list[float]] = {"learning_rate": [], "critic/learning_rate": []}
    for adapters in (False, True):

        def change(job: PPOJob, adapters: bool = adapters) -> None:
            job.model.lora.enabled, job.ppo.optim.lr, job.ppo.critic.optim.lr = adapters, None, None

        run_dir = run(change, f"adapters {adapters}", max_steps=1, global_batch_size=8)
        for name, found in rates.items():
            found += series(run_dir, name)
    # of the only update, which is the first one: the peak
    assert rates["learning_rate"] == [pytest.approx(1e-6), pytest.approx(1e-5)]
    assert rates["critic/learning_rate"] == [pytest.approx(9e-6), pytest.approx(9e-5)]
    ppo = PPOConfig()
    assert (ppo.kl.coef, ppo.lam, ppo.gamma, ppo.clip, ppo.ppo_epochs) == (0.05, 0.95, 1.0, 0.2, 1)
    assert (ppo.missing_eos_penalty, ppo.reward_clip, ppo.rollout.temperature) == (1.0, 10.0, 1.0)
