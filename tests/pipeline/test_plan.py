"""Steps are ordered and wired by what they consume and produce."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from common.stage import Input, Role, Step
from pipeline.config import PipelineConfig
from pipeline.plan import STAGES, start_of, wire, wire_run, with_sources
from step2_dpo.config import DPOConfig
from step3_ppo.config import CriticConfig, CriticStart, Estimator, PPOConfig, RewardSourceConfig

POLICY, REWARD, REFERENCE = Input


def test_sft_is_built_and_needs_nothing() -> None:
    (only,) = wire([Step.sft])
    assert only.stage is STAGES[Step.sft]
    assert only.stage.module == "step1_sft"
    assert dict(only.sources) == {}


def test_reward_and_dpo_are_built_and_start_from_a_policy() -> None:
    made = ((Step.reward, "step2_reward", Role.reward_model), (Step.dpo, "step2_dpo", Role.policy))
    for step, module, produces in made:
        last = wire([Step.sft, step])[-1]
        assert (last.stage.module, last.stage.produces) == (module, produces)
        assert dict(last.sources) == {POLICY: Step.sft}


def test_the_start_of_a_step_is_followed_through_earlier_steps() -> None:
    chain = wire([Step.sft, Step.reward, Step.dpo, Step.ppo])
    assert [start_of(wired.stage.name, chain) for wired in chain] == [None] * 4
    given = {(Step.dpo, POLICY): "elsewhere/export"}
    chain = wire([Step.sft, Step.reward, Step.dpo, Step.ppo], given)
    starts = [start_of(wired.stage.name, chain) for wired in chain]
    assert starts == [None, None, "elsewhere/export", "elsewhere/export"]


def test_steps_run_in_their_own_order_whatever_order_they_are_named_in() -> None:
    wired = wire([Step.ppo, Step.reward, Step.sft])
    assert [w.stage.name for w in wired] == [Step.sft, Step.reward, Step.ppo]
    assert dict(wired[1].sources) == {POLICY: Step.sft}
    assert dict(wired[2].sources) == {POLICY: Step.sft, REWARD: Step.reward}


def test_the_latest_earlier_step_that_makes_a_role_is_its_source() -> None:
    last = wire([Step.sft, Step.reward, Step.dpo, Step.ppo])[-1]
    assert (last.stage.module, last.stage.produces) == ("step3_ppo", Role.policy)
    assert dict(last.sources) == {POLICY: Step.dpo, REWARD: Step.reward}


def test_a_named_path_comes_before_an_earlier_step() -> None:
    given = {(Step.ppo, POLICY): "elsewhere/export"}
    wired = wire([Step.sft, Step.reward, Step.ppo], given)
    assert dict(wired[2].sources) == {POLICY: "elsewhere/export", REWARD: Step.reward}
    assert dict(wired[1].sources) == {POLICY: Step.sft}


def test_a_missing_role_is_an_error_with_the_ways_out() -> None:
    with pytest.raises(UserError) as caught:
        wire([Step.sft, Step.ppo])
    assert caught.value.message == "ppo needs a reward_model"
    with_one, _, without = str(caught.value.hint).rpartition(", or ")
    assert with_one == "add reward to steps, or set ppo.reward_model=PATH, also of a published model"
    assert without == "score without one: 'ppo.rewards=[{function: package.module:function}]'"
    with pytest.raises(UserError) as caught:
        wire([Step.reward])
    assert caught.value.hint == "add sft to steps, or set reward.policy=PATH, also of a published model"


def test_the_start_of_a_reward_model_is_followed_too() -> None:
    chain = wire([Step.sft, Step.reward, Step.ppo])
    assert start_of(Step.ppo, chain, REWARD) is None
    chain = wire([Step.reward, Step.ppo], {(Step.reward, POLICY): "a", (Step.ppo, POLICY): "b"})
    assert (start_of(Step.ppo, chain, REWARD), start_of(Step.ppo, chain)) == ("a", "b")
    chain = wire([Step.sft, Step.ppo], {(Step.ppo, REWARD): "r"})
    assert (start_of(Step.ppo, chain, REWARD), start_of(Step.ppo, chain)) == ("r", None)


def test_a_reference_is_what_the_user_names_and_never_an_earlier_steps(tmp_path: Path) -> None:
    assert REFERENCE not in wire([Step.sft, Step.dpo])[1].sources
    wired = wire([Step.sft, Step.dpo], {(Step.dpo, REFERENCE): "elsewhere"})
    assert dict(wired[1].sources) == {POLICY: Step.sft, REFERENCE: "elsewhere"}
    assert (start_of(Step.dpo, wired), start_of(Step.dpo, wired, REFERENCE)) == (None, "elsewhere")
    config = PipelineConfig([Step.dpo], dpo=DPOConfig(policy="p", reference="r"))
    filled = with_sources(config, wire_run(config), tmp_path)
    assert (filled.dpo.policy, filled.dpo.reference) == ("p", "r")


FUNCTION = [RewardSourceConfig(function="a.b:c")]
BOTH = [*FUNCTION, RewardSourceConfig(model=True)]


@pytest.mark.parametrize(
    ("ppo", "uses_it"),
    [
        (PPOConfig(), True),
        (PPOConfig(rewards=BOTH, critic=CriticConfig(start=CriticStart.policy)), True),
        (PPOConfig(rewards=FUNCTION), False),
        (PPOConfig(rewards=FUNCTION, critic=CriticConfig(start=CriticStart.reward_model)), True),
        (
            PPOConfig(
                rewards=FUNCTION,
                critic=CriticConfig(start=CriticStart.reward_model),
                estimator=Estimator.reinforce_pp,
            ),
            False,
        ),
    ],
)
def test_ppo_asks_for_a_reward_model_only_where_its_settings_use_one(ppo: PPOConfig, uses_it: bool) -> None:
    steps = [Step.sft, Step.ppo]
    if uses_it:
        with pytest.raises(UserError, match="ppo needs a reward_model"):
            wire_run(PipelineConfig(steps=steps, ppo=ppo))
    else:
        assert dict(wire_run(PipelineConfig(steps=steps, ppo=ppo))[1].sources) == {POLICY: Step.sft}
    ppo.reward_model = "r"
    if uses_it:
        assert wire_run(PipelineConfig(steps=steps, ppo=ppo))[1].sources[REWARD] == "r"
        return
    with pytest.raises(UserError, match="ppo.reward_model=r has no effect") as caught:
        wire_run(PipelineConfig(steps=steps, ppo=ppo))
    assert "ppo.reward_model=null" in str(caught.value.hint)
