"""Rank, device, seeds, small collectives and the stop signal. Knows nothing of training.

Runs under torchrun's environment contract (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
Small host-side values travel over gloo, so that a collective never waits for the GPU's queue.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import time
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


@dataclass(frozen=True)
class World:
    """This process among all ranks."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        """Rank 0 writes the files that all ranks share."""
        return self.rank == 0


def init_world() -> World:
    """Join the process group named by the environment; a lone process is a world of one.

    Several ranks exchange heartbeats from here on (`heartbeat.py`). UserError when RLHF_FAULT or a limit
    cannot be parsed.
    """
    global _heartbeat
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
    phases.enter("start")
    return World(rank, size, local_rank, device)


def _limit_every_group(timeout: timedelta) -> None:
    """Also those that others make without naming a timeout: DeepSpeed's would wait for torch's own."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


def close_world() -> None:
    global _heartbeat
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


def broadcast_from_rank0(world: World, make: Callable[[], T]) -> T:
    """Run `make` on rank 0 and broadcast its result; what `_made` catches there is raised on every rank."""
    made: list[Any] = all_gather_or_raise(make if world.is_rank0 else lambda: None)
    return made[0]


def all_gather_or_raise(make: Callable[[], T]) -> list[T]:
    """Run `make` on every rank and all-gather the results; what `_made` catches on one is raised on all."""
    gathered = all_gather_objects(_made(make))
    for value in gathered:
        if isinstance(value, UserError):
            raise value
    return gathered


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
