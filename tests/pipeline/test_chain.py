"""Steps that start from each other's artifacts: what is checked, passed on, remembered (with fake steps)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.artifacts import MANIFEST, Artifact, Manifest, file_sha256, read_manifest
from common.config import DataConfig, Dtype, ModelConfig
from common.errors import UserError
from common.stage import Role, Step
from pipeline import lineage, plan, run, sources, state
from pipeline.verify import verify_path
from step3_ppo.config import EvaluationConfig, RewardSourceConfig
from tests.pipeline.fakes import (
    DPO,
    PPO,
    REWARD,
    SFT,
    config,
    from_policy,
    go,
    launches,
    make_policy,
    refused,
)

pytestmark = pytest.mark.usefixtures("fake_steps")


# --- Chains ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [REWARD, DPO])
def test_a_chain_runs_from_one_command_and_records_who_comes_from_whom(step: Step) -> None:
    go(config(SFT, step))
    lineage = json.loads(Path("runs/a/lineage.json").read_text())["artifacts"]
    sha256 = file_sha256(f"runs/a/sft/export/{MANIFEST}")
    assert lineage[step.value]["parents"] == [
        {"role": "policy", "path": "sft/export", "manifest_sha256": sha256}
    ]
    assert lineage[step.value]["inputs"][f"{step.value}.policy"] == sha256
    assert lineage[step.value]["role"] == ("reward_model" if step is REWARD else "policy")


@pytest.mark.parametrize("step", [REWARD, DPO])
def test_a_step_says_which_artifact_it_starts_from(step: Step) -> None:
    (
        first,
        *_,
    ) = go(config(SFT, step))
    assert first == "sft: starting in runs/a/sft, 1 rank(s)"
    sha256 = make_policy("here")
    lines = go(from_policy(step, "here", run_name="b"))
    assert lines[0] == f"{step.value}: starting in runs/b/{step.value}, 1 rank(s), from here ({sha256[:12]})"


def test_the_ranks_read_the_path_of_the_policy_whether_a_step_makes_it_or_the_user_named_it() -> None:
    go(config(SFT, REWARD))
    resolved = yaml.safe_load(Path("runs/a/resolved.yaml").read_text())
    assert resolved["reward"]["policy"] == "runs/a/sft/export"
    assert resolved["dpo"]["policy"] is None  # it does not run
    go(from_policy(DPO, "runs/a/sft/export/", run_name="b"))
    assert yaml.safe_load(Path("runs/b/resolved.yaml").read_text())["dpo"]["policy"] == "runs/a/sft/export"


def test_a_run_without_a_name_keeps_the_name_that_its_configuration_gives_it() -> None:
    made = config(SFT, REWARD, run_name=None)
    go(made)
    assert state.run_name(made).startswith("sft-reward-")
    assert yaml.safe_load(Path(f"runs/{state.run_name(made)}/resolved.yaml").read_text())["run_name"] == (
        state.run_name(made)
    )
    assert launches(REWARD, state.run_name(made)) == 1


def test_settings_of_steps_that_do_not_run_have_no_part_in_a_runs_name() -> None:
    plain, other = config(SFT, run_name=None), config(SFT, run_name=None)
    other.dpo.beta = 0.5
    assert state.run_name(plain) == state.run_name(other)
    plain, other = from_policy(DPO, "a", run_name=None), from_policy(DPO, "b", run_name=None)
    assert state.run_name(plain) != state.run_name(other)


def test_a_child_records_the_parent_that_it_was_really_made_from() -> None:
    make_policy("here")
    go(from_policy(DPO, "here"))
    wired = plan.wire_run(from_policy(DPO, "here"))[0]
    artifact = Artifact(Path("runs/a/dpo/export"), read_manifest("runs/a/dpo/export"))
    given = {"dpo.policy": {"sha256": file_sha256(f"here/{MANIFEST}")}}
    lineage.check_parents(artifact, wired, Path("runs/a"), given)
    with pytest.raises(UserError, match=r"was made from another policy .* than the one at here \(f{12}\)"):
        lineage.check_parents(artifact, wired, Path("runs/a"), {"dpo.policy": {"sha256": "f" * 64}})


def test_a_step_added_later_goes_on_from_what_the_run_has() -> None:
    go(config(SFT))
    lines = go(config(SFT, REWARD))
    assert "sft: done already" in lines[0]
    lines = go(config(SFT, REWARD, DPO))
    assert "sft: done already" in lines[0] and "reward: done already" in lines[1]
    assert (launches(SFT), launches(REWARD), launches(DPO)) == (1, 1, 1)


def test_settings_of_other_steps_do_not_matter_to_a_step() -> None:
    go(config(SFT, REWARD))
    made = config(SFT, REWARD)
    made.dpo.beta = 0.5
    made.reward.warn_below_accuracy = 0.9  # says when to speak, changes no result
    assert all("done already" in line for line in go(made))
    made.reward.center_rewards_coefficient = 0.01
    assert "reward.center_rewards_coefficient: 0.0 -> 0.01" in refused(made).message


def test_where_the_policy_lies_and_what_the_base_model_was_do_not_matter_but_what_is_in_it_does() -> None:
    make_policy("here")
    go(from_policy(REWARD, "here"))
    shutil.copytree("here", "there")
    other = ModelConfig(path="some/base", chat_template="plain", dtype=Dtype.fp32)
    made = from_policy(REWARD, "there", model=other)
    assert "done already" in go(made)[0]
    before, after = file_sha256(f"here/{MANIFEST}")[:12], make_policy("here", '{"other": 1}')[:12]
    error = refused(from_policy(REWARD, "here"))
    assert f"content of reward.policy: {before} -> {after}" in error.message
    assert "run_name=" in str(error.hint) and "force=true" in str(error.hint)
    assert launches(REWARD) == 1
    go(from_policy(REWARD, "here", force=True))
    assert launches(REWARD) == 2


def test_how_the_model_is_trained_matters_to_a_step_that_starts_from_a_policy() -> None:
    make_policy("here")
    go(from_policy(DPO, "here"))
    made = from_policy(DPO, "here")
    made.model.lora.enabled = True
    assert "model.lora.enabled: false -> true" in refused(made).message


def test_a_policy_made_again_is_noticed_by_the_steps_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    go(config(SFT, REWARD))
    monkeypatch.setenv("FAKE_WEIGHTS", '{"other": 1}')
    assert "seed: 0 -> 1" in refused(config(SFT, REWARD, seed=1)).message
    go(config(SFT, seed=1, force=True))
    error = refused(config(SFT, REWARD, seed=1))
    assert "reward in runs/a/reward was made differently" in error.message
    assert "content of reward.policy: " in error.message


# --- PPO: two artifacts, or one --------------------------------------------------------------------


def test_ppo_takes_policy_and_reward_model_of_the_run_and_records_both(
    capsys: pytest.CaptureFixture[str],
) -> None:
    go(config(SFT, REWARD, PPO))
    hashes = {step: file_sha256(f"runs/a/{step.value}/export/{MANIFEST}") for step in (SFT, REWARD)}
    entry = json.loads(Path("runs/a/lineage.json").read_text())["artifacts"]["ppo"]
    assert entry["parents"] == [
        {"role": "policy", "path": "sft/export", "manifest_sha256": hashes[SFT]},
        {"role": "reward_model", "path": "reward/export", "manifest_sha256": hashes[REWARD]},
    ]
    inputs = {"ppo.policy": hashes[SFT], "ppo.reward_model": hashes[REWARD]}
    assert inputs.items() <= entry["inputs"].items()
    assert verify_path(Path("runs/a")) == 0
    assert "made from policy sft/export, reward_model reward/export" in capsys.readouterr().out
    assert "done already" in go(config(SFT, REWARD, PPO))[-1]
    (Path("runs/a/reward/export") / "config.json").write_text("[]")
    assert verify_path(Path("runs/a")) == 2


def test_ppo_starts_from_artifacts_made_elsewhere() -> None:
    make_policy("p")
    make_policy("r", role=Role.reward_model)
    made = from_policy(PPO, "p")
    made.ppo.reward_model = "r"
    go(made)
    resolved = yaml.safe_load(Path("runs/a/resolved.yaml").read_text())
    assert (resolved["ppo"]["policy"], resolved["ppo"]["reward_model"]) == ("p", "r")
    assert verify_path(Path("runs/a")) == 0
    before, after = file_sha256(f"r/{MANIFEST}")[:12], make_policy("r", "{ }", Role.reward_model)[:12]
    assert f"content of ppo.reward_model: {before} -> {after}" in refused(made).message
    assert verify_path(Path("runs/a")) == 2


def test_ppo_by_functions_alone_has_one_parent() -> None:
    made = config(SFT, PPO)
    made.ppo.rewards = [RewardSourceConfig(function="a.b:c")]
    go(made)
    entry = json.loads(Path("runs/a/lineage.json").read_text())["artifacts"]["ppo"]
    assert [parent["role"] for parent in entry["parents"]] == ["policy"]
    assert sorted(entry["inputs"]) == ["ppo.data.sources[0]", "ppo.policy"]
    assert yaml.safe_load(Path("runs/a/resolved.yaml").read_text())["ppo"]["reward_model"] is None
    assert "done already" in go(made)[-1]


def test_how_patient_one_is_with_a_reward_server_may_change_and_its_weight_may_not() -> None:
    made = config(SFT, PPO)
    made.ppo.rewards = [RewardSourceConfig(url="https://host/score")]
    go(made)
    made.ppo.rewards[0].retries, made.ppo.rewards[0].timeout, made.ppo.rewards[0].concurrency = 9, 90.0, 2
    made.ppo.offload_frozen, made.ppo.ptx_data.cache_dir = True, "elsewhere"
    assert "done already" in go(made)[-1]
    made.ppo.rewards[0].weight = 2.0
    assert "ppo.rewards" in refused(made).message


def test_demonstrations_that_change_under_a_run_are_noticed() -> None:
    Path("ptx.jsonl").write_text('{"text": "a"}\n')
    made = config(SFT, REWARD, PPO)
    made.ppo.ptx_weight, made.ppo.ptx_data = 0.1, DataConfig(path="ptx.jsonl")
    go(made)
    Path("ptx.jsonl").write_text('{"text": "b"}\n')
    assert "content of ppo.ptx_data.sources[0]: " in refused(made).message


def test_artifacts_that_read_text_differently_are_refused_before_anything_starts() -> None:
    make_policy("p")
    make_policy("r", role=Role.reward_model, tokenizer_hash="t2")
    made = from_policy(PPO, "p")
    made.ppo.reward_model = "r"
    error = refused(made)
    assert "p (policy) and r (reward_model) do not read text alike" in error.message
    assert "tokenizer: t1 against t2" in error.message
    make_policy("q", tokenizer_hash="t2")
    made = from_policy(PPO, "p", steps=[REWARD, PPO])  # the reward model will read text as q does
    made.reward.policy = "q"
    assert "p (policy) and q (policy) do not read text alike" in refused(made).message
    assert not Path("runs").exists()


@pytest.mark.parametrize(("accuracy", "warned"), [("0.97", False), ("0.55", True)])
def test_ppo_says_how_good_its_reward_model_is_before_it_starts(
    accuracy: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ACCURACY", accuracy)
    lines = go(config(SFT, REWARD, PPO))
    start = next(index for index, line in enumerate(lines) if line.startswith("ppo: starting"))
    assert lines[start + 1].startswith("ppo: reward model runs/a/reward/export (")
    assert f") orders {float(accuracy):.1%} of 20 held-out pairs (95% interval " in lines[start + 1]
    assert lines[start + 1].endswith("%) as people did")
    assert any("less than reward.warn_below_accuracy=0.6" in line for line in lines) is warned


def test_a_reward_model_that_was_measured_on_no_pairs_is_not_passed_over_in_silence() -> None:
    lines = go(config(SFT, REWARD, PPO))
    assert any("warning: reward model" in line and "says nothing of its accuracy" in line for line in lines)
    details = {"calibration": {"accuracy": 0.9, "pairs": 5}, "metrics": {}}
    artifact = Artifact(Path(make_policy("r") and "r"), Manifest("artifact", Role.reward_model, {}, details))
    assert "orders 90.0% of 5 training pairs" in run.lines_on_reward_model(artifact, 0.6)[0]


# --- Refused before anything starts ----------------------------------------------------------------


@pytest.mark.parametrize("step", [REWARD, DPO])
def test_a_step_without_a_policy_names_both_ways_to_one(step: Step) -> None:
    error = refused(config(step))
    assert error.message == f"{step.value} needs a policy"
    assert error.hint == f"add sft to steps, or set {step.value}.policy=PATH, also of a published model"


def test_a_policy_that_cannot_be_used_is_found_before_an_earlier_step_spends_time() -> None:
    make_policy("reward_model", role=Role.reward_model)
    make_policy("damaged")
    (Path("damaged") / "config.json").write_text("[]")
    cases = {
        "reward_model": "dpo.policy=reward_model: is a reward_model, where a policy is needed",
        "damaged": "config.json: ",
        "nowhere": "dpo.policy=nowhere: no such folder",
    }
    for path, said in cases.items():
        made = config(SFT, DPO)
        made.dpo.policy = path
        assert said in refused(made).message
    assert not Path("runs").exists()


def test_rows_longer_than_the_policys_context_are_refused_whatever_the_base_models_is() -> None:
    make_policy("short", '{"max_position_embeddings": 64}')
    made = from_policy(DPO, "short")
    made.dpo.data.max_length = 65
    assert "dpo.data.max_length=65, but the model's context is 64 tokens" in refused(made).message
    made = config(SFT, DPO)
    made.model.config["max_position_embeddings"] = 32
    made.sft.data.max_length, made.dpo.data.max_length = 32, 33
    assert "dpo.data.max_length=33, but the model's context is 32 tokens" in refused(made).message


def test_the_base_model_of_a_run_without_sft_is_not_looked_at() -> None:
    make_policy("here")
    assert go(from_policy(DPO, "here", model=ModelConfig()))


# --- Found at the hand-off -------------------------------------------------------------------------


def test_a_child_that_reads_text_differently_from_its_parent_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go(config(SFT))
    monkeypatch.setenv("FAKE_TOKENIZER", "t2")
    error = refused(config(SFT, REWARD))
    assert "runs/a/sft/export (policy) and runs/a/reward/export (reward_model)" in error.message
    assert "tokenizer: t1 against t2" in error.message
    assert json.loads(Path("runs/a/reward/state.json").read_text())["status"] == "failed"
    assert "tokenizer: t1 against t2" in refused(config(SFT, REWARD)).message
    monkeypatch.setenv("FAKE_TOKENIZER", "t1")
    go(config(SFT, REWARD, force=True))
    assert Path("runs/a/reward.old-1").is_dir()


def test_a_damaged_policy_of_an_earlier_step_is_never_used() -> None:
    go(config(SFT))
    wired = plan.wire_run(config(SFT, REWARD))[1]
    (Path("runs/a/sft/export") / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"reward\.policy=runs/a/sft/export: does not match its manifest"):
        lineage.load_sources(wired, Path("runs/a"))


# --- Functions that score --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"rewards": [RewardSourceConfig(function="demo.gold:glod")]},
            "error: ppo.rewards[0].function=demo.gold:glod: demo.gold has no glod\n  did you mean",
        ),
        (
            {"evaluation": EvaluationConfig(functions={"looked_at": "demo.gould:gold"})},
            "error: ppo.evaluation.functions.looked_at=demo.gould:gold: there is no module demo.gould",
        ),
    ],
)
def test_a_function_that_is_not_there_is_found_before_the_first_step(
    change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(plan.STAGES, PPO, dataclasses.replace(plan.STAGES[PPO], module="step3_ppo"))  # type: ignore[arg-type]
    made = config(SFT, REWARD, PPO)
    for name, value in change.items():
        setattr(made.ppo, name, value)
    assert run.run(made, say=lambda line: None) == UserError.EXIT_CODE
    assert capfd.readouterr().err.startswith(said)
    assert not Path("runs").exists()


@pytest.mark.parametrize(("references", "asked"), [({}, []), ({"gold": "demo.gold:gold"}, ["step3_ppo"])])
def test_functions_are_looked_at_when_there_are_some(
    references: dict[str, str], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = []
    monkeypatch.setitem(plan.STAGES, PPO, dataclasses.replace(plan.STAGES[PPO], module="step3_ppo"))  # type: ignore[arg-type]
    supervise = sources.supervise
    monkeypatch.setattr(
        sources, "supervise", lambda job, *held, **more: jobs.append(job) or supervise(job, *held, **more)
    )
    made = config(SFT, REWARD, PPO)
    made.ppo.evaluation.functions = references
    assert run.check_functions(made, plan.wire_run(made), Path("runs/a")) == 0
    assert [job.module for job in jobs] == asked and all("--check" in job.arguments for job in jobs)
    make_policy("runs/a/ppo/export")
    assert run.check_functions(made, plan.wire_run(made), Path("runs/a")) == 0
    assert len(jobs) == len(asked), "it is done"
