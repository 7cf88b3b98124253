"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.runtime.distributed import World
from common.training.checkpoint import Checkpoints
from common.training_config import TrainConfig
from tests.common.training.checkpoints import StateOnly, content, resumed_value, save, world_of


class Gate:
    """Holds back every file's writing, or lets it fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened, self.failure, write = threading.Event(), 0, os.fsync
        patch.setattr(os, "fsync", self._wait)
        self._fsync = write

    def _wait(self, descriptor: int) -> None:
        if threading.current_thread() is threading.main_thread():
            return self._fsync(descriptor)
        assert self.opened.wait(30)
        if self.failure:
            raise OSError(self.failure, os.strerror(self.failure))
        return None


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def background(folder: Path, world: World | None = None) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", keep=2, world=world or world_of(), background=True)


def wait_until_written(checkpoints: Checkpoints) -> None:
    assert checkpoints._pending is not None
    checkpoints._pending.records.exception(30)


def test_what_is_committed_is_the_state_of_the_save_though_training_went_on(
    tmp_path: Path, gate: Gate
) -> None:
    checkpoints, state = background(tmp_path), StateOnly(1.0)
    checkpoints.save(10, state, {"step": 10}, best_step=None)
    assert not checkpoints.is_written and checkpoints.steps() == []
    state.value = 2.0
    gate.opened.set()
    wait_until_written(checkpoints)
    assert checkpoints.is_written and checkpoints.steps() == []  # until all ranks commit it
    checkpoints.finish()
    assert not checkpoints.is_written and checkpoints.steps() == [10]
    assert resumed_value(checkpoints)[0] == 1.0
    checkpoints.finish()  # nothing is left to do


def test_files_and_manifest_are_those_of_a_save_that_waits(tmp_path: Path) -> None:
    waiting = Checkpoints(tmp_path / "waiting", keep=2, world=world_of())
    checkpoints = background(tmp_path)
    for step, numbers in ((10, 100), (20, 5000), (30, 100)):  # memory that was larger before
        save(waiting, step, numbers=numbers)
        save(checkpoints, step, numbers=numbers)
    checkpoints.finish()
    assert content(waiting.folder) == content(checkpoints.folder)


def test_the_next_save_waits_for_the_last_and_uses_its_memory_again(tmp_path: Path, gate: Gate) -> None:
    checkpoints = background(tmp_path)
    save(checkpoints, 10)
    threading.Timer(0.2, gate.opened.set).start()
    assert checkpoints._buffers is not None
    before = dict(checkpoints._buffers)
    save(checkpoints, 20)
    assert checkpoints.steps() == [10] and checkpoints._buffers == before and len(before) == 3
    checkpoints.finish()
    assert sorted(checkpoints.steps()) == [10, 20]


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "does not work")]
)
def test_a_disk_that_refuses_meanwhile_is_an_error_of_the_next_meeting_and_costs_nothing_saved(
    tmp_path: Path, gate: Gate, number: int, said: str
) -> None:
    checkpoints = background(tmp_path)
    gate.opened.set()
    save(checkpoints, 10)
    checkpoints.finish()
    before, gate.failure = content(tmp_path), number
    save(checkpoints, 20)
    wait_until_written(checkpoints)
    with pytest.raises(UserError, match=f"cannot write .*step_00000020.tmp: .*{said}"):
        checkpoints.finish()
    assert content(tmp_path) == before and not list(checkpoints.folder.glob("*.tmp"))
    gate.failure = 0
    save(checkpoints, 20)
    checkpoints.finish()
    assert resumed_value(checkpoints)[0] == 20.0


def test_a_process_that_ends_meanwhile_leaves_what_was_committed(tmp_path: Path, gate: Gate) -> None:
    checkpoints = background(tmp_path)
    save(checkpoints, 10)
    gate.opened.set()
    checkpoints.finish()
    gate.opened.clear()
    save(checkpoints, 20)
    value, resumed = resumed_value(Checkpoints(checkpoints.folder, keep=2, world=world_of()))
    assert value == 10.0 and resumed.set_aside == ()


def test_what_all_ranks_had_written_when_they_ended_is_committed_by_the_next_start(tmp_path: Path) -> None:
    whole, ended = Checkpoints(tmp_path / "whole", keep=2, world=world_of()), background(tmp_path)
    for checkpoints in (whole, ended):
        save(checkpoints, 10)
        save(checkpoints, 20)
    ended.settle(30)  # and no `finish`
    value, resumed = resumed_value(Checkpoints(ended.folder, keep=2, world=world_of()))
    assert value == 20.0 and resumed.counters == {"step": 20}
    assert content(ended.folder) == content(whole.folder)


def test_what_one_of_two_ranks_had_not_written_is_removed(tmp_path: Path) -> None:
    ended = background(tmp_path)
    save(ended, 10)
    save(ended, 20)
    ended.settle(30)
    written = ended.folder / "step_00000020.tmp" / "written.0.json"
    of_two = json.loads(written.read_text())
    of_two["details"]["world_size"] = 2
    written.write_text(json.dumps(of_two))
    assert resumed_value(Checkpoints(ended.folder, keep=2, world=world_of()))[0] == 10.0
    assert [path.name for path in ended.folder.iterdir()] == ["step_00000010"]


@pytest.mark.parametrize(
    "written", ["{}", '{"details": 1}', '{"details": {"world_size": 1}, "files": 1}', "["]
)
def test_a_record_of_nonsense_commits_nothing(tmp_path: Path, written: str) -> None:
    ended = background(tmp_path)
    save(ended, 10)
    save(ended, 20)
    ended.settle(30)
    (ended.folder / "step_00000020.tmp" / "written.0.json").write_text(written)
    assert resumed_value(Checkpoints(ended.folder, keep=2, world=world_of()))[0] == 10.0
    assert [path.name for path in ended.folder.iterdir()] == ["step_00000010"]


def test_what_was_damaged_between_two_starts_is_removed(tmp_path: Path) -> None:
    ended = background(tmp_path)
    save(ended, 10)
    save(ended, 20)
    ended.settle(30)
    (ended.folder / "step_00000020.tmp" / "counters.json").unlink()
    assert resumed_value(Checkpoints(ended.folder, keep=2, world=world_of()))[0] == 10.0
    assert [path.name for path in ended.folder.iterdir()] == ["step_00000010"]


def test_the_end_waits_for_its_own_writing_and_not_for_ever(tmp_path: Path, gate: Gate) -> None:
    ended = background(tmp_path)
    save(ended, 10)
    ended.settle(0.01)
    assert not ended.is_written
    gate.opened.set()
    ended.settle(30)
    assert ended.is_written


def test_a_run_on_a_gpu_saves_beside_training_and_the_setting_decides_elsewhere(tmp_path: Path) -> None:
    import torch

    from common.training.session import Session

    for device, asked, expected in (
        ("cuda", None, True), ("cpu", None, False), ("cpu", True, True), ("cuda", False, False),
    ):  # fmt: skip
        session: Any = Session.__new__(Session)
        session.world, session.folder = World(0, 1, 0, torch.device(device)), tmp_path
        session.train_config = TrainConfig(async_save=asked)
        session._base_revision = None
        assert (session.checkpoints._buffers is not None) is expected
