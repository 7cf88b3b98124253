"""What the user typed has an effect, or is refused with the reason and a way out."""

from __future__ import annotations

import pytest

from common.errors import UserError
from pipeline.compose import compose, jobs_of
from pipeline.effects import check_effects
from tests.pipeline.composing import composed

JOB = ("model.path=org/name", "sft.data.path=rows.jsonl")


def check_model_of(*overrides: str) -> None:
    check_effects([composed(*overrides)], overrides)


@pytest.mark.parametrize(
    "text",
    [
        "model.path=org/name",
        "model.revision=main",
        "model.config.model_type=llama",
        "model.config={model_type: llama}",
        "model.tokenizer.path=t",
        "model.tokenizer.train_vocab_size=300",
        "model.chat_template=alpaca",
        "model=llama_4m",
    ],
)
def test_a_base_model_that_no_step_starts_from_is_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        check_model_of("steps=[reward]", "reward.policy=P", text)
    assert caught.value.message == (
        f"{text} has no effect: reward takes weights, tokenizer and chat template from reward.policy=P"
    )
    assert "leave reward.policy out" in str(caught.value.hint)


def test_every_setting_without_effect_and_every_policy_is_named() -> None:
    policies = ("steps=[reward,dpo]", "reward.policy=P", "dpo.policy=Q")
    with pytest.raises(UserError) as caught:
        check_model_of(*policies, "model.path=x", "model.dtype=fp32", "model.revision=main")
    assert "model.path=x and model.revision=main have no effect" in caught.value.message
    assert "from reward.policy=P and dpo takes" in caught.value.message
    assert caught.value.message.endswith("from dpo.policy=Q")


@pytest.mark.parametrize(
    "overrides",
    [
        ("steps=[sft,reward]", "model.path=x"),
        ("steps=[sft,dpo]", "dpo.policy=P", "model.path=x"),
        ("steps=[dpo]", "dpo.policy=P", "experiment=gsm8k_preferences"),  # its model is for SFT
        ("steps=[dpo]", "dpo.policy=P", "model=lora", "model.lora.r=4", "model.dtype=fp32"),
        ("steps=[dpo]", "dpo.policy=P", "model.chat_template=null", "model.config={}"),
    ],
)
def test_what_some_step_uses_or_the_user_did_not_name_is_not_refused(overrides: tuple[str, ...]) -> None:
    check_model_of(*overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["steps=[sft]", "dpo.policy=P"], "dpo.policy=P has no effect: dpo is not among steps=[sft]"),
        (["ppo.reward_model=R", *JOB], "ppo.reward_model=R has no effect: ppo is not among steps=[sft]"),
        (["dpo.policy=P"], "dpo is not among steps=[sft,reward,ppo]"),
        (["steps=[sft,dpo]", "dpo.policy=P"], None),
        (["steps=[sft]", "dpo.policy=null"], None),
    ],
)
def test_an_artifact_for_a_step_that_does_not_run_is_refused(overrides: list[str], said: str | None) -> None:
    if said is None:
        return check_effects([composed(*overrides)], overrides)
    with pytest.raises(UserError) as caught:
        check_effects([composed(*overrides)], overrides)
    assert said in caught.value.message and "runs it" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["ppo.critic.clip=0"], None),
        (["ppo.kl.target=3", "ppo.kl.controller=adaptive"], None),
        (["ppo.estimator=reinforce_pp"], None),  # the demo's critic.optim.lr is not the user's
        (["steps=[sft]", "ppo.kl.target=3"], None),
        (["ppo.kl.target=3"], "ppo.kl.target=3 has no effect with ppo.kl.controller=fixed"),
        (["ppo.kl.horizon=3"], "leave it out, or ppo.kl.controller=adaptive"),
        (
            ["ppo.estimator=reinforce_pp", "ppo.critic.clip=0"],
            "ppo.critic.clip=0 has no effect with ppo.estimator=reinforce_pp",
        ),
        (["ppo.estimator=reinforce_pp", "ppo.critic.start=policy"], "or ppo.estimator=gae"),
        (["ppo.estimator=reinforce_pp", "ppo.critic.optim.lr=1"], "ppo.critic.optim.lr=1 has no effect"),
        (["ppo.estimator=reinforce_pp", "ppo.critic.optim=muon"], "ppo.critic.optim=muon has no effect"),
        (["sft.train.stop_when.patience=5"], "or sft.train.stop_when.metric=eval/loss"),
        (["sft.train.stop_when.patience=5", "sft.train.stop_when.metric=eval/loss"], None),
        (["dpo.train.stop_when.patience=5"], None),  # dpo does not run
        (["model.lora.r=8"], "model.lora.r=8 has no effect with model.lora.enabled=false"),
        (["model.lora.r=8", "model.lora.enabled=true"], None),
        (["model.lora.enabled=false"], None),
        (["reward.optim.scheduler=linear", "reward.optim.min_lr_ratio=0.5"], "scheduler=cosine"),
        (["reward.optim.scheduler=wsd", "reward.optim.min_lr_ratio=0.5"], None),
    ],
)
def test_a_setting_that_only_another_choice_reads_is_refused(overrides: list[str], said: str | None) -> None:
    overrides = ["experiment=demo", *overrides]
    if said is None:
        return check_effects([composed(*overrides)], overrides)
    with pytest.raises(UserError) as caught:
        check_effects([composed(*overrides)], overrides)
    assert said in str(caught.value)


def test_a_setting_that_one_run_of_a_sweep_reads_has_an_effect() -> None:
    overrides = ["experiment=demo", "ppo.estimator=gae,reinforce_pp", "ppo.critic.clip=0"]
    check_effects([compose(job) for job in jobs_of(overrides)], overrides)


def test_an_artifact_that_one_run_of_a_sweep_uses_has_an_effect() -> None:
    overrides = ["steps=[sft],[dpo]", "dpo.policy=P", *JOB]
    check_effects([compose(job) for job in jobs_of(overrides)], overrides)


def test_a_base_model_that_one_run_of_a_sweep_starts_from_has_an_effect() -> None:
    overrides = ["steps=[sft],[dpo]", "dpo.policy=P", "model.path=x"]
    runs = [compose(job) for job in jobs_of(overrides)]
    check_effects(runs, overrides)
    with pytest.raises(UserError, match="no effect"):
        check_effects(runs[1:], overrides)
