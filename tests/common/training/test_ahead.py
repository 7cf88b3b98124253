from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from common.data.batches import Batches
from common.data.types import Batch
from common.errors import UserError
from common.training.ahead import Ahead
from tests.common.data.test_batches import LENGTHS, Made
from tests.common.data.test_batches import plan as plan_of

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
PLAN = plan_of(micro_batch_size=2)


def some() -> Batches:
    return Batches(Made(LENGTHS), PLAN)


@dataclass
class Watched:
    """Batches that say which thread made them."""

    gate: threading.Event = field(default_factory=threading.Event)
    fails_at: int | None = None
    made: list[tuple[int, str]] = field(default_factory=list)

    def micro_batches(self, step: int) -> list[Any]:
        name = threading.current_thread().name
        if name == "batches":
            self.gate.wait(10)
        self.made.append((step, name))
        if step == self.fails_at:
            raise UserError(f"row {step} is bad", hint="mend it")
        return []

    def epoch_of(self, step: int) -> float:
        return step / 4


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda as far as it is asked here; what is pinned says so."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    def pin(self: torch.Tensor) -> torch.Tensor:
        copied = self.clone()
        copied.pinned_here = True  # type: ignore[attr-defined]
        return copied

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [getattr(batch, name) for name in (
        "input_ids", "position_ids", "cu_seqlens", "trained_positions", "targets", "source_of_target",
        "computed_positions")]  # fmt: skip


def test_batches_made_ahead_are_those_of_their_steps_in_pinned_memory() -> None:
    steps = 3 * some().steps_in_epochs(1.0)
    direct, ahead = some(), Ahead(some(), steps, GPU)
    for step in range(steps):
        made = ahead.take(step)
        ahead.make(step + 1)
        assert made.epoch == direct.epoch_of(step + 1)
        for one, other in zip(made.micro_batches, direct.micro_batches(step), strict=True):
            for mine, theirs in zip(tensors(one), tensors(other), strict=True):
                assert torch.equal(mine, theirs) and mine.pinned_here  # type: ignore[attr-defined]
            assert (one.row_ids, one.max_seqlen) == (other.row_ids, other.max_seqlen)


def test_the_next_step_is_made_meanwhile_and_none_behind_the_last() -> None:
    batches = Watched()
    ahead = Ahead(batches, 2, GPU)  # type: ignore[arg-type]
    ahead.take(0)
    ahead.make(1)
    assert batches.made == [(0, "MainThread")]  # and the thread waits at the gate
    batches.gate.set()
    assert ahead.take(1).epoch == 0.5
    ahead.make(2)
    ahead.settle()
    assert batches.made == [(0, "MainThread"), (1, "batches")]
    assert not any(thread.name == "batches" for thread in threading.enumerate())


def test_an_error_is_raised_in_the_step_that_needs_the_batch() -> None:
    batches = Watched(fails_at=1)
    batches.gate.set()
    ahead = Ahead(batches, 9, GPU)  # type: ignore[arg-type]
    ahead.take(0)
    ahead.make(1)
    ahead.settle()
    with pytest.raises(UserError, match="row 1 is bad") as caught:
        ahead.take(1)
    assert caught.value.hint == "mend it"


def test_who_goes_on_elsewhere_than_was_thought_gets_that_step() -> None:
    batches = Watched()
    batches.gate.set()
    ahead = Ahead(batches, 9, GPU)  # type: ignore[arg-type]
    ahead.make(1)
    assert ahead.take(5).epoch == 1.5
    assert [step for step, _ in batches.made] == [1, 5]


def test_on_the_cpu_no_thread_is_started_and_nothing_is_pinned() -> None:
    ahead = Ahead(some(), 4, CPU)
    before = threading.active_count()
    for step in range(4):
        made = ahead.take(step)
        ahead.make(step + 1)
        assert threading.active_count() == before
        assert not hasattr(made.micro_batches[0].input_ids, "pinned_here")


def test_the_end_waits_only_so_long_for_batches_that_nobody_wants() -> None:
    batches = Watched()
    ahead = Ahead(batches, 9, GPU)  # type: ignore[arg-type]
    ahead.make(1)
    ahead.settle(0.01)
    assert batches.made == []
    batches.gate.set()
    ahead.settle()
