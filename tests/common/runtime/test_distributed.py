"""One rank; what several do together is tested by the recipes and by the gradient grid."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.runtime import distributed
from tests import forked


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts the signal handlers back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_what_is_drawn_is_a_function_of_the_whole_key() -> None:
    seen = {}
    for key in ((3, 0, 0), (3, 0, 1), (3, 1, 0), (4, 0, 0)):
        distributed.seed_everything(*key)
        seen[key] = draws()
    for generator in range(3):
        assert len({values[generator] for values in seen.values()}) == len(seen)
    draws()
    distributed.seed_everything(3, 0, 1)
    assert draws() == seen[3, 0, 1]


def test_a_lone_process_is_a_world_of_one_without_any_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    try:
        world = distributed.init_world()
        assert (world.rank, world.size, world.local_rank, world.is_rank0) == (0, 1, 0, True)
        assert torch.distributed.get_world_size() == 1
        assert distributed.init_world() == world
        distributed.barrier()
    finally:
        distributed.close_world()
    assert not torch.distributed.is_initialized()
    distributed.close_world()


def test_the_others_wait_for_rank_0_outside_of_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    store, passed = torch.distributed.HashStore(), []
    rank_0, rank_1 = (distributed.World(rank, 2, 0, torch.device("cpu")) for rank in (0, 1))

    def nap(seconds: float) -> None:
        passed.append("nap")
        if len(passed) == 3:
            distributed.wait_for_rank0(rank_0, "export")

    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "barrier", lambda: passed.append("collective"))
    monkeypatch.setattr(time, "sleep", nap)
    distributed.wait_for_rank0(rank_1, "export")
    assert passed == [*["nap"] * 3, *["collective"] * 2]
    distributed.wait_for_rank0(distributed.World(0, 1, 0, torch.device("cpu")), "export")
    assert len(passed) == 5


def test_sums_are_made_in_double_precision_and_leave_their_input_alone() -> None:
    values = torch.tensor([2.0**24, 1.0])
    (large, one) = distributed.all_reduce_sum(values)
    assert large + one == 2.0**24 + 1 and torch.equal(values, torch.tensor([2.0**24, 1.0]))
    assert distributed.all_reduce_sum([True, 3]) == [1.0, 3.0]


def test_a_lone_process_gathers_its_own_value() -> None:
    assert distributed.all_gather_objects({"a": 1}) == [{"a": 1}]


LARGE = np.arange(300_000).reshape(2, -1)
"""2.4 MB"""


def count_bytes(handed: list[int]) -> None:
    """Note the bytes of each tensor that is handed to a collective."""

    def counted(collective: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            handed.extend(value.nbytes for value in arguments if isinstance(value, torch.Tensor))
            return collective(*arguments, **more)

        return call

    for name in ("broadcast", "all_gather_into_tensor", "all_gather", "all_reduce"):
        setattr(torch.distributed, name, counted(getattr(torch.distributed, name)))


def several_ranks() -> int:
    world, handed = distributed.init_world(), list[int]()
    count_bytes(handed)
    locked = LARGE.view()
    locked.flags.writeable = False
    said = distributed.broadcast_from_rank0(world, lambda: {"all": locked, "words": ["é"], "none": LARGE[:0]})
    assert np.array_equal(said["all"], LARGE) and said["words"] == ["é"] and not said["none"].size
    # once, however many ranks there are: with an all-gather it was once for each of them
    assert LARGE.nbytes <= sum(handed) < LARGE.nbytes + 1000, handed
    assert distributed.broadcast_from_rank0(world, lambda: None) is None

    with pytest.raises(UserError, match="no such rank: 0"):
        distributed.broadcast_from_rank0(world, lambda: refuse(world.rank))

    handed.clear()
    own = [LARGE.T[: world.rank], np.full(world.rank % 2, world.rank, np.float32)]
    for rank, (rows, numbers) in enumerate(distributed.all_gather_arrays(own)):
        assert np.array_equal(rows, LARGE.T[:rank]) and rows.dtype == LARGE.dtype
        assert numbers.tolist() == [rank] * (rank % 2) and numbers.dtype == np.float32
    largest = max(rank * 16 + rank % 2 * 8 for rank in range(world.size))  # in words of 8 bytes
    assert sum(handed) == (1 + world.size) * (largest + 2 * 8)  # two counts of 8 bytes
    shares = distributed.all_gather_arrays([LARGE[:0]])
    assert [part.shape for share in shares for part in share] == [(0, 150_000)] * world.size

    shares = distributed.all_gather_arrays_or_raise(lambda: [np.full(2, world.rank, np.float64)])
    assert [share[0].tolist() for share in shares] == [[rank] * 2 for rank in range(world.size)]
    with pytest.raises(UserError, match="no such rank: 2"):
        distributed.all_gather_arrays_or_raise(lambda: [] if world.rank < 2 else refuse(world.rank))
    distributed.close_world()
    return 0


def refuse(rank: int) -> NoReturn:
    raise UserError(f"no such rank: {rank}")


def test_a_rank_needs_room_once_for_what_rank_0_says_and_once_for_each_share(tmp_path: Path) -> None:
    forked.run(several_ranks, (), 3, tmp_path / "output.txt")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_deferred_sets_a_flag_and_before_that_ends_the_process(
    handlers: None, number: signal.Signals
) -> None:
    stop = distributed.StopSignal()
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), number)
    assert ended.value.code == 143
    stop.received, stop.deferred = False, True
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert stop.received


def test_numbers_come_to_the_host_as_they_are_whatever_they_are() -> None:
    found = distributed.on_host([torch.tensor(0.1), 0.1, torch.tensor(2**53 - 1), 3, torch.tensor(True)])
    assert found == [float(torch.tensor(0.1)), 0.1, 2.0**53 - 1, 3.0, 1.0]
    assert all(type(number) is float for number in found) and distributed.on_host([]) == []
