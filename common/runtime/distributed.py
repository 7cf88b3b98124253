"""Rank, device, seeds, small collectives and the stop signal. Knows nothing of training.

Runs under torchrun's environment contract (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
Small host-side values travel over gloo, so that a collective never waits for the GPU's queue.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from common import phases
from common.errors import UserError
from common.limits import collective_seconds
from common.runtime.heartbeat import HeartbeatThreads, start_heartbeat
from common.runtime.logs import STOPPED_EXIT_CODE

HEARTBEAT_FIRST = 60.0
"""A collective's own timeout comes so many seconds after the heartbeat's, whose message says more."""
T = TypeVar("T")
log = logging.getLogger("rlhf.distributed")
_heartbeat: HeartbeatThreads | None = None
_sequence_group: dist.ProcessGroup | None = None
_node: Node | None = None


@dataclass(frozen=True)
class Node:
    """The ranks of one machine, in their order, as a group of their own. first: of them, which speaks."""

    group: dist.ProcessGroup
    first: int
    size: int

    @property
    def is_first(self) -> bool:
        return dist.get_rank() == self.first

    def broadcast(
        self, make: Callable[[], torch.Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> torch.Tensor:
        """The first rank's tensor, in host memory, on all of them; they know its shape and dtype."""
        whole = make().contiguous() if self.is_first else torch.empty(shape, dtype=dtype)
        dist.broadcast(_as_bytes(whole), self.first, group=self.group)
        return whole

    def scatter(self, make: Callable[[], torch.Tensor], size: int, dtype: torch.dtype) -> torch.Tensor:
        """To each rank its `size` elements of what the first has, [ranks · size] of them at most, end to end;
        0 where it has fewer."""
        own, parts = torch.empty(size, dtype=dtype), None
        if self.is_first:
            made = make().reshape(-1)
            filled = torch.cat([made, made.new_zeros(self.size * size - len(made))])
            parts = [_as_bytes(part) for part in filled.split(size)]
        dist.scatter(_as_bytes(own), parts, self.first, group=self.group)
        return own


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory: gloo does not know every dtype."""
    return tensor.reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class World:
    """This process among all ranks.

    Of the ranks, `sequence_parallel` consecutive ones share each row of data: they are one data rank.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    sequence_parallel: int = 1

    @property
    def is_rank0(self) -> bool:
        """Rank 0 writes the files that all ranks share."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which rows this rank has; those it shares them with have the same number."""
        return self.rank // self.sequence_parallel

    @property
    def data_size(self) -> int:
        return self.size // self.sequence_parallel

    @property
    def sequence_rank(self) -> int:
        """Which slice of its rows this rank has."""
        return self.rank % self.sequence_parallel


def init_world(sequence_parallel: int = 1) -> World:
    """Join the process group named by the environment; a lone process is a world of one.

    Several ranks exchange heartbeats from here on (`heartbeat.py`). sequence_parallel: how many share each
    row, a divisor of their number. UserError when RLHF_FAULT or a limit cannot be parsed.
    """
    global _heartbeat, _sequence_group
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        # spares DeepSpeed, which other libraries import before the engine does, its search and a warning
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    phases.arm_faults(rank)
    if not dist.is_initialized():
        timeout = timedelta(seconds=collective_seconds() + HEARTBEAT_FIRST)
        _limit_every_group(timeout)
        store = dist.HashStore() if size == 1 else None  # a lone process needs no address to meet at
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store)
        if size > 1:
            _heartbeat = start_heartbeat(rank, size, timeout, barrier)
    if sequence_parallel > 1:
        _sequence_group, _ = dist.new_subgroups(sequence_parallel)
    phases.enter("start")
    return World(rank, size, local_rank, device, sequence_parallel)


def sequence_group() -> dist.ProcessGroup:
    """The ranks that have slices of the same rows as this one, in the order of the slices."""
    assert _sequence_group is not None, "launch.sequence_parallel is 1"
    return _sequence_group


def node_of() -> Node | None:
    """The ranks of this machine; None where it has one rank. All ranks call it; the first time they agree."""
    global _node
    if _node is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rank = dist.get_rank()
        own = np.array([rank - int(os.environ.get("LOCAL_RANK", "0"))])
        firsts = [int(first) for (found,) in all_gather_arrays([own]) for first in found]
        machines = [
            [r for r, of_rank in enumerate(firsts) if of_rank == first] for first in sorted(set(firsts))
        ]
        group, _ = dist.new_subgroups_by_enumeration(machines)
        _node = Node(group, firsts[rank], firsts.count(firsts[rank]))
    return None if _node is None or _node.size == 1 else _node


def _limit_every_group(timeout: timedelta) -> None:
    """Also those that others make without naming a timeout: DeepSpeed's would wait for torch's own."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


def close_world() -> None:
    global _heartbeat, _sequence_group, _node
    _sequence_group = _node = None
    if _heartbeat is not None:
        _heartbeat.stop()
        _heartbeat = None
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(*key: int) -> None:
    """Seed python, numpy and torch from all of `key`, for example (seed, step, rank).

    A recipe does this before each step, so what a step draws (dropout) is a pure function of the key: a
    resumed run needs no generator's state, and libraries that draw in between change nothing.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


def all_reduce_sum(values: Sequence[float] | torch.Tensor) -> list[float]:
    """All-reduce: the element-wise sum over all ranks, in float64 on the host."""
    total = torch.as_tensor(values, dtype=torch.float64, device="cpu").clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def on_host(values: Sequence[torch.Tensor | float]) -> list[float]:
    """The numbers in float64; those on a device come in one transfer, for which the host waits once."""
    tensors = [value.detach().double() for value in values if isinstance(value, torch.Tensor)]
    fetched = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(fetched) if isinstance(value, torch.Tensor) else float(value) for value in values]


def all_gather_objects(value: Any) -> list[Any]:
    """All-gather: the values of all ranks, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_gather_arrays(own: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """All-gather: the arrays of all ranks, in rank order, on every rank; nothing is pickled.

    own: as many on every rank, of the same dtypes; their first dimensions may differ, the others may not.
    Travels as bytes, each rank's as many as the largest share has.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [list(own)]
    counts = torch.tensor([len(array) for array in own])
    all_counts = torch.empty(dist.get_world_size() * len(own), dtype=torch.int64)
    dist.all_gather_into_tensor(all_counts, counts)
    rows = all_counts.view(-1, len(own)).tolist()
    widths = [array.dtype.itemsize * int(np.prod(array.shape[1:])) for array in own]
    # each array begins at a multiple of eight bytes, as its numbers have to
    starts = [np.cumsum([0, *(-(-np.multiply(of_rank, widths) // 8) * 8)]) for of_rank in rows]
    share = np.zeros(max(start[-1] for start in starts), np.uint8)
    for array, start in zip(own, starts[dist.get_rank()], strict=False):
        share[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
    shares = torch.empty(len(rows), len(share), dtype=torch.uint8)
    dist.all_gather_into_tensor(shares.view(-1), torch.from_numpy(share))
    return [
        [
            found[first : first + count * width].view(array.dtype).reshape(count, *array.shape[1:])
            for array, first, count, width in zip(own, start[:-1], of_rank, widths, strict=True)
        ]
        for found, start, of_rank in zip(shares.numpy(), starts, rows, strict=True)
    ]


def all_gather_arrays_or_raise(make: Callable[[], Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
    """`all_gather_arrays` of what `make` returns; what `_made` catches on one rank is raised on all."""
    return all_gather_arrays(make_or_raise(make))


def broadcast_from_rank0(world: World, make: Callable[[], T]) -> T:
    """Run `make` on rank 0 and broadcast its result; what `_made` catches there is raised on every rank.

    Rank 0 does not wait for the others to have it, unless it raises: then all have heard why.
    """
    value: Any = _made(make) if world.is_rank0 else None
    if dist.is_initialized() and world.size > 1:
        value = _broadcast(world, value)
    if isinstance(value, UserError):
        barrier()
        raise value
    return value


def _broadcast(world: World, value: Any) -> Any:
    """Rank 0's value, pickled but for its arrays, which travel as they lie in memory: a rank needs room for
    the value once, however many ranks there are."""
    parts: list[torch.Tensor] = []
    if world.is_rank0:
        arrays: list[Any] = []
        pickled = bytearray(pickle.dumps(value, protocol=5, buffer_callback=arrays.append))
        parts = [_bytes_of(buffer) for buffer in (pickled, *(array.raw() for array in arrays))]
    count = torch.tensor([len(parts)])
    dist.broadcast(count, 0)
    sizes = torch.tensor([len(part) for part in parts] or [0] * int(count))
    dist.broadcast(sizes, 0)
    parts = parts or [torch.empty(size, dtype=torch.uint8) for size in sizes.tolist()]
    for part in parts:
        dist.broadcast(part, 0)
    if world.is_rank0:
        return value
    said, *found = (part.numpy().data for part in parts)
    return pickle.loads(said, buffers=found)  # noqa: S301 - ranks of a run trust each other


def _bytes_of(buffer: bytearray | memoryview) -> torch.Tensor:
    """uint8 [N], without a copy; it is only read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an array that may not be written
        return torch.from_numpy(np.frombuffer(buffer, np.uint8))


def make_or_raise(make: Callable[[], T]) -> T:
    """Run `make` on every rank, for its result here; what `_made` catches on one is raised on all.

    Ranks exchange one number, and only where there is an error more than that.
    """
    made = _made(make)
    (failed,) = all_reduce_sum([isinstance(made, UserError)])
    if failed:
        told = all_gather_objects(made if isinstance(made, UserError) else None)
        raise next(error for error in told if error is not None)
    assert not isinstance(made, UserError)
    return made


def all_gather_or_raise(make: Callable[[], T]) -> list[T]:
    """Run `make` on every rank and all-gather the results, pickled; what `_made` catches on one is raised on
    all."""
    return all_gather_objects(make_or_raise(make))


def _made(make: Callable[[], T]) -> T | UserError:
    """What `make` returns; else what all ranks are to hear: a UserError, or what the system refused here."""
    try:
        return make()
    except UserError as error:
        return error
    except OSError as error:
        log.warning("this rank ends all others", exc_info=True)
        rank = os.environ.get("RANK", "0")
        return UserError(f"rank {rank}: {error}", hint=f"where it met that is in logs/rank_{rank}.log")


def barrier() -> None:
    all_reduce_sum([0.0])


def wait_for_rank0(world: World, name: str) -> None:
    """Wait for all ranks; for rank 0, which works alone, however long it takes. name: used once in a run.

    In a collective the others would give it up after `collective_seconds()`; here the watch does, when it is
    silent.
    """
    if world.size == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    if world.is_rank0:
        store.set(name, "")
    while not store.check([name]):
        time.sleep(0.2)
    barrier()  # rank 0 may hold the store: it leaves after all have looked


def from_first_of_machine(world: World, name: str, make: Callable[[], str]) -> str:
    """What `make` returns on the first rank of this machine; its others wait for that, however long it takes.

    name: used once in a run. In a collective the others would give it up after `collective_seconds()`; here
    the watch does, when it is silent, and where it fails, its machine's agent ends them.
    """
    if world.size == 1:
        return make()
    store = dist.distributed_c10d._get_default_store()
    told = f"{name} on the machine of rank {world.rank - world.local_rank}"
    if world.local_rank == 0:
        made = make()
        store.set(told, made)
        return made
    while not store.check([told]):
        time.sleep(0.2)
    return bytes(store.get(told)).decode()


class StopSignal:
    """SIGTERM and SIGUSR1: leave at once where nothing can be lost, else set a flag.

    While `deferred`, the recipe looks at `received` and agrees on it with all ranks once per step.
    """

    def __init__(self) -> None:
        self.received = False
        self.deferred = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = True
        if not self.deferred:
            raise SystemExit(STOPPED_EXIT_CODE)
