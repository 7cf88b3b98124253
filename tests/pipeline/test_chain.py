"""Steps that start from each other's artifacts: what is checked, passed on, remembered (with fake steps)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.artifacts import (
    MANIFEST,
    Artifact,
    Manifest,
    file_sha256,
    hash_files,
    read_manifest,
    write_manifest,
)
from common.config import DataConfig, ModelConfig, TokenizerConfig
from common.errors import UserError
from common.stage import Role, Step
from pipeline import plan, run, state
from pipeline.config import PROJECT, PipelineConfig
from pipeline.verify import verify_path
from tests.pipeline.programs.fake_step import TOKENS

PROGRAMS = Path(__file__).parent / "programs"
FAKES = {Step.sft: "fake_step", Step.reward: "fake_reward", Step.dpo: "fake_dpo"}
SFT, REWARD, DPO = Step.sft, Step.reward, Step.dpo


@pytest.fixture(autouse=True)
def fake_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, module in FAKES.items():
        monkeypatch.setitem(plan.STAGES, step, dataclasses.replace(plan.STAGES[step], module=module))  # type: ignore[arg-type]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), str(PROGRAMS)]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(run, "make_report", lambda run_dir, say: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')


def config(*steps: Step, **changes: Any) -> PipelineConfig:
    llama = ModelConfig(config={"model_type": "llama"}, tokenizer=TokenizerConfig(None, 512))
    made = PipelineConfig(run_name="a", model=llama, steps=list(steps))
    made.sft.data = DataConfig(path="rows.jsonl")
    made.reward.data = DataConfig(path="pairs.jsonl")
    made.dpo.data = DataConfig(path="pairs.jsonl")
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def from_policy(step: Step, path: str, **changes: Any) -> PipelineConfig:
    """A run of one step that starts from the policy at `path`."""
    made = config(step, **changes)
    getattr(made, step.value).policy = path
    return made


def go(made: PipelineConfig) -> list[str]:
    """Run to a good end; returns what was said."""
    lines: list[str] = []
    assert run.run(made, say=lines.append) == 0
    return lines


def refused(made: PipelineConfig) -> UserError:
    with pytest.raises(UserError) as caught:
        run.run(made, say=lambda line: None)
    return caught.value


def launches(step: Step, name: str = "a") -> int:
    path = Path(f"runs/{name}/{step.value}_launches")
    return len(path.read_text().splitlines()) if path.exists() else 0


def make_policy(path: str, weights: str = "{}", role: Role = Role.policy) -> str:
    """An artifact made elsewhere, instead of what is there; returns the hash of its manifest."""
    shutil.rmtree(path, ignore_errors=True)
    Path(path).mkdir(parents=True)
    (Path(path) / "config.json").write_text(weights)
    return file_sha256(write_manifest(path, Manifest("artifact", role, hash_files(path), TOKENS)))


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
    run.check_parents(artifact, wired, Path("runs/a"), given)
    with pytest.raises(UserError, match=r"was made from another policy .* than the one at here \(f{12}\)"):
        run.check_parents(artifact, wired, Path("runs/a"), {"dpo.policy": {"sha256": "f" * 64}})


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
    made = from_policy(REWARD, "there", model=ModelConfig(path="some/base", chat_template="plain"))
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


# --- Refused before anything starts ----------------------------------------------------------------


@pytest.mark.parametrize("step", [REWARD, DPO])
def test_a_step_without_a_policy_names_both_ways_to_one(step: Step) -> None:
    error = refused(config(step))
    assert error.message == f"{step.value} needs a policy"
    assert error.hint == f"add sft to steps, or set {step.value}.policy=PATH"


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
        run.load_sources(wired, Path("runs/a"))


# --- Verify ----------------------------------------------------------------------------------------


def test_verify_follows_parents_inside_and_outside_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    make_policy("here")
    go(from_policy(DPO, "here"))
    assert verify_path(Path("runs/a")) == 0
    assert f"made from policy {Path('here').absolute()}" in capsys.readouterr().out
    (Path("here") / "config.json").write_text("[]")  # damaged, with the same manifest
    assert verify_path(Path("runs/a")) == 2
    assert "config.json: " in capsys.readouterr().out
    make_policy("here", '{"other": 1}')  # made again
    assert verify_path(Path("runs/a")) == 2
    shown = capsys.readouterr().out
    assert "DIFFERS" in shown and "the policy that runs/a/dpo/export was made from" in shown
    shutil.rmtree("here")
    assert verify_path(Path("runs/a")) == 2


def test_verify_finds_a_policy_of_the_run_that_was_made_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go(config(SFT, REWARD))
    assert verify_path(Path("runs/a")) == 0
    assert "made from policy sft/export" in capsys.readouterr().out
    monkeypatch.setenv("FAKE_WEIGHTS", '{"other": 1}')
    go(config(SFT, seed=1, force=True))
    assert verify_path(Path("runs/a")) == 2
    differing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DIFFERS")]
    assert len(differing) == 1 and "the policy that runs/a/reward/export was made from" in differing[0]


def test_verify_finds_a_lineage_that_tells_of_other_parents_than_the_manifest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    go(config(SFT, REWARD))
    path = Path("runs/a/lineage.json")
    lineage = json.loads(path.read_text())
    lineage["artifacts"]["reward"]["parents"] = []
    path.write_text(json.dumps(lineage))
    assert verify_path(Path("runs/a")) == 2
    assert "names other parents" in capsys.readouterr().out


# --- Preview ---------------------------------------------------------------------------------------


def previewed(made: PipelineConfig, capfd: pytest.CaptureFixture[str]) -> str:
    """The line of the last step: which policy and which tokenizer it was told of."""
    assert run.preview(made) == 0
    return capfd.readouterr().out.splitlines()[-1]


def test_a_preview_before_anything_ran_reads_with_the_tokenizer_that_sfts_preview_trained(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert previewed(config(SFT, REWARD), capfd) == "reward: policy None, tokenizer None"
    monkeypatch.setenv("FAKE_TRAINS_TOKENIZER", "1")
    told = previewed(config(SFT, REWARD), capfd)
    assert told.startswith("reward: policy None, tokenizer /") and told.endswith("/sft/tokenizer")


def test_a_preview_takes_the_policy_that_the_run_has_or_the_user_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_TRAINS_TOKENIZER", "1")
    go(config(SFT))
    capfd.readouterr()
    assert previewed(config(SFT, DPO), capfd) == "dpo: policy runs/a/sft/export, tokenizer None"
    make_policy("here")
    assert previewed(from_policy(DPO, "here"), capfd) == "dpo: policy here, tokenizer None"
