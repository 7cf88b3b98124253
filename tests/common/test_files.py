"""A file or folder is there whole or not at all, and what is in the way is kept under another name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.artifacts import hash_files, write_json
from common.errors import UserError
from common.files import (
    commit_folder,
    disk_errors,
    is_damage,
    is_of_disk,
    set_aside,
    unfinished,
    write_atomically,
    written_with,
)
from tests import mounts


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


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EXDEV, "it is on another file system"), (errno.EBUSY, "it is a mount")]
)
def test_what_cannot_be_renamed_because_it_is_mounted_is_named_and_left_as_it_was(
    number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp, run = filled(tmp_path / "export.tmp"), filled(tmp_path / "sft")
    before = hash_files(tmp), hash_files(run)

    def refuse(source: object, target: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match=f"cannot write .*export: {said}"):
        commit_folder(tmp, tmp_path / "export")
    with pytest.raises(UserError, match=f"cannot write .*sft.old-1: {said}"):
        set_aside(run)
    assert (hash_files(tmp), hash_files(run)) == before


def test_a_folder_that_is_a_mount_is_not_set_aside(tmp_path: Path) -> None:
    with mounts.small_disk(tmp_path / "sft", 2**20) as run:
        (run / "state.json").write_text("{}")
        with pytest.raises(UserError, match="cannot write .*sft.old-1: it is a mount"):
            set_aside(run)
        assert (run / "state.json").read_text() == "{}"


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


CACHE = "data.cache_dir=DIR"


def said_of(error: OSError, path: Path, way_out: str = "output_dir=DIR") -> str | None:
    """What a person is told of it; None where it stays what it is."""
    try:
        with disk_errors(path, way_out):
            raise error
    except UserError as refused:
        return str(refused)
    except OSError as same:
        assert same is error
        return None


def system_error(number: int, *named: object) -> OSError:
    """As the system raises it. named: its file; for a renaming both of them."""
    first, *second = [*named, None]
    return OSError(number, os.strerror(number), first, None, *[name for name in second if name])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE])
def test_what_only_a_disk_can_say_is_said_of_the_place_that_is_written(tmp_path: Path, number: int) -> None:
    place = tmp_path / "step_1"
    said = said_of(system_error(number), place, CACHE)
    assert said is not None and said.startswith(f"cannot write {place}: ")
    assert f"write elsewhere with {CACHE}" in said
    assert said == said_of(system_error(number, str(place / "zero.pt")), place, CACHE)
    assert is_of_disk(system_error(number))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR])
def test_what_others_say_too_is_the_disks_where_it_names_a_file_there(tmp_path: Path, number: int) -> None:
    place = tmp_path / "runs" / "a" / "export"
    place.parent.mkdir(parents=True)
    for file in (place / "model.safetensors", place, place.with_name("export.tmp"), tmp_path / "runs"):
        assert "cannot write" in str(said_of(system_error(number, str(file)), place)), file
    assert "cannot write" in str(said_of(system_error(number, str(tmp_path / "b"), str(place)), place))
    assert said_of(system_error(number), place) is None  # of a socket, or a process that is not ours
    assert said_of(system_error(number, str(tmp_path / "another" / "cache")), place) is None
    assert not is_of_disk(system_error(number))


OF_NO_DISK = [
    errno.EMFILE, errno.ENFILE, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENOMEM, errno.EAGAIN,
    errno.EINVAL, errno.ETIMEDOUT, errno.ENOENT,
]  # fmt: skip


@pytest.mark.parametrize("number", OF_NO_DISK, ids=[errno.errorcode[number] for number in OF_NO_DISK])
def test_what_is_no_error_of_a_disk_is_not_called_one(tmp_path: Path, number: int) -> None:
    for named in ((), (str(tmp_path / "export" / "file"),)):
        assert said_of(system_error(number, *named), tmp_path / "export") is None
    assert not is_of_disk(system_error(number))


def test_a_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run" / "sft" / "state.json"
    said = f"cannot write {path}: the folder {path.parent} is gone"
    with pytest.raises(UserError, match=said):
        write_json(path, {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_damaged_where_the_disk_lost_it_and_not_where_we_cannot_open_it() -> None:
    assert is_damage(system_error(errno.EIO)) and is_damage(system_error(errno.EISDIR))
    assert not any(is_damage(system_error(number)) for number in (errno.EMFILE, errno.EACCES, errno.ESTALE))


def test_where_to_write_elsewhere_is_said_as_the_verb_has_it_also_by_what_it_starts() -> None:
    show = "import os, common.files as f; print(f.written_where())"

    def said() -> list[str]:
        with pytest.raises(UserError) as error, disk_errors("here"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        started = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
        return [str(error.value.hint).rpartition(" with ")[2], started.stdout.strip()]

    assert said() == ["output_dir=DIR"] * 2
    with written_with("--out FILE"):
        with written_with("TMPDIR=DIR"):
            assert said() == ["TMPDIR=DIR"] * 2
        assert said() == ["--out FILE"] * 2
    assert said() == ["output_dir=DIR"] * 2


def test_what_a_killed_process_left_is_removed_and_said_and_what_another_uses_stays(tmp_path: Path) -> None:
    (tmp_path / ".export.of_somebody").mkdir()  # not of this mechanism
    killed = tmp_path / ".export.killed"
    killed.mkdir()
    (killed / ".in_use").touch()
    (killed / "model.safetensors").write_bytes(b"half")
    lines: list[str] = []
    with unfinished(".export.", tmp_path, lines.append) as first:
        assert lines == [f"removed {killed}, which a process that was killed had left unfinished"]
        with unfinished(".export.", tmp_path, lines.append) as second:
            assert first.is_dir() and second != first and len(lines) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".export.of_somebody"]


def test_a_folder_that_cannot_be_copied_for_want_of_space_is_said(tmp_path: Path) -> None:
    source, small = filled(tmp_path / "export"), tmp_path / "small"
    (source / "model.safetensors").write_bytes(b"x" * 100_000)
    with (
        mounts.small_disk(small, 20_000),
        pytest.raises(UserError, match="the disk is full") as error,
        disk_errors(small / "out", "--out FOLDER"),
    ):
        shutil.copytree(source, small / "out")
    assert str(error.value.hint).endswith("write elsewhere with --out FOLDER")
