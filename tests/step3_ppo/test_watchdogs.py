"""Watchdogs: silent on a healthy run, each one awake for its own trouble, alike after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from common.config import Dtype
from common.errors import UserError
from step3_ppo.config import (
    EvaluationConfig,
    KLConfig,
    KLController,
    PPOConfig,
)
from step3_ppo.watchdogs import REPEAT_AFTER, Watchdogs

SETTINGS = PPOConfig(
    evaluation=EvaluationConfig(functions={"gold": "demo.gold:gold", "style": "demo.gold:style"})
)

HEALTHY = {
    "val/first_ratio_error": 1e-7,
    "objective/kl": 0.0,
    "objective/scores": 0.1,
    "objective/rlhf_reward": 0.1,
    "objective/advantages_abs_mean": 0.8,
    "objective/scores_std": 0.5,
    "reward/gold": 0.1,
    "rollout/logprob_drift": 1e-6,
    "response/length_mean": 20.0,
    "response/truncated_share": 0.1,
    "policy/entropy_avg": 2.0,
}


def watchdogs(state: dict[str, Any] | None = None) -> Watchdogs:
    return Watchdogs(SETTINGS, Dtype.fp32, state)


def begun() -> Watchdogs:
    """Watchdogs that have seen the first three iterations of a healthy run."""
    dogs = watchdogs()
    assert [dogs.look(iteration, HEALTHY) for iteration in range(3)] == [[], [], []]
    return dogs


def healthy_run(iterations: int) -> Iterator[dict[str, float]]:
    """KL and reward rise, entropy and length move a little: what PPO is for."""
    for k in range(iterations):
        yield HEALTHY | {
            "objective/kl": 0.3 * k,
            "objective/scores": 0.1 + 0.01 * k,
            "policy/entropy_avg": 2.0 - 0.01 * k,
            "response/length_mean": 20.0 + 0.15 * k,
        }


def test_a_healthy_run_is_not_warned_about() -> None:
    dogs = watchdogs()
    assert [dogs.look(k, metrics) for k, metrics in enumerate(healthy_run(100))] == [[]] * 100


def test_metrics_that_are_absent_are_not_looked_at() -> None:
    dogs = watchdogs()
    assert [dogs.look(iteration, {"loss/policy_avg": 1.0}) for iteration in range(5)] == [[]] * 5
    assert dogs.look_at_evaluation(0, {}) == dogs.look_at_evaluation(1, {"eval/reward": 1.0}) == []


@pytest.mark.parametrize(
    ("name", "value", "said", "key"),
    [
        ("val/first_ratio_error", 2e-4, "0.0002 away from ratio 1", "model.dtype=fp32"),
        ("val/first_ratio_error", 2e-4, "did not learn from the policy that was", "model.lora.dropout"),
        ("rollout/logprob_drift", 0.01, "differ by 0.01 nats per token", "model.dtype=fp32"),
        ("objective/advantages_abs_mean", 0.0, "of each prompt are alike", "ppo.rollout.samples_per_prompt"),
        ("objective/scores_std", 1e-16, "all rewards are alike", "ppo.rewards"),
        ("response/truncated_share", 0.51, "51% of the responses do not stop", "ppo.rollout.max_new_tokens"),
        ("response/truncated_share", 0.4, "do not stop, 10% at first", "ppo.missing_eos_penalty"),
        ("response/length_mean", 41.0, "41.0 tokens on average, 20.0 at first", "ppo.kl.coef"),
        ("response/length_mean", 9.0, "9.0 tokens on average, 20.0 at first", "ppo.kl.coef"),
        ("policy/entropy_avg", 0.19, "0.19 nats per token, 2 at first", "ppo.entropy_coef"),
        ("objective/kl", 51.0, "51.0 nats per response", "ppo.kl.coef"),
    ],
)
def test_each_trouble_is_said_with_its_number_and_a_key(name: str, value: float, said: str, key: str) -> None:
    (warning,) = begun().look(7, HEALTHY | {name: value})
    assert warning.startswith("iteration 7: ") and said in warning and key in warning


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("val/first_ratio_error", 1e-4), ("rollout/logprob_drift", 1e-4), ("response/truncated_share", 0.35),
        ("response/length_mean", 40.0), ("response/length_mean", 10.0), ("policy/entropy_avg", 0.2),
        ("objective/kl", 50.0), ("objective/advantages_abs_mean", 1e-9),
    ],
)  # fmt: skip
def test_what_is_just_within_the_limits_is_not_said(name: str, value: float) -> None:
    assert begun().look(7, HEALTHY | {name: value}) == []


def test_a_kl_before_anything_was_learned_is_said_once_and_only_then() -> None:
    apart = HEALTHY | {"objective/kl": -0.01}  # 20 tokens: 5e-4 each
    (warning,) = watchdogs().look(0, apart)
    assert "before anything was learned the actor is -0.01 nats" in warning
    assert watchdogs().look(0, HEALTHY | {"objective/kl": 0.002}) == []
    assert begun().look(3, apart) == []


def test_the_first_iterations_are_compared_with_nothing() -> None:
    dogs = watchdogs()
    for iteration, length in enumerate((5.0, 50.0, 5.0)):
        assert dogs.look(iteration, HEALTHY | {"response/length_mean": length}) == []
    assert dogs.look(3, HEALTHY | {"response/length_mean": 20.0}) == []  # their mean
    assert len(dogs.look(4, HEALTHY | {"response/length_mean": 45.0})) == 1


@pytest.mark.parametrize("first", [0, 1, 4])  # iterations without: the actor waits for its critic
@pytest.mark.parametrize("every", [1, 5])
def test_an_entropy_that_is_seldom_measured_is_compared_with_its_own_first_values(
    first: int, every: int
) -> None:
    def seen(iteration: int, entropy: float) -> dict[str, float]:
        left_out = iteration < first or (iteration - first) % every
        return {
            name: value
            for name, value in (HEALTHY | {"policy/entropy_avg": entropy}).items()
            if not (left_out and name == "policy/entropy_avg")
        }

    dogs, last = watchdogs(), first + 3 * every
    for iteration in range(last):
        # of one of the three this is less than a tenth of their mean
        entropy = 0.1 if iteration == first else 2.95
        assert dogs.look(iteration, seen(iteration, entropy)) == []
        dogs = watchdogs(json.loads(json.dumps(dogs.state())))
    assert dogs.look(last, seen(last, 0.21)) == []
    (warning,) = dogs.look(last + every, seen(last + every, 0.19))
    assert "0.19 nats per token, 2 at first" in warning


def test_a_checkpoint_of_an_earlier_version_goes_on_with_its_first_iterations() -> None:
    state = begun().state()
    del state["counted"]
    (warning,) = watchdogs(state).look(7, HEALTHY | {"response/length_mean": 41.0})
    assert "20.0 at first" in warning


def test_a_warning_is_repeated_only_after_a_while_and_hides_no_other() -> None:
    dogs = begun()
    long = HEALTHY | {"response/length_mean": 100.0}
    warned = [iteration for iteration in range(3, 60) if dogs.look(iteration, long)]
    assert warned == [3, 3 + REPEAT_AFTER, 3 + 2 * REPEAT_AFTER]
    (warning,) = dogs.look(60, long | {"objective/kl": 1000.0})
    assert "nats per response" in warning


@pytest.mark.parametrize("name", ["objective/scores", "objective/rlhf_reward", "objective/kl", "reward/gold"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_ends_the_run(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"iteration 4: {name} is "):
        begun().look(4, HEALTHY | {name: value})


def test_a_number_elsewhere_that_is_not_finite_does_not_end_the_run() -> None:
    assert begun().look(4, HEALTHY | {"val/explained_variance": math.nan}) == []


def evaluation(reward: float, gold: float, style: float = 0.5, prefix: str = "eval/") -> dict[str, float]:
    values = {"reward": reward, "gold": gold, "style": style}
    return {f"{prefix}{name}": value for name, value in values.items()} | {
        f"{prefix}{name}_se": 0.03 for name in values
    }


def test_a_reward_that_rises_while_a_score_only_looked_at_falls_is_called_hacking() -> None:
    dogs = watchdogs()
    assert dogs.look_at_evaluation(0, evaluation(0.1, 0.5)) == []
    for iteration in (10, 20):  # however soon after the last time
        (warning,) = dogs.look_at_evaluation(iteration, evaluation(0.9, 0.3))
        assert warning.startswith(f"evaluation at iteration {iteration}: reward hacking: ")
        assert "the reward rose from 0.1 to 0.9 while gold fell from 0.5 to 0.3" in warning
    (warning,) = dogs.look_at_evaluation(30, evaluation(0.9, 0.3, style=0.1))
    assert "gold fell from 0.5 to 0.3, style fell from 0.5 to 0.1: " in warning


@pytest.mark.parametrize(
    ("reward", "gold"),
    [(0.9, 0.6), (0.9, 0.5), (0.0, 0.3), (0.1, 0.3), (0.9, 0.42), (0.18, 0.3)],
    ids=["both rise", "gold stays", "both fall", "reward stays", "gold within noise", "reward within noise"],
)
def test_nothing_is_called_hacking_unless_both_move_beyond_noise(reward: float, gold: float) -> None:
    dogs = watchdogs()
    dogs.look_at_evaluation(0, evaluation(0.1, 0.5))
    assert dogs.look_at_evaluation(10, evaluation(reward, gold)) == []


def test_hacking_that_shows_only_in_greedy_responses_is_said_too() -> None:
    dogs = watchdogs()
    sampled = evaluation(0.1, 0.5)
    dogs.look_at_evaluation(0, sampled | evaluation(0.1, 0.5, prefix="eval/greedy/"))
    (warning,) = dogs.look_at_evaluation(9, sampled | evaluation(0.9, 0.3, prefix="eval/greedy/"))
    assert "gold fell from 0.5 to 0.3 (greedy)" in warning


def test_a_resumed_run_warns_like_one_that_was_not_interrupted() -> None:
    troubled = [*healthy_run(5), *[HEALTHY | {"response/length_mean": 90.0, "objective/kl": 60.0}] * 40]
    evaluations = [evaluation(0.1, 0.5), evaluation(0.9, 0.2)]

    def run(resume_at: int) -> list[list[str]]:
        dogs, said = watchdogs(), []
        for k, metrics in enumerate(troubled):
            if k == resume_at:
                dogs = watchdogs(json.loads(json.dumps(dogs.state())))
            said.append(dogs.look(k, metrics))
            if k % 30 == 0:
                said.append(dogs.look_at_evaluation(k, evaluations[k // 30]))
        return said

    expected = run(resume_at=-1)
    assert sum(map(len, expected)) == 5  # twice the length, twice the KL, hacking once
    for k in range(len(troubled)):
        assert run(resume_at=k) == expected


def test_the_state_is_a_copy() -> None:
    dogs = begun()
    state = dogs.state()
    state["first"].clear()
    assert dogs.state()["first"]
    watchdogs(state).look(9, HEALTHY | {"objective/kl": 60.0})
    assert state["said"] == {}


def test_limits_follow_from_the_settings() -> None:
    adaptive = PPOConfig(kl=KLConfig(controller=KLController.adaptive, target=3.0))
    far, coarse = {"objective/kl": 13.0}, HEALTHY | {"rollout/logprob_drift": 0.01}
    for settings, warnings in ((adaptive, 1), (SETTINGS, 0)):
        dogs = Watchdogs(settings, Dtype.fp32, begun().state())
        assert len(dogs.look(5, far)) == warnings
    for dtype, warnings in ((Dtype.fp32, 1), (Dtype.bf16, 0)):
        assert len(Watchdogs(SETTINGS, dtype).look(0, coarse)) == warnings
