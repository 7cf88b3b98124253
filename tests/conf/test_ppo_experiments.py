"""The experiments with PPO say what their names promise, and rewards can be named on the command line."""

from __future__ import annotations

import pytest

from common.errors import UserError
from common.stage import Input, Step
from pipeline import checks
from pipeline.compose import compose, prepare
from step3_ppo.config import Estimator, KLController, KLPlacement, RewardSourceConfig
from step3_ppo.rewards.functions import load_function
from step3_ppo.rewards.sources import RewardSources
from tests.pipeline.composing import composed

EXPERIMENTS = ("gsm8k_rlvr", "hh_ppo", "reward_hacking")


def rewards(*overrides: str) -> list[RewardSourceConfig]:
    return composed("experiment=demo", *overrides).ppo.rewards


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_an_experiment_names_as_a_score_is_there(name: str) -> None:
    ppo = composed(f"experiment={name}").ppo
    assert RewardSources(ppo.rewards).names
    for function, reference in ppo.evaluation.functions.items():
        load_function(reference, f"ppo.evaluation.functions.{function}")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_updates_divide_an_iteration(name: str) -> None:
    ppo = composed(f"experiment={name}").ppo
    assert ppo.responses_per_iteration % ppo.train.global_batch_size == 0


def test_gsm8k_rlvr_compares_eight_verified_solutions_and_needs_no_reward_model() -> None:
    job, sft = composed("experiment=gsm8k_rlvr"), composed("experiment=gsm8k")
    assert (job.sft, job.model) == (sft.sft, sft.model)
    assert job.steps == [Step.sft, Step.ppo]
    assert (job.ppo.estimator, job.ppo.rollout.samples_per_prompt) == (Estimator.grpo, 8)
    assert job.ppo.kl.placement is KLPlacement.loss and job.ppo.kl.coef > 0
    assert [source.function for source in job.ppo.rewards] == ["step3_ppo.rewards.verifiable:gsm8k"]
    assert job.ppo.data.path == sft.sft.data.path
    assert not job.ppo.needs(Input.reward_model)


def test_hh_ppo_is_the_chain_of_hh_with_prompts_that_nobody_has_seen() -> None:
    job, hh = composed("experiment=hh_ppo"), composed("experiment=hh")
    assert job.steps == [Step.sft, Step.reward, Step.ppo]
    assert (job.sft.train, job.reward.train, job.model) == (hh.sft.train, hh.reward.train, hh.model)
    (demonstrations,) = job.sft.data.all_sources()
    assert demonstrations.format == "chosen"  # as in hh: of a pair only the answer that was preferred
    shares = {"sft": 2.0, "reward": 4.0, "ppo": 4.0}
    assert job.sft.data.stage_split == job.reward.data.stage_split == job.ppo.data.stage_split == shares
    checks.check_stage_split(job)
    assert job.ppo.needs(Input.reward_model) and job.ppo.kl.controller is KLController.adaptive


def test_reward_hacking_is_the_demo_with_a_flawed_reward_and_the_gold_score_only_looked_at() -> None:
    job, demo = composed("experiment=reward_hacking"), composed("experiment=demo")
    assert (job.sft, job.model, job.ppo.data) == (demo.sft, demo.model, demo.ppo.data)
    assert job.steps == [Step.sft, Step.ppo]
    assert [source.function for source in job.ppo.rewards] == ["demo.flawed:polite"]
    assert job.ppo.evaluation.functions["gold"] == "demo.gold:gold"
    assert not job.ppo.needs(Input.reward_model)


@pytest.mark.parametrize(
    "override",
    [
        "ppo.rewards=[{function: demo.gold:gold}]",
        "ppo.rewards=[{function: 'demo.gold:gold'}]",
        'ppo.rewards=[{function: "demo.gold:gold"}]',
    ],
)
def test_a_function_is_named_on_the_command_line_with_or_without_quotes(override: str) -> None:
    assert rewards(override) == [RewardSourceConfig(function="demo.gold:gold")]


def test_several_rewards_are_named_on_the_command_line_with_their_settings() -> None:
    both = 'ppo.rewards=[{model: true}, {url: "https://r.example:8443/s?a=b&c=d", weight: 0.5, name: judge}]'
    assert rewards(both) == [
        RewardSourceConfig(model=True),
        RewardSourceConfig(url="https://r.example:8443/s?a=b&c=d", weight=0.5, name="judge"),
    ]
    (local,) = rewards("ppo.rewards=[{url: http://127.0.0.1:8000/score}]")
    assert local.url == "http://127.0.0.1:8000/score"


def test_a_score_to_look_at_is_named_on_the_command_line() -> None:
    job = composed("experiment=demo", "ppo.evaluation.functions.manner=demo.gold:style")
    assert job.ppo.evaluation.functions["manner"] == "demo.gold:style"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ppo.rewards=[{function: demo.gold.gold}]", "did you mean demo.gold:gold?"),
        ("ppo.rewards=[{fonction: demo.gold:gold}]", "did you mean function?"),
        ("ppo.rewards=[{}]", "ppo.rewards=[{function: package.module:function}]"),
        ("ppo.rewards=[{model: true, function: demo.gold:gold}]", "'ppo.rewards=[{model: true}]'"),
        ("ppo.rewards=[{url: http://rewards.example/}]", "allow_http: true"),
        ("ppo.rewards=[{url: 'https://me:hunter2@rewards.example/'}]", "RLHF_REWARD_TOKEN"),
        ("ppo.evaluation.functions.gold=gold", "package.module:function"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_with_the_way_out(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        rewards(override)
    assert said in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "where"),
    [
        ([], KLPlacement.reward),
        (["ppo.estimator=grpo"], KLPlacement.loss),
        (["ppo.estimator=rloo"], KLPlacement.reward),
        (["ppo.estimator=grpo", "ppo.kl.placement=reward"], KLPlacement.reward),
        (["ppo.kl.placement=loss"], KLPlacement.loss),
    ],
)
def test_where_the_kl_penalty_goes_follows_from_the_estimator_that_is_typed(
    typed: list[str], where: KLPlacement
) -> None:
    assert compose(prepare(["experiment=demo", *typed]).overrides).ppo.kl.placement is where
