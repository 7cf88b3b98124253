"""A changed byte of a finished folder is found and named."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from common import artifacts
from common.artifacts import (
    MANIFEST,
    Artifact,
    Damaged,
    Manifest,
    canonical_json,
    content_sha256,
    hash_files,
    read_manifest,
    unlisted,
    verify,
    write_manifest,
)
from common.errors import UserError
from common.stage import Role

HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # sha256sum of "hello"
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def finished(folder: Path, role: Role | None = Role.policy, kind: str = "artifact") -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"hello")
    (folder / "adapter" / "config.json").write_bytes(b"")
    details = {"eos_token_id": [2, 7], "metrics": {"eval/loss": 0.5}}
    write_manifest(folder, Manifest(kind, role, hash_files(folder), details))
    return folder


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_hashes_and_sizes_of_all_files_below_a_folder_are_recorded(tmp_path: Path) -> None:
    assert hash_files(finished(tmp_path / "export")) == {
        "adapter/config.json": {"sha256": EMPTY, "bytes": 0},
        "model.safetensors": {"sha256": HELLO, "bytes": 5},
    }


def test_an_untouched_folder_verifies_and_gives_its_manifest_back(tmp_path: Path) -> None:
    manifest = verify(finished(tmp_path / "export"))
    assert manifest.role is Role.policy
    assert manifest.kind == "artifact"
    assert manifest.details["eos_token_id"] == [2, 7]
    assert set(manifest.files) == {"adapter/config.json", "model.safetensors"}


def test_one_flipped_bit_is_found_and_its_file_named(tmp_path: Path) -> None:
    folder = finished(tmp_path / "export")
    flip_a_bit(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: content differs"):
        verify(folder)


def test_a_missing_and_a_shortened_file_are_both_named(tmp_path: Path) -> None:
    folder = finished(tmp_path / "export")
    (folder / "adapter" / "config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"hell")
    with pytest.raises(UserError) as caught:
        verify(folder)
    assert "adapter/config.json: missing" in caught.value.message
    assert "model.safetensors: 4 bytes, recorded 5" in caught.value.message


def test_an_extra_weights_file_is_refused_and_an_extra_readme_is_not(tmp_path: Path) -> None:
    folder = finished(tmp_path / "export")
    (folder / "README.md").write_text("notes")
    verify(folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors: not recorded"):
        verify(folder)


def test_a_folder_without_a_manifest_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not finished: it has no manifest\.json"):
        verify(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        verify(tmp_path / "nowhere")


def test_a_changed_detail_in_the_manifest_itself_is_found(tmp_path: Path) -> None:
    path = finished(tmp_path / "export") / MANIFEST
    text = path.read_text()
    path.write_text(text.replace("0.5", "0.4"))
    assert path.read_text() != text
    with pytest.raises(UserError, match="checksum"):
        verify(path.parent)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"kind": "artifact"}', "null"])
def test_a_manifest_that_is_no_manifest_is_called_damaged(tmp_path: Path, content: str) -> None:
    path = finished(tmp_path / "export") / MANIFEST
    path.write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        read_manifest(path.parent)


BODY: dict[str, Any] = {
    "format_version": 1, "kind": "artifact", "role": "policy", "details": {},
    "files": {"model.safetensors": {"sha256": HELLO, "bytes": 5}},
}  # fmt: skip
PARENT = {"role": "policy", "path": "sft/export", "manifest_sha256": HELLO}


def with_body(folder: Path, changes: dict[str, Any]) -> Path:
    """A folder with a manifest of any content, under its right checksum."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"hello")
    body = {**BODY, **changes}
    (folder / MANIFEST).write_text(json.dumps({**body, "checksum": content_sha256(body)}))
    return folder


MEASURED = {"accuracy": None, "std": 2, "mean": -0.5}
RECORDED = {"parents": [PARENT], "data": None, "new": [1], "calibration": MEASURED}


@pytest.mark.parametrize("changes", [{}, {"details": RECORDED}])
def test_what_the_following_manifests_are_made_from_is_whole(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert verify(with_body(tmp_path / "export", changes)).role is Role.policy


NAN = float("nan")
NONSENSE: list[dict[str, Any]] = [
    {"role": "judge"}, {"role": 7}, {"role": ["policy"]}, {"kind": "cake"}, {"kind": 1}, {"kind": ["a"]},
    {"format_version": "1"}, {"format_version": NAN}, {"format_version": True}, {"format_version": None},
    {"files": 5}, {"files": [["model.safetensors", {}]]}, {"files": {"a": 5}}, {"files": {"a": {}}},
    {"files": {"a": {"sha256": 5, "bytes": 5}}}, {"files": {"a": {"sha256": HELLO, "bytes": "5"}}},
    {"files": {"a": {"sha256": HELLO, "bytes": NAN}}}, {"files": {"a": {"sha256": HELLO, "bytes": 1e400}}},
    {"files": {"a\0b": {"sha256": HELLO, "bytes": 5}}},
    {"details": 5}, {"details": "text"}, {"details": [["data", 1]]}, {"details": {"data": 7}},
    {"details": {"data": {"chat_template_kwargs": 1}}}, {"details": {"data": {"stage_split": "all"}}},
    {"details": {"data": {"stage_split": {"shares": {"sft": "half"}}}}}, {"details": {"metrics": [1]}},
    {"details": {"calibration": 1}}, {"details": {"calibration": {"accuracy": "high"}}},
    {"details": {"data": {"stage_split": {"shares": {"sft": None}}}}},
    {"details": {"parents": {"role": "policy"}}}, {"details": {"parents": [5]}},
    {"details": {"parents": [{**PARENT, "path": 5}]}}, {"details": {"parents": [{"role": "policy"}]}},
    {"extra": 1},
]  # fmt: skip


@pytest.mark.parametrize("changes", NONSENSE, ids=map(ascii, NONSENSE))
def test_nonsense_under_a_right_checksum_is_called_damaged(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(Damaged, match=r"manifest\.json is damaged") as caught:
        verify(with_body(tmp_path / "export", changes))
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("depth", [100, 400, 5_000, 200_000])
@pytest.mark.parametrize("nested", ["[", '{"a":'])
def test_a_manifest_of_any_depth_is_called_damaged(tmp_path: Path, depth: int, nested: str) -> None:
    closing = {"[": "]", "{": "}"}[nested[0]]
    value = f"{nested * depth}1{closing * depth}"
    whole = json.dumps({**BODY, "checksum": "0"})
    for text in (value, whole.replace('"details": {}', f'"details": {value}')):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(Damaged, match="is damaged"):
            verify(tmp_path)


def test_a_manifest_that_is_not_utf_8_is_called_damaged_in_few_words(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(b'{"kind": "' + b"\xff" * 9999)
    with pytest.raises(Damaged, match="is damaged: 'utf-8' codec can't decode byte 0xff") as caught:
        verify(tmp_path)
    assert len(caught.value.message) < 400
    (tmp_path / MANIFEST).write_text(json.dumps({**BODY, "kind": "\ud800", "checksum": "0"}))
    with pytest.raises(Damaged, match="is damaged: 'utf-8' codec can't encode"):
        verify(tmp_path)


def test_a_manifest_of_very_many_files_is_read_and_ten_of_them_are_named(tmp_path: Path) -> None:
    many = {f"{number}.bin": {"sha256": HELLO, "bytes": 5} for number in range(2_000)}
    with pytest.raises(Damaged, match="and 1990 more") as caught:
        verify(with_body(tmp_path / "export", {"files": {**BODY["files"], **many}}))
    assert caught.value.message.count(".bin: missing") == 10


def test_nothing_below_a_finished_folder_goes_unlisted(tmp_path: Path) -> None:
    folder = finished(tmp_path / "export")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "modeling.py").write_text("run()")
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.svg").write_text("")
    os.mkfifo(folder / "pipe")
    (folder / "nowhere").symlink_to(tmp_path / "nothing there")
    assert unlisted(folder, verify(folder)) == ["nowhere", "pipe", "plots/loss.svg"]
    (folder / "plots" / "code").symlink_to(elsewhere)
    with pytest.raises(Damaged, match="plots/code: a link to a folder, which nobody recorded"):
        verify(folder)


def test_a_folder_that_became_a_link_is_found_though_all_its_files_are_as_recorded(tmp_path: Path) -> None:
    folder = finished(tmp_path / "export")
    (folder / "adapter").rename(tmp_path / "adapter")
    (folder / "adapter").symlink_to(tmp_path / "adapter")
    with pytest.raises(Damaged, match="adapter: a link to a folder"):
        verify(folder)


@pytest.mark.parametrize(
    ("number", "is_damaged"), [(errno.EIO, True), (errno.EMFILE, False), (errno.EACCES, False)]
)
def test_a_file_that_we_cannot_open_here_and_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_damaged: bool
) -> None:
    folder = finished(tmp_path / "export")

    def refuse(path: Path) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(artifacts, "file_sha256", refuse)
    with pytest.raises(UserError, match=f"cannot be read: {os.strerror(number)}") as caught:
        verify(folder)
    assert isinstance(caught.value, Damaged) == is_damaged


def test_a_manifest_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"format_version": 2, "kept": "otherwise"}')
    with pytest.raises(UserError, match="format version 2; this program reads version 1") as caught:
        read_manifest(tmp_path)
    assert not isinstance(caught.value, Damaged)


def test_an_artifact_is_refused_where_another_role_is_needed(tmp_path: Path) -> None:
    folder = finished(tmp_path / "export", Role.reward_model)
    assert Artifact.load(folder, Role.reward_model).manifest.role is Role.reward_model
    with pytest.raises(UserError, match="is a reward_model, where a policy is needed"):
        Artifact.load(folder, Role.policy)
    checkpoint = finished(tmp_path / "step_1", None, "checkpoint")
    with pytest.raises(UserError, match="is a checkpoint, where a policy is needed"):
        Artifact.load(checkpoint, Role.policy)


def test_the_identity_of_an_artifact_is_the_hash_of_its_manifest(tmp_path: Path) -> None:
    first = Artifact.load(finished(tmp_path / "a"), Role.policy)
    second = Artifact.load(finished(tmp_path / "b"), Role.policy)
    assert first.sha256 == second.sha256  # nothing in it depends on place or time
    other = Artifact.load(finished(tmp_path / "c", Role.reward_model), Role.reward_model)
    assert other.sha256 != first.sha256


def test_json_is_the_same_for_equal_values_and_strict() -> None:
    value = {"b": float("nan"), "a": [Role.policy, Path("x/y"), float("inf"), 1.5, {"z", "k"}]}
    assert json.loads(canonical_json(value)) == {"a": ["policy", "x/y", None, 1.5, ["k", "z"]], "b": None}
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    assert canonical_json({"b": 2, "a": 1}) == '{\n  "a": 1,\n  "b": 2\n}\n'
    assert content_sha256({"a": 1, "b": 2}) == content_sha256({"b": 2, "a": 1})
    assert content_sha256({"a": 1}) != content_sha256({"a": 2})
