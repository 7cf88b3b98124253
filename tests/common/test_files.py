"""A file or folder is there whole or not at all, and what is in the way is kept under another name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from common.artifacts import hash_files, write_json
from common.errors import UserError
from common.files import commit_folder, set_aside, write_atomically


def filled(folder: Path) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"hello")
    (folder / "adapter" / "config.json").write_bytes(b"{}")
    return folder


def test_commit_moves_the_whole_folder_and_leaves_no_temporary_one(tmp_path: Path) -> None:
    tmp = filled(tmp_path / "export.tmp")
    assert commit_folder(tmp, tmp_path / "export") == tmp_path / "export"
    assert not tmp.exists()
    assert (tmp_path / "export" / "adapter" / "config.json").read_bytes() == b"{}"


def test_commit_never_overwrites(tmp_path: Path) -> None:
    filled(tmp_path / "export")
    before = hash_files(tmp_path / "export")
    tmp = tmp_path / "export.tmp"
    tmp.mkdir()
    (tmp / "model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="already exists and is not overwritten"):
        commit_folder(tmp, tmp_path / "export")
    assert hash_files(tmp_path / "export") == before
    assert (tmp / "model.safetensors").read_bytes() == b"other"


def test_a_full_disk_during_commit_leaves_neither_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp = filled(tmp_path / "export.tmp")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*export: the disk is full"):
        commit_folder(tmp, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert not tmp.exists()


def test_a_read_only_disk_is_named_and_the_old_file_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"status": "done"})

    def read_only(source: object, target: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(UserError, match="the file system is read-only"):
        write_json(path, {"status": "failed"})
    assert json.loads(path.read_text()) == {"status": "done"}
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_a_file_is_replaced_by_all_parts_or_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_atomically(path, (line for line in (b"one\n", b"two\n")))
    assert path.read_bytes() == b"one\ntwo\n"

    def broken_off() -> object:
        yield b"three\n"
        raise KeyError("a part")

    with pytest.raises(KeyError):
        write_atomically(path, broken_off())  # type: ignore[arg-type]
    assert path.read_bytes() == b"one\ntwo\n" and list(tmp_path.iterdir()) == [path]


def test_what_is_set_aside_gets_the_first_free_name(tmp_path: Path) -> None:
    old = [set_aside(filled(tmp_path / "sft")).name for _ in range(2)]
    bad = [set_aside(filled(tmp_path / "step_2"), tmp_path / "quarantine").name for _ in range(3)]
    assert old == ["sft.old-1", "sft.old-2"] and bad == ["step_2", "step_2-2", "step_2-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quarantine", *old]
