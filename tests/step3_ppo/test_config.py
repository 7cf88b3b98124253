"""What PPO's settings refuse that no other file's tests do."""

from __future__ import annotations

import pytest

from common.config import DataConfig
from common.errors import UserError
from common.fields import as_schema
from common.limits import COLLECTIVE_SECONDS
from common.training_config import TrainConfig
from step3_ppo.config import (
    MEASURED,
    Estimator,
    EvaluationConfig,
    KLConfig,
    KLPlacement,
    PPOConfig,
    RewardSourceConfig,
    RolloutConfig,
)
from step3_ppo.rewards.config import longest_wait


@pytest.mark.parametrize("name", [*MEASURED, "gold_se", "greedy/gold"])
def test_a_function_of_the_evaluation_does_not_take_the_name_of_another_number(name: str) -> None:
    with pytest.raises(UserError) as caught:
        written = {"functions": {"gold": "demo.gold:gold", name: "demo.gold:gold"}}
        as_schema(EvaluationConfig, written, "ppo.evaluation.")
    assert f"ppo.evaluation.functions.{name}" in str(caught.value)
    assert "stop_rate" in str(caught.value)


def test_a_function_of_the_evaluation_has_any_other_name() -> None:
    functions = {"gold": "demo.gold:gold", "rewarded": "demo.gold:gold", "seen": "demo.gold:style"}
    assert as_schema(EvaluationConfig, {"functions": functions}).functions == functions


def test_no_demonstration_is_held_out_where_nothing_says_so() -> None:
    assert PPOConfig().ptx_data.held_out_fraction() == 0
    assert PPOConfig(ptx_data=DataConfig(path="a.jsonl")).ptx_data.held_out_fraction() == 0
    assert PPOConfig(ptx_data=DataConfig(path="a.jsonl", eval_fraction=0.1)).ptx_data.eval_fraction == 0.1
    assert PPOConfig().data.held_out_fraction() > 0


def test_demonstrations_are_not_evaluated_on_rows_of_their_own() -> None:
    with pytest.raises(UserError, match="ppo.ptx_data.eval_path=b.jsonl has no effect"):
        as_schema(PPOConfig, {"ptx_data": {"path": "a.jsonl", "eval_path": "b.jsonl"}}, "ppo.")


@pytest.mark.parametrize("every", [0, 2])
def test_an_entropy_bonus_is_computed_in_every_update(every: int) -> None:
    written = {"entropy_coef": 0.01, "train": {"entropy_every": every}}
    with pytest.raises(UserError) as caught:
        as_schema(PPOConfig, written, "ppo.")
    assert f"ppo.train.entropy_every={every} saves nothing with ppo.entropy_coef=0.01" in str(caught.value)
    assert "ppo.train.entropy_every=1, or ppo.entropy_coef=0" in str(caught.value)
    assert as_schema(PPOConfig, {**written, "entropy_coef": 0}, "ppo.").train.entropy_every == every
    assert as_schema(PPOConfig, {"entropy_coef": 0.01}, "ppo.").train.entropy_every == 1


@pytest.mark.parametrize(("retries", "pauses"), [(0, 0), (1, 1), (4, 15), (6, 63), (8, 183)])
def test_the_longest_wait_is_that_of_a_server_that_asks_for_time_and_then_hangs(
    retries: int, pauses: float
) -> None:
    assert longest_wait(10.0, retries) == 10 * (retries + 1) + 10 * retries + pauses


def test_a_server_that_several_ranks_would_not_wait_for_is_refused() -> None:
    server = RewardSourceConfig(url="https://h/x", timeout=100.0, retries=8)  # 1,700 s and 183 s of pauses
    assert longest_wait(100.0, 7) < COLLECTIVE_SECONDS < longest_wait(100.0, 8)
    PPOConfig(rewards=[server]).check_patience(1)
    with pytest.raises(UserError, match="timeout: 100, retries: 8.* may wait 1,883 s"):
        PPOConfig(rewards=[server]).check_patience(2)
    one = RewardSourceConfig(url="https://h/x", timeout=100.0, retries=5, name="one")
    PPOConfig(rewards=[one]).check_patience(2)
    with pytest.raises(UserError):  # one after the other
        PPOConfig(rewards=[one, one]).check_patience(2)


def test_sampling_from_a_part_of_the_tokens_is_worth_a_line() -> None:
    assert RolloutConfig().notes() == []
    for config in (RolloutConfig(top_p=0.9), RolloutConfig(top_k=40)):
        (line,) = config.notes()
        assert f"top_p={config.top_p}, top_k={config.top_k}" in line and "over all of them" in line


@pytest.mark.parametrize("estimator", list(Estimator))
def test_the_kl_is_in_grpos_loss_and_in_the_others_reward(estimator: Estimator) -> None:
    where = KLPlacement.loss if estimator is Estimator.grpo else KLPlacement.reward
    rollout = RolloutConfig(samples_per_prompt=2)
    assert PPOConfig(estimator=estimator, rollout=rollout).kl.placement is where
    for placement in (KLPlacement.loss, KLPlacement.reward):
        kl = KLConfig(placement=placement)
        assert PPOConfig(estimator=estimator, rollout=rollout, kl=kl).kl.placement is placement


def test_an_update_that_is_short_of_responses_is_worth_a_line() -> None:
    rollout = RolloutConfig(prompts=10, samples_per_prompt=4)
    assert PPOConfig(rollout=rollout, train=TrainConfig(global_batch_size=20)).notes() == []
    (line,) = PPOConfig(rollout=rollout, train=TrainConfig(global_batch_size=16)).notes()
    assert "has 8 responses" in line and "16 does not divide an iteration's 40" in line
