"""When the demo is filled in, and what of it or of an experiment a named model or data replace."""

from __future__ import annotations

import pytest

from common.stage import Step
from pipeline.compose import (
    DEMO,
    DEMO_DATA,
    prepare,
)
from pipeline.config import PROJECT
from tests.pipeline.composing import JOB, composed, error_of


def test_the_demo_that_is_filled_in_has_several_steps_to_choose_from() -> None:
    hint = "one or more of sft.optim=muon, reward.optim=muon, ppo.optim=muon"
    assert error_of("optim=muon") == f"optim=muon: for which step?\n  {hint}"


def test_the_demo_is_the_whole_chain_and_a_model_of_ones_own_begins_with_sft() -> None:
    assert composed().steps == composed("seed=3").steps == [Step.sft, Step.reward, Step.ppo]
    assert composed(*JOB).steps == composed("sft.data.path=x").steps == [Step.sft]
    assert composed("steps=[sft]").steps == [Step.sft]


def test_naming_nothing_runs_the_demo_and_says_so() -> None:
    for overrides in ([], ["steps=[sft]"], ["seed=3", "model.dtype=fp32", "sft.data.max_length=128"]):
        prepared = prepare(overrides)
        assert prepared.notes == [DEMO]
        assert prepared.overrides[0] == "experiment=demo"


@pytest.mark.parametrize(
    ("overrides", "steps", "note"),
    [
        (["steps=[sft,reward]"], [Step.sft, Step.reward], DEMO),
        (["steps=[sft,dpo]"], [Step.sft, Step.dpo], DEMO),
        (["steps=[reward]", "reward.policy=a/export"], [Step.reward], DEMO_DATA),
        (["steps=[dpo]", "dpo.policy=a/export"], [Step.dpo], DEMO_DATA),
        (["steps=[ppo]", "ppo.policy=a/export", "ppo.reward_model=b/export"], [Step.ppo], DEMO_DATA),
    ],
)
def test_steps_and_a_policy_alone_run_on_the_demos_data(
    overrides: list[str], steps: list[Step], note: str
) -> None:
    assert prepare(overrides).notes == [note]
    job = composed(*overrides)
    assert job.steps == steps
    for step in steps[1:] or steps:
        (source,) = getattr(job, step.value).data.all_sources()
        name = "prompts_train.jsonl" if step is Step.ppo else "preferences.jsonl"
        assert source.path == str(PROJECT / "demo" / "data" / name)


@pytest.mark.parametrize(
    "named",
    [
        "reward.data.path=x",
        "dpo.data.sources=[{path: x}]",
        "dpo.data=gsm8k_preferences",
        "model.path=x",
        "model=llama_4m",
        "model.config.model_type=llama",
        "experiment=gsm8k",
        "sft.data.path=x",
        "sft.data.sources=[{path: x}]",
        "data@sft.data=gsm8k",
        "data=gsm8k",
    ],
)
def test_naming_a_model_an_experiment_or_data_keeps_the_demo_away(named: str) -> None:
    prepared = prepare([named])
    assert prepared.notes == []
    assert "experiment=demo" not in prepared.overrides


@pytest.mark.parametrize("option", ["lora", "qlora", "lora,qlora"])
def test_choosing_adapters_names_no_model(option: str) -> None:
    prepared = prepare(["steps=[reward]", "reward.policy=a/export", f"model={option}"], multirun=True)
    assert prepared.notes == [DEMO_DATA]
    job = composed("steps=[dpo]", "dpo.policy=a/export", "model=lora")
    assert job.model.lora.enabled and job.dpo.data.all_sources()
    both = prepare(["steps=[dpo]", "dpo.policy=a/export", "model=lora,llama_4m"], multirun=True)
    assert both.notes == []


def test_adapters_for_sft_ask_for_a_model_instead_of_taking_the_demos_random_one() -> None:
    for steps in ("steps=[sft]", "steps=[sft,dpo]"):
        assert prepare([steps, "model=lora"]).notes == []
        assert composed(steps, "model=lora").model.path is None


def test_a_named_model_takes_the_place_of_the_one_an_experiment_makes() -> None:
    model = composed("experiment=gsm8k", "model.path=org/name").model
    assert (model.path, model.config, model.tokenizer.train_vocab_size) == ("org/name", {}, None)


def test_a_named_tokenizer_takes_the_place_of_the_one_an_experiment_trains() -> None:
    model = composed("experiment=gsm8k", "model.tokenizer.path=t").model
    assert (model.tokenizer.path, model.tokenizer.train_vocab_size) == ("t", None)
    assert model.config["model_type"] == "llama"


def test_named_data_takes_the_place_of_an_experiments_in_either_form() -> None:
    by_path = composed("experiment=demo", "sft.data.path=mine.jsonl").sft.data
    assert [source.path for source in by_path.all_sources()] == ["mine.jsonl"]
    by_list = composed("experiment=gsm8k", "sft.data.sources=[{path: mine.jsonl}]").sft.data
    assert [source.path for source in by_list.all_sources()] == ["mine.jsonl"]
