from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.runtime.distributed import World
from common.training.checkpoint import Checkpoints
from common.training.session import SaveClock, Session, restore


def save_clock(rank: int, minutes: float) -> tuple[SaveClock, list[float]]:
    """A clock of a rank, and the time it shows, in seconds."""
    seconds = [1000.0]
    return SaveClock(minutes, World(rank, 2, rank, torch.device("cpu")), now=lambda: seconds[-1]), seconds


def test_a_save_is_due_when_so_many_minutes_went_by_without_one() -> None:
    clock, seconds = save_clock(0, 1.5)
    assert not clock.asks
    seconds.append(1089.9)
    assert not clock.asks
    seconds.append(1090.0)
    assert clock.asks and clock.asks  # until there is one
    clock.restart()
    assert not clock.asks
    seconds.append(1180.0)
    assert clock.asks


def test_only_the_first_rank_s_clock_counts_and_zero_minutes_mean_never() -> None:
    for rank, minutes in ((1, 1.0), (0, 0.0)):
        clock, seconds = save_clock(rank, minutes)
        seconds.append(1e9)
        assert not clock.asks


def test_all_ranks_end_where_the_steps_folder_was_removed_and_it_is_not_made_again(tmp_path: Path) -> None:
    session = Session.__new__(Session)
    session.world, session.folder = World(0, 1, 0, torch.device("cpu")), tmp_path / "runs" / "a" / "sft"
    flags: Any = (SimpleNamespace(received=False), SimpleNamespace(asks=True))
    session.stop, session.save_clock = flags
    session.checkpoints = SimpleNamespace(is_written=False)  # type: ignore[misc, assignment]
    session.folder.mkdir(parents=True)
    assert session.all_reduce([2.0, 0.5]) == ([2.0, 0.5], False, True)
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(UserError, match=f"{session.folder} was removed while the step was running"):
        session.all_reduce([2.0])
    checkpoints = Checkpoints(session.folder / "checkpoints", keep=2, world=session.world)
    with pytest.raises(UserError, match=f"the folder {session.folder} is gone"):
        checkpoints.save(1, Nothing(), {}, best_step=None)
    assert list(tmp_path.iterdir()) == []


class Nothing:
    """A state that is never asked for."""

    save = load = None


def test_checkpoints_that_are_gone_are_missed_aloud_and_a_first_start_is_not(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, world=World(0, 1, 0, torch.device("cpu")))
    said: list[str] = []
    assert restore(checkpoints, Nothing(), said.append) == {} and said == []  # type: ignore[arg-type]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert restore(checkpoints, Nothing(), said.append) == {}  # type: ignore[arg-type]
    assert said == [
        f"there is no checkpoint in {tmp_path / 'checkpoints'}: beginning again with the first step"
    ]


def test_a_number_that_looks_wrong_is_shown_and_told() -> None:
    session, shown, told = Session.__new__(Session), list[str](), list[str]()
    session.progress = SimpleNamespace(log=shown.append)  # type: ignore[assignment]
    session.tracker = SimpleNamespace(alert=told.append)  # type: ignore[assignment]
    session.warn("warning: the KL is 61")
    assert (shown, told) == (["warning: the KL is 61"], ["the KL is 61"])
