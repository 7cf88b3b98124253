from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from common.artifacts import Artifact
from common.errors import UserError
from common.stage import Role, Step
from launch.local import Job
from launch.supervise import Outcome
from pipeline import chat, sources
from pipeline.__main__ import dispatch
from pipeline.config import PipelineConfig
from pipeline.sources import artifact_of, artifacts_in, is_published, settle_sources
from pipeline.state import config_hash
from step2_dpo.config import DPOConfig
from step3_ppo.config import CriticStart
from tests.common.training.exporting import published
from tests.pipeline.fakes import artifact

KEY = "dpo.policy"
OTHER_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"


def meant(path: Path, role: Role = Role.policy) -> str:
    return artifact_of(str(path), role, KEY, path / "models")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Imports happen within this process; returns what each was told."""
    from common.training import import_model

    told: list[tuple[str, ...]] = []

    def supervise(job: Job) -> Outcome:
        assert job.module == import_model.__name__
        told.append(job.arguments)
        monkeypatch.setattr(sys, "argv", ["import", *job.arguments])
        return Outcome(import_model.main())

    monkeypatch.setattr(sources, "supervise", supervise)
    return told


def test_a_run_means_its_latest_policy_and_a_step_its_own(tmp_path: Path) -> None:
    assert meant(tmp_path) == str(tmp_path)
    sft = artifact(tmp_path / "sft" / "export")
    reward = artifact(tmp_path / "reward" / "export", Role.reward_model)
    assert meant(tmp_path) == meant(tmp_path / "sft") == meant(sft) == str(sft)
    assert meant(tmp_path, Role.reward_model) == str(reward)
    (tmp_path / "ppo" / "export").mkdir(parents=True)  # not finished
    assert meant(tmp_path) == str(sft)
    dpo = artifact(tmp_path / "dpo" / "export")
    assert artifacts_in(tmp_path, Role.policy) == [dpo, sft]
    (tmp_path / "ppo" / "export").rmdir()
    assert meant(artifact(tmp_path / "ppo" / "export").parent.parent) == str(tmp_path / "ppo" / "export")


def test_a_folder_of_runs_is_refused_with_the_names_of_those_that_have_a_policy(tmp_path: Path) -> None:
    for name in ("one", "two"):
        artifact(tmp_path / name / "sft" / "export")
    artifact(tmp_path / "three" / "reward" / "export", Role.reward_model)
    with pytest.raises(UserError, match="holds 2 run") as error:
        chat.chat([str(tmp_path)])
    assert error.value.hint == f"name one: {tmp_path / 'one'}, {tmp_path / 'two'}"


def test_what_can_be_the_name_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_published("org/name") and is_published("org/name@v1.0")
    for named in ("name", "runs/frist", "./org/name", "/org/name", "~/name", "a/b/c", "org/", "", "runs"):
        assert not is_published(named), named
    (tmp_path / "runs" / "config.json").write_text("{}")
    assert is_published("runs") and is_published(str(tmp_path / "runs"))


def test_a_published_model_is_imported_once_and_again_when_it_changes(
    here: list[tuple[str, ...]], tmp_path: Path
) -> None:
    folder, said = published(tmp_path / "model"), list[str]()
    first = artifact_of(str(folder), Role.policy, KEY, tmp_path / "models", said.append)
    assert artifact_of(str(folder), Role.policy, KEY, tmp_path / "models", said.append) == first
    assert said == [
        f"{KEY}={folder} is imported as an artifact: {first}", f"{KEY}={folder} was imported before: {first}",
    ]  # fmt: skip
    assert Artifact.load(first, Role.policy).manifest.details["imported"]["from"] == str(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.5}))
    second = artifact_of(str(folder), Role.policy, KEY, tmp_path / "models")
    assert second != first and len(here) == 2
    assert sorted(Path(first).parent.iterdir()) == sorted([Path(first), Path(second)])


def test_a_revision_goes_to_the_importer_with_the_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(sources, "supervise", lambda job: jobs.append(job) or Outcome(7))
    with pytest.raises(SystemExit) as ended:
        artifact_of("org/name@v1", Role.policy, KEY, tmp_path, options=["--trust-remote-code"])
    assert ended.value.code == 7
    (job,) = jobs
    arguments = job.arguments
    assert arguments[0] == "org/name"
    assert arguments[3:6] == ("--role", "policy", "--named=dpo.policy=org/name@v1")
    assert arguments[-3:] == ("--trust-remote-code", "--revision", "v1")


def with_published_reward_model(tmp_path: Path) -> PipelineConfig:
    typed = PipelineConfig([Step.ppo], output_dir=str(tmp_path / "runs"))
    typed.ppo.policy = str(published(tmp_path / "model"))
    scorer = AutoModelForSequenceClassification
    typed.ppo.reward_model = str(published(tmp_path / "scorer", scorer, labels=1, template=OTHER_TEMPLATE))
    return typed


def test_a_published_reward_model_need_not_read_the_policys_tokens(
    here: list[tuple[str, ...]], tmp_path: Path
) -> None:
    said: list[str] = []
    settled = settle_sources(with_published_reward_model(tmp_path), said.append)
    assert [told[4] for told in here] == ["policy", "reward_model"]
    assert Artifact.load(Path(str(settled.ppo.reward_model)), Role.reward_model)
    assert settled.ppo.critic.start is CriticStart.policy
    assert any("the critic begins as the policy" in line for line in said)


def test_a_critic_cannot_begin_as_a_reward_model_that_is_given_text(
    here: list[tuple[str, ...]], tmp_path: Path
) -> None:
    typed = with_published_reward_model(tmp_path)
    typed.ppo.critic.start = CriticStart.reward_model
    with pytest.raises(UserError, match="ppo.critic.start=reward_model cannot be") as error:
        settle_sources(typed)
    assert error.value.hint == "ppo.critic.start=policy, or leave it out"


def test_ours_must_read_the_policys_tokens(here: list[tuple[str, ...]], tmp_path: Path) -> None:
    typed = with_published_reward_model(tmp_path)
    typed.ppo.reward_model = str(artifact(tmp_path / "reward", Role.reward_model))
    with pytest.raises(UserError, match="do not read text alike"):
        settle_sources(typed)


def test_the_reference_of_dpo_is_settled_like_a_policy_and_reads_text_as_that_does(
    here: list[tuple[str, ...]], tmp_path: Path
) -> None:
    typed = PipelineConfig([Step.dpo], output_dir=str(tmp_path / "runs"))
    typed.dpo.policy = typed.dpo.reference = str(published(tmp_path / "model"))
    settled = settle_sources(typed)
    assert settled.dpo.reference == settled.dpo.policy and len(here) == 1
    assert Artifact.load(Path(str(settled.dpo.reference)), Role.policy)
    typed.dpo.reference = str(published(tmp_path / "other", template=OTHER_TEMPLATE))
    with pytest.raises(UserError, match=r"do not read text alike:\n *chat template: "):
        settle_sources(typed)
    typed.dpo.reference = str(artifact(tmp_path / "reward", Role.reward_model))
    with pytest.raises(UserError, match=r"dpo\.reference=.*reward_model"):
        settle_sources(typed)


def test_a_model_that_an_option_names_is_imported(here: list[tuple[str, ...]], tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    made = artifact_of(str(folder), Role.policy, "--against", tmp_path / "models")
    assert Artifact.load(made, Role.policy)


def test_trust_in_remote_code_reaches_the_importer(here: list[tuple[str, ...]], tmp_path: Path) -> None:
    typed = PipelineConfig([Step.dpo], output_dir=str(tmp_path / "runs"))
    typed.dpo.policy, typed.model.trust_remote_code = str(published(tmp_path / "model")), True
    settle_sources(typed)
    assert "--trust-remote-code" in here[0]


def test_a_run_has_the_name_of_what_was_typed(here: list[tuple[str, ...]], tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    typed = PipelineConfig([Step.dpo], output_dir=str(tmp_path / "runs"), dpo=DPOConfig(policy=str(folder)))
    settled = settle_sources(typed)
    assert settled.run_name == f"dpo-{config_hash(typed)[:8]}"
    (made,) = (tmp_path / "runs" / ".cache" / "models").iterdir()
    assert settled.dpo.policy == str(made) and typed.dpo.policy == str(folder)


def test_a_run_in_model_path_means_its_policy(tmp_path: Path) -> None:
    made = artifact(tmp_path / "first" / "sft" / "export")
    typed = PipelineConfig([Step.sft])
    typed.model.path = str(tmp_path / "first")
    assert settle_sources(typed).model.path == str(made)
    typed.model.path = str(tmp_path / "model")
    assert settle_sources(typed).model.path == str(tmp_path / "model")


def test_the_verb_makes_an_artifact_and_overwrites_nothing(
    here: list[tuple[str, ...]], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, out = published(tmp_path / "model", template=None), tmp_path / "new" / "artifact"
    assert dispatch(["import", str(folder), "--out", str(out), "--chat-template", "chatml"]) == 0
    made = Artifact.load(out, Role.policy)
    assert f"artifact  {out} ({made.sha256[:12]}), a policy" in capfd.readouterr().out
    with pytest.raises(UserError, match="exists, and nothing is overwritten"):
        dispatch(["import", str(folder), "--out", str(out)])
    with pytest.raises(UserError, match="does not exist") as error:
        dispatch(["import", str(tmp_path / "modle"), "--out", str(tmp_path / "other")])
    assert error.value.hint == f"did you mean {folder}?"
    with pytest.raises(UserError, match=r"import: .*--out") as missing:
        dispatch(["import", str(folder)])
    assert "python -m pipeline import MODEL --out FOLDER" in str(missing.value.hint)


def test_the_verb_names_what_it_was_given_and_a_way_out_that_it_has(
    here: list[tuple[str, ...]], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    three = published(tmp_path / "three", AutoModelForSequenceClassification, labels=3)
    bare = published(tmp_path / "bare")
    for path in (*bare.glob("*token*"), *bare.glob("*.jinja")):
        path.unlink()

    def printed(*typed: str) -> str:
        with pytest.raises(SystemExit):
            dispatch(["import", *typed, "--out", str(tmp_path / "out")])
        return capfd.readouterr().err

    said = printed(str(three), "--as", "reward_model")
    assert f"error: {three} cannot be imported: it is no reward model: its head" in said
    assert "3 labels" in said and "model.path" not in said and "export/" not in said
    said = printed(str(bare))
    assert f"error: {bare} cannot be imported: it has no tokenizer (tokenizer.json" in said
    assert "put the files of the tokenizer" in said
    for named, way_out in (
        (three, "--as reward_model"),
        (three / "config.json", "name the folder of a saved model"),
    ):
        with pytest.raises(UserError) as refused:
            dispatch(["import", str(named), "--out", str(tmp_path / "out")])
        assert str(refused.value.hint).startswith(way_out)


def test_what_cannot_be_imported_is_said_with_what_was_typed(
    here: list[tuple[str, ...]], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = published(tmp_path / "model", template=None)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        artifact_of(str(folder), Role.policy, KEY, tmp_path / "models")
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {KEY}={folder} cannot be imported: it has no chat template\n")
    assert list((tmp_path / "models").iterdir()) == []
