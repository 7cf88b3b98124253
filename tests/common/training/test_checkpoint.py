"""Checkpoints of a state that writes a few small files, on one rank; then of real engines, on one and two."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common import artifacts
from common.artifacts import MANIFEST, Manifest, read_manifest, write_manifest
from common.errors import UserError
from common.runtime.distributed import init_world
from common.training.checkpoint import Checkpoints, StatefulGroup
from common.training.snapshot import Open
from tests.common.training.checkpoints import (
    FILES,
    StateOnly,
    checkpoints_in,
    content,
    resumed_value,
    save,
)
from tests.common.training.test_engine import runs
from tests.programs import saved_engines


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert resumed_value(checkpoints_in(tmp_path / "none")) == (-1.0, None)


def test_the_newest_checkpoint_is_restored_with_its_counters(two: Checkpoints) -> None:
    value, resumed = resumed_value(two)
    assert value == 20.0
    assert resumed.counters == {"step": 20} and resumed.set_aside == ()
    assert set(content(two.folder / "step_00000020")) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_sets_the_checkpoint_aside_and_uses_the_one_before(
    two: Checkpoints, name: str
) -> None:
    path = two.folder / "step_00000020" / name
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    value, resumed = resumed_value(two)
    assert value == 10.0
    assert len(resumed.set_aside) == 1 and resumed.set_aside[0].startswith("step_00000020: ")
    assert name in resumed.set_aside[0]
    # nothing is deleted: it can still be looked at
    assert content(two.folder / "quarantine" / "step_00000020")[name] == bytes(damaged)
    assert two.steps() == [10]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_sets_the_checkpoint_aside(two: Checkpoints, name: str) -> None:
    (two.folder / "step_00000020" / name).unlink()
    value, resumed = resumed_value(two)
    assert value == 10.0 and "step_00000020" in resumed.set_aside[0]
    assert name in resumed.set_aside[0] or "not finished" in resumed.set_aside[0]


def test_a_truncated_file_is_named_with_both_sizes(two: Checkpoints) -> None:
    path = two.folder / "step_00000020" / "zero" / "weights.pt"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    _, resumed = resumed_value(two)
    assert f"zero/weights.pt: {size - 1} bytes, recorded {size}" in resumed.set_aside[0]


def failing(number: int, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of a path, which fails for the files of that name in the newest checkpoint."""

    def fail(path: Path, *rest: Any, **more: Any) -> Any:
        if path.name == name and "step_00000020" in path.parts:
            raise OSError(number, os.strerror(number))
        return method(path, *rest, **more)

    return fail


def refuse_reading(patch: pytest.MonkeyPatch, number: int, name: str) -> None:
    """Reading the newest checkpoint's files of that name fails."""
    patch.setattr(Path, "read_text", failing(number, name, Path.read_text))
    patch.setattr(artifacts, "file_sha256", failing(number, name, artifacts.file_sha256))


@pytest.mark.parametrize("name", ["weights.pt", MANIFEST])
def test_a_bad_sector_sets_the_checkpoint_aside(
    two: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    refuse_reading(monkeypatch, errno.EIO, name)
    value, resumed = resumed_value(two)
    assert value == 10.0 and re.search(f"{name}:? cannot be read: Input/output error", resumed.set_aside[0])


@pytest.mark.parametrize("name", ["weights.pt", MANIFEST])
def test_a_checkpoint_that_may_not_be_read_is_an_error_and_stays_where_it_is(
    two: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    refuse_reading(monkeypatch, errno.EACCES, name)
    with pytest.raises(UserError, match=f"{name} cannot be read: Permission denied") as caught:
        resumed_value(two)
    assert caught.value.hint == "check its permissions" and sorted(two.steps()) == [10, 20]


def test_checkpoints_of_another_format_are_an_error_and_stay_where_they_are(two: Checkpoints) -> None:
    write_manifest(two.folder / "step_00000020", Manifest("checkpoint", None, {}, format_version=2))
    with pytest.raises(UserError, match="has format version 2; this program reads version 1"):
        resumed_value(two)
    assert sorted(two.steps()) == [10, 20]


def test_when_all_are_broken_the_error_names_them_and_nothing_is_deleted(two: Checkpoints) -> None:
    for step in (10, 20):
        (two.folder / f"step_000000{step}" / "zero" / "weights.pt").write_bytes(b"nothing")
    before = content(two.folder)
    with pytest.raises(UserError, match="no checkpoint .* can be verified") as caught:
        resumed_value(two)
    assert "step_00000010" in caught.value.message and "step_00000020" in caught.value.message
    assert "quarantine" in str(caught.value.hint)
    assert content(two.folder / "quarantine") == before


def test_a_second_broken_checkpoint_of_the_same_step_does_not_overwrite_the_first(two: Checkpoints) -> None:
    for text in (b"first", b"second"):
        (two.folder / "step_00000020" / "zero" / "weights.pt").write_bytes(text)
        resumed_value(two)
        save(two, 20)
    kept = two.folder / "quarantine"
    assert (kept / "step_00000020" / "zero" / "weights.pt").read_bytes() == b"first"
    assert (kept / "step_00000020-2" / "zero" / "weights.pt").read_bytes() == b"second"


def test_a_resharded_state_is_said_once(two: Checkpoints) -> None:
    class Divided(StateOnly):
        def load(self, folder: Path) -> str:
            super().load(folder)
            return "2 ranks -> 3 ranks"

    kept = content(two.folder)
    engine: Any = Divided(-1.0)
    resumed = checkpoints_in(two.folder, size=3).resume(engine)
    assert resumed is not None and resumed.resharded == "2 ranks -> 3 ranks"
    assert engine.value == 20.0 and content(two.folder) == kept
    assert resumed_value(two)[1].resharded is None
    save_states(two, 30)
    both = StatefulGroup(actor=engine, critic=Divided(-1.0), plain=StateOnly(-1.0))
    assert two.resume(both).resharded == "2 ranks -> 3 ranks"


def save_states(checkpoints: Checkpoints, step: int) -> None:
    names = ("actor", "critic", "plain")
    state = StatefulGroup(**{name: StateOnly(step * 1.0) for name in names})
    checkpoints.save(step, state, {"step": step}, best_step=None)


@pytest.mark.parametrize(
    ("best", "kept"), [(None, [40, 50]), (10, [10, 40, 50]), (50, [40, 50])], ids=["none", "old", "new"]
)
def test_retention_keeps_the_newest_and_the_best(tmp_path: Path, best: int | None, kept: list[int]) -> None:
    checkpoints = checkpoints_in(tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30, 40, 50):
        save(checkpoints, step, best if best is not None and step >= best else None)
    assert sorted(checkpoints.steps()) == kept
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [f"step_{s:08d}" for s in kept]


def test_a_checkpoint_that_is_there_is_not_written_again(two: Checkpoints) -> None:
    before = content(two.folder)
    two.save(20, StateOnly(99.0), {"step": 99}, best_step=None)  # type: ignore[arg-type]
    assert content(two.folder) == before


def test_nothing_is_deleted_before_the_next_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoints_in(tmp_path / "checkpoints", keep=1)
    save(checkpoints, 10)
    seen: list[list[int]] = []

    def look(self: StateOnly, folder: Path, open_file: Open) -> None:
        seen.append(checkpoints.steps())
        raise KeyboardInterrupt  # the process ends in the middle of writing

    monkeypatch.setattr(StateOnly, "save", look)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 20)
    monkeypatch.undo()
    assert seen == [[10]] and resumed_value(checkpoints)[0] == 10.0


def test_what_was_left_unfinished_is_removed(two: Checkpoints) -> None:
    for step in (20, 25):
        (two.folder / f"step_{step:08d}.tmp" / "zero").mkdir(parents=True)
    assert resumed_value(two)[0] == 20.0
    assert [path.name for path in two.folder.glob("*.tmp")] == []
    (two.folder / "step_00000025.tmp").mkdir()
    save(two, 30)
    assert sorted(path.name for path in two.folder.iterdir()) == ["step_00000020", "step_00000030"]


def test_an_unfinished_checkpoint_is_never_loaded(two: Checkpoints) -> None:
    (two.folder / "step_00000020").rename(two.folder / "step_00000020.tmp")
    value, resumed = resumed_value(two)
    assert value == 10.0 and resumed.set_aside == ()


class OfTwoRanks:
    """A state of which each rank writes one file."""

    def save(self, folder: Path, open_file: Open) -> None:
        with open_file(folder / f"{os.environ['RANK']}.bin") as file:
            file.write(b"x")

    def load(self, folder: Path) -> None:
        raise NotImplementedError


def on_two_disks(folder: str, background: bool) -> int:
    """A checkpoint of two files, then one of which rank 0 finds one."""
    world = init_world()
    checkpoints = Checkpoints(Path(folder), keep=2, world=world, background=background)
    path = checkpoints.save(1, OfTwoRanks(), {}, best_step=None)
    checkpoints.finish()
    assert set(read_manifest(path).files) == {"0.bin", "1.bin", "counters.json"}
    stat = Path.stat

    def elsewhere(path: Path, **how: Any) -> os.stat_result:
        if path.name == "1.bin":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return stat(path, **how)

    if world.is_rank0:
        Path.stat = elsewhere  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"1\.bin was written, but rank 0 does not find it"):
        checkpoints.save(2, OfTwoRanks(), {}, best_step=None)
        checkpoints.finish()
    assert checkpoints.steps() == [1]
    return 0


@pytest.mark.parametrize("background", [False, True])
def test_every_rank_s_files_are_recorded_and_missed_where_ranks_write_to_different_disks(
    tmp_path: Path, background: bool
) -> None:
    runs(on_two_disks, 2, tmp_path, str(tmp_path / "checkpoints"), background)


def test_the_manifest_names_every_file_and_the_number_of_ranks(two: Checkpoints) -> None:
    manifest = json.loads((two.folder / "step_00000020" / MANIFEST).read_text())
    assert set(manifest["files"]) == set(FILES) - {MANIFEST}
    assert manifest["details"] == {"step": 20, "world_size": 1, "base_revision": None}
    assert manifest["kind"] == "checkpoint"


def test_several_states_are_saved_and_restored_each_under_its_name(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path / "checkpoints")
    path = checkpoints.save(1, StatefulGroup(actor=StateOnly(1.0), critic=StateOnly(2.0)), {}, best_step=None)
    found = {name for name in content(path) if name.endswith("weights.pt")}
    assert found == {"actor/zero/weights.pt", "critic/zero/weights.pt"}
    actor, critic = StateOnly(-1.0), StateOnly(-1.0)
    assert checkpoints.resume(StatefulGroup(actor=actor, critic=critic)) is not None
    assert (actor.value, critic.value) == (1.0, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_two_engines_and_an_average_that_were_resumed_end_with_the_same_bits(
    tmp_path: Path, ranks: int
) -> None:
    from benchmarks.kill_resume import contents

    runs(saved_engines.every_end, ranks, tmp_path, str(tmp_path / "ends"))
    ends = sorted((tmp_path / "ends").iterdir())
    assert len(ends) == 4
    for end in ends:
        whole, stopped = (end / name / "step_00000004" for name in ("whole", "stopped"))
        names = sorted(content(whole))
        assert names == sorted(content(stopped)) and {"actor", "critic", "average"} <= {
            name.partition("/")[0] for name in names
        }
        tensors = 0
        for name in names:
            left, right = contents(whole / name), contents(stopped / name)
            assert left.keys() == right.keys()
            for key, value in left.items():
                if isinstance(value, torch.Tensor):
                    tensors += 1
                    assert torch.equal(value, right[key]), (end.name, name, key)
        assert tensors > 30, "a comparison of nothing would always succeed"
        # the comparison sees a difference where there is one
        earlier = end / "stopped" / "step_00000002"
        name = next(name for name in names if name.endswith(".safetensors"))
        assert (earlier / name).read_bytes() != (whole / name).read_bytes()
