"""Disks that refuse a checkpoint: full, over a quota, read-only, busy."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.training.checkpoint import Checkpoints, StatefulGroup
from common.training.snapshot import Open
from tests import mounts
from tests.common.training.checkpoints import (
    StateOnly,
    checkpoints_in,
    content,
    resumed_value,
    save,
)
from tests.common.training.test_engine import runs
from tests.programs import saved_engines


def test_a_checkpoint_that_cannot_be_removed_is_left_with_a_warning_and_removed_by_a_later_save(
    two: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    save(two, 30)
    assert "step_00000010 cannot be removed: Device or resource busy" in caplog.text
    assert resumed_value(two)[0] == 30.0 and list(two.folder.glob("*.tmp"))
    with pytest.raises(UserError, match=r"cannot write .*step_00000010.tmp: it is there already"):
        save(two, 10)  # what is left of the old one is not taken into a new one
    monkeypatch.undo()
    save(two, 40)
    assert sorted(path.name for path in two.folder.iterdir()) == ["step_00000030", "step_00000040"]


def test_a_checkpoint_that_cannot_fit_is_refused_before_it_is_begun(
    two: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, size = namedtuple("usage", "total used free"), sum(map(len, content(two.folder).values())) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, size - 1))
    monkeypatch.setattr(StateOnly, "save", lambda *given: pytest.fail("it was begun"))
    with pytest.raises(UserError, match="a checkpoint takes 0.0 MiB") as caught:
        save(two, 30)
    assert "what was saved before is untouched" in str(caught.value.hint)
    assert sorted(two.steps()) == [10, 20]


def test_a_full_disk_is_an_error_that_leaves_earlier_checkpoints_intact(tmp_path: Path) -> None:
    with mounts.small_disk(tmp_path / "disk", 256 << 10) as disk:
        checkpoints = checkpoints_in(disk / "checkpoints")
        save(checkpoints, 10)
        before = content(disk)
        with pytest.raises(UserError, match="cannot write .*step_00000020.tmp: .*full"):
            save(checkpoints, 20, numbers=50_000)
        assert content(disk) == before
        assert resumed_value(checkpoints)[0] == 10.0
        save(checkpoints, 20)  # with room again
        assert resumed_value(checkpoints)[0] == 20.0


def test_a_full_disk_in_plain_files_is_the_same_error(tmp_path: Path) -> None:
    class PlainFile(StateOnly):
        def save(self, folder: Path, open_file: Open) -> None:
            with open_file(folder / "weights.bin") as file:
                file.write(bytes(self.numbers))

    with mounts.small_disk(tmp_path / "disk", 256 << 10) as disk:
        checkpoints, engine = checkpoints_in(disk / "checkpoints"), PlainFile(numbers=300 << 10)
        with pytest.raises(UserError, match="the disk is full"):
            checkpoints.save(10, engine, {}, best_step=None)  # type: ignore[arg-type]
        assert content(disk) == {} and not list(disk.rglob("*.tmp"))


def test_a_file_that_may_not_be_so_large_is_named_with_the_reason(two: Checkpoints) -> None:
    before = content(two.folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
    try:
        with pytest.raises(UserError, match="cannot write .*step_00000030.tmp: a file may not be so large"):
            save(two, 30, numbers=2**18)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(two.folder) == before and not list(two.folder.glob("*.tmp"))


def test_a_used_up_quota_is_named_though_the_disk_has_room(
    two: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def over_quota(*given: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    before = content(two.folder)
    monkeypatch.setattr(torch, "save", over_quota)
    with pytest.raises(UserError, match="cannot write .*step_00000030.tmp: the disk quota is used up"):
        save(two, 30)
    assert content(two.folder) == before and not list(two.folder.glob("*.tmp"))


def test_a_read_only_disk_is_an_error_that_leaves_earlier_checkpoints_intact(two: Checkpoints) -> None:
    before = content(two.folder)
    with mounts.read_only(two.folder):
        with pytest.raises(UserError, match="read-only"):
            save(two, 30)
        assert resumed_value(two)[0] == 20.0
    assert content(two.folder) == before


def test_a_damaged_checkpoint_that_a_read_only_disk_keeps_in_its_place_is_an_error(two: Checkpoints) -> None:
    (two.folder / "step_00000020" / "counters.json").unlink()
    with mounts.read_only(two.folder), pytest.raises(UserError, match="quarantine.*: .* is read-only"):
        resumed_value(two)


class Part(StateOnly):
    """A state among several, which a disk may refuse."""

    def __init__(self, value: float, refusal: Exception | None = None) -> None:
        super().__init__(value)
        self.refusal, self.saved = refusal, 0

    def save(self, folder: Path, open_file: Open) -> None:
        self.saved += 1
        if self.refusal is not None:
            raise self.refusal
        super().save(folder, open_file)


def test_when_a_state_is_refused_the_others_are_saved_all_the_same_and_the_first_refusal_is_told(
    two: Checkpoints,
) -> None:
    """The collectives of the later ones would otherwise leave ranks waiting whose disk refused nothing."""
    before = content(two.folder)
    full, denied = OSError(errno.ENOSPC, "full"), OSError(errno.EACCES, "denied")
    parts = [Part(1.0), Part(2.0, full), Part(3.0, denied), Part(4.0)]
    with pytest.raises(UserError, match="the disk is full"):
        two.save(30, StatefulGroup(a=parts[0], b=parts[1], c=parts[2], d=parts[3]), {}, best_step=None)
    assert [part.saved for part in parts] == [1, 1, 1, 1]
    assert content(two.folder) == before and not list(two.folder.glob("*.tmp"))


@pytest.mark.parametrize(("ranks", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_a_disk_that_refuses_the_second_engine_leaves_nothing_half_and_no_rank_waiting(
    tmp_path: Path, ranks: int, victim: int
) -> None:
    runs(saved_engines.refused, ranks, tmp_path, str(tmp_path / "refused"), victim)
