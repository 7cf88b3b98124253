"""From one step's artifact to the next step's start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.artifacts import MANIFEST, Artifact, Manifest, file_sha256, hash_files, write_manifest
from common.config import Dtype, LoraConfig, ModelConfig, TokenizerConfig
from common.errors import UserError
from common.handoff import check_same_tokens, load_named, model_of, parent_record, scores_text
from common.stage import Role

TOKENS = {
    "tokenizer_hash": "aaaaaaaaaaaaaaaa",
    "chat_template_hash": "bbbbbbbbbbbbbbbb",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "terminators": [2, 4],
}


def artifact(folder: Path, role: Role = Role.policy, **changes: Any) -> Artifact:
    """An artifact with one file, whose manifest says `TOKENS` with some of them changed."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    manifest = Manifest("artifact", role, hash_files(folder), {**TOKENS, **changes})
    write_manifest(folder, manifest)
    return Artifact(folder, manifest)


def refusal(path: Path | str, role: Role = Role.policy) -> UserError:
    with pytest.raises(UserError) as caught:
        load_named(str(path), role, "dpo.policy")
    assert caught.value.hint
    return caught.value


def test_a_step_takes_weights_and_tokenizer_of_the_policy_and_keeps_how_it_trains() -> None:
    lora = LoraConfig(enabled=True, r=4)
    job = ModelConfig(
        config={"model_type": "llama"},
        tokenizer=TokenizerConfig(None, 512),
        chat_template="plain",
        dtype=Dtype.fp32,
        lora=lora,
        gradient_checkpointing=True,
    )
    assert model_of(job, Path("runs/a/sft/export")) == ModelConfig(
        path="runs/a/sft/export", dtype=Dtype.fp32, lora=lora, gradient_checkpointing=True
    )
    assert job.path is None  # the job's own settings stay as they are


def test_the_record_of_a_parent_is_relative_inside_the_run_and_absolute_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    artifact(Path("runs/a/sft/export"))
    sha256 = file_sha256(f"runs/a/sft/export/{MANIFEST}")
    inside = parent_record(Path("runs/a/sft/export"), Path("runs/a"))
    assert inside == {"role": Role.policy, "path": "sft/export", "manifest_sha256": sha256}
    outside = parent_record(Path("runs/a/sft/export"), Path("runs/b"))
    assert outside["path"] == str(tmp_path / "runs/a/sft/export")


def test_the_record_of_a_published_parent_says_where_it_is_from(tmp_path: Path) -> None:
    imported = {"from": "org/name", "weights": {"model.safetensors": "ab" * 32}, "pad_token_id": 0}
    made = artifact(tmp_path / "policy", imported=imported)
    assert parent_record(made.path, tmp_path)["imported"] == imported


def test_only_a_published_reward_model_is_given_text_and_may_read_it_otherwise(tmp_path: Path) -> None:
    imported, otherwise = {"from": "org/name"}, {"tokenizer_hash": "cccccccccccccccc"}
    policy = artifact(tmp_path / "policy", imported=imported)
    ours = artifact(tmp_path / "ours", Role.reward_model, **otherwise)
    theirs = artifact(tmp_path / "theirs", Role.reward_model, imported=imported, **otherwise)
    assert [scores_text(each) for each in (policy, ours, theirs)] == [False, False, True]
    check_same_tokens(policy, theirs)
    with pytest.raises(UserError, match="do not read text alike"):
        check_same_tokens(policy, ours)


def test_artifacts_that_read_text_alike_pass(tmp_path: Path) -> None:
    other = artifact(tmp_path / "b", Role.reward_model, dtype="bfloat16", parameters=7)
    check_same_tokens(artifact(tmp_path / "a"), other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer_hash": "cccccccccccccccc"}, "tokenizer: aaaaaaaaaaaa against cccccccccccc"),
        ({"chat_template_hash": "cccccccccccccccc"}, "chat template: bbbbbbbbbbbb against cccccccccccc"),
        ({"bos_token_id": None}, "bos id: 1 against none"),
        ({"eos_token_id": 4}, "eos id: 2 against 4"),
        ({"pad_token_id": 2}, "pad id: 0 against 2"),
        ({"terminators": [2]}, "terminator ids: [2, 4] against [2]"),
    ],
)
def test_artifacts_that_read_text_differently_are_refused_by_name_and_field(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    left, right = artifact(tmp_path / "a"), artifact(tmp_path / "b", Role.reward_model, **change)
    with pytest.raises(UserError) as caught:
        check_same_tokens(left, right)
    header, *fields = caught.value.message.splitlines()
    assert header.startswith(f"{tmp_path / 'a'} (policy) and {tmp_path / 'b'} (reward_model) do not")
    assert [line.strip() for line in fields] == [said]


def test_a_named_artifact_is_rehashed(tmp_path: Path) -> None:
    artifact(tmp_path / "a")
    assert load_named(str(tmp_path / "a"), Role.policy, "dpo.policy").path == tmp_path / "a"
    (tmp_path / "a" / "config.json").write_text("[]")
    error = refusal(tmp_path / "a")
    assert error.message.startswith(f"dpo.policy={tmp_path / 'a'}: ")
    assert "config.json: content differs" in error.message


def test_a_reward_model_given_as_a_policy_is_called_by_its_name(tmp_path: Path) -> None:
    artifact(tmp_path / "a", Role.reward_model)
    error = refusal(tmp_path / "a")
    assert error.message == f"dpo.policy={tmp_path / 'a'}: is a reward_model, where a policy is needed"


def test_a_checkpoint_given_as_a_policy_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "step_00000001").mkdir()
    write_manifest(tmp_path / "step_00000001", Manifest("checkpoint", None, {}))
    assert "is a checkpoint, where a policy is needed" in refusal(tmp_path / "step_00000001").message


def test_a_folder_with_artifacts_of_another_role_only_says_what_it_holds(tmp_path: Path) -> None:
    export = tmp_path / "a" / "reward" / "export"
    artifact(export, Role.reward_model)
    for folder in (tmp_path / "a", tmp_path / "a" / "reward"):
        error = refusal(folder)
        assert error.message == (
            f"dpo.policy={folder} holds a reward_model ({export}), where a policy is needed"
        )
        assert error.hint == "name the export/ folder of a step that produces a policy"


def test_the_adapter_of_an_artifact_points_at_the_folder_above(tmp_path: Path) -> None:
    for name, role in (("sft", Role.policy), ("reward", Role.reward_model)):
        artifact(tmp_path / name / "export", role)
        (tmp_path / name / "export" / "adapter").mkdir()
    error = refusal(tmp_path / "sft" / "export" / "adapter")
    assert f"is a part of the artifact {tmp_path}/sft/export" in error.message
    assert error.hint == f"name the folder above: dpo.policy={tmp_path}/sft/export"
    assert "folder above" not in str(refusal(tmp_path / "reward" / "export" / "adapter").hint)


def test_a_path_below_the_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert refusal("~/x").hint == "~ is not expanded here; write /home/me/x"


def test_a_folder_that_is_missing_empty_or_a_file_is_named(tmp_path: Path) -> None:
    artifact(tmp_path / "export")
    assert refusal(tmp_path / "exprt").hint == f"did you mean {tmp_path / 'export'}?"
    assert "there is no folder" in str(refusal(tmp_path / "no" / "export").hint)
    (tmp_path / "empty").mkdir()
    assert "is not a finished artifact: it has no manifest.json" in refusal(tmp_path / "empty").message
    assert "is a file" in refusal(tmp_path / "export" / "config.json").message
    assert refusal("").message == "dpo.policy is empty"


def test_manifests_that_say_nothing_of_their_tokens_are_not_alike(tmp_path: Path) -> None:
    silent = []
    for name in ("one", "other"):
        artifact_of_name = artifact(tmp_path / name)
        manifest = Manifest("artifact", Role.policy, artifact_of_name.manifest.files, {})
        silent.append(Artifact(artifact_of_name.path, manifest))
    with pytest.raises(UserError, match="do not read text alike"):
        check_same_tokens(*silent)
