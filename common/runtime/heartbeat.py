"""Heartbeats: detect a rank that hangs, name it and its phase, and end all ranks.

Takes this rank's place in the world and the rendezvous address; returns nothing. Two threads run beside the
training. One exchanges heartbeats through the ranks' store (torch's TCPStore); the other checks that the
store answers. A rank hangs when it has sent no heartbeat for `limits.silent_seconds` (its process is stopped,
or its machine is cut off), or when another rank has waited in one collective for `limits.collective_seconds`
(the rank is in an endless loop, or in another collective). Then every rank writes the stacks of its threads
into its log, one rank prints the diagnosis, and all exit with STALLED_EXIT_CODE: a restart can follow.

Rank 0 monitors all ranks, and all ranks monitor rank 0: the traffic is linear in the number of ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from common import phases
from common.limits import collective_seconds, silent_seconds
from common.redact import shown
from common.runtime.logs import ending, is_first, rank_log

STALLED_EXIT_CODE = 75
"""Exit status of ranks that gave up because one of them hangs (EX_TEMPFAIL: try again)."""
LEFT = -1
"""In place of the number of a heartbeat: the rank's last one, after which it may be silent."""
PROJECT = Path(__file__).resolve().parents[2]
_WAITING_IN = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}")
_PACKAGES = (
    "common", "launch", "pipeline", "evaluation", "step1_sft", "step2_reward", "step2_dpo", "step3_ppo",
    "demo",
)  # fmt: skip
_DIAGNOSIS = "diagnosis"
_LAST_WORDS = 5.0  # seconds that ranks have to write their stacks before the first one leaves
log = logging.getLogger("rlhf.heartbeat")


@dataclass(frozen=True)
class Heartbeat:
    """What a rank tells the others about itself."""

    rank: int
    host: str
    count: int  # of its heartbeats, or LEFT
    doing: str  # in words
    where: str  # the line of this project that it is in
    waiting: float  # seconds in the collective that it is in now; 0 outside of one
    collectives: int  # how many it has begun, over all groups

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Diagnosis:
    """The rank that hangs (None: no single one), and the message about it."""

    rank: int | None
    message: str
    is_silent: bool  # the rank cannot be waited for


class HeartbeatMonitor:
    """The newest heartbeats of other ranks, with their arrival times in monotonic seconds."""

    def __init__(self, silent: float, stalled: float, size: int) -> None:
        """size: the world size; only a monitor of all ranks can tell which one keeps the others waiting."""
        self._silent, self._stalled, self._size = silent, stalled, size
        self._last: dict[int, tuple[Heartbeat, float]] = {}
        self._looked: float | None = None

    def observe(self, heartbeats: Sequence[Heartbeat], now: float) -> Diagnosis | None:
        """Record the heartbeats that arrived by `now`. Returns a diagnosis when a rank hangs."""
        if self._looked is not None and now - self._looked > self._silent / 2:
            self._last.clear()  # it was this process that stood still, perhaps with all others
        self._looked = now
        for heartbeat in heartbeats:
            last = self._last.get(heartbeat.rank)
            self._last[heartbeat.rank] = (
                (heartbeat, now) if last is None or last[0].count != heartbeat.count else (heartbeat, last[1])
            )
        present = [(since, heartbeat) for heartbeat, since in self._last.values() if heartbeat.count != LEFT]
        quiet = [(since, heartbeat) for since, heartbeat in present if now - since > self._silent]
        if quiet:
            since, heartbeat = min(quiet, key=lambda item: item[0])
            return Diagnosis(heartbeat.rank, silence(heartbeat, now - since), is_silent=True)
        if len(self._last) < self._size:
            return None
        return stalled_among([heartbeat for heartbeat, _ in self._last.values()], self._stalled)

    def of(self, rank: int) -> Heartbeat | None:
        last = self._last.get(rank)
        return None if last is None else last[0]


def silence(heartbeat: Heartbeat, seconds: float) -> str:
    """The message about a rank without heartbeats."""
    return (
        f"{heartbeat} has not answered for {seconds:.0f} s; it was in {heartbeat.doing} ({heartbeat.where})"
    )


def stalled_among(heartbeats: Sequence[Heartbeat], limit: float) -> Diagnosis | None:
    """The rank that another one has waited for too long: one outside any collective, else the one behind."""
    waited = max((heartbeat.waiting for heartbeat in heartbeats), default=0.0)
    if waited <= limit:
        return None
    late = min(
        heartbeats, key=lambda heartbeat: (heartbeat.waiting > 0, heartbeat.collectives, heartbeat.waiting)
    )
    seconds = f"{waited:.0f} s (RLHF_COLLECTIVE_SECONDS=... allows more)"
    if late.waiting == 0:
        words = f"{late} has kept the others waiting for {seconds}; it is in {late.doing} ({late.where})"
        return Diagnosis(late.rank, words, is_silent=False)
    most = max(heartbeat.collectives for heartbeat in heartbeats)
    if late.collectives < most:
        words = (
            f"{late} waits in another collective (its number {late.collectives}, not {most}) than the others "
            f"for {seconds}; it is in {late.doing} ({late.where})"
        )
        return Diagnosis(late.rank, words, is_silent=False)
    words = f"all ranks have waited in one collective for {seconds}: what they send does not arrive; "
    return Diagnosis(None, f"{words}{late} is in {late.doing} ({late.where})", is_silent=False)


class HeartbeatThreads:
    """The two threads of a rank: one exchanges heartbeats, the other checks the store."""

    def __init__(self, rank: int, size: int, store: Any, store_name: str) -> None:
        """store: of all ranks, used by nobody else in this process. store_name: who holds it, in words."""
        self._rank, self._size, self._store, self._store_name = rank, size, store, store_name
        self._silent, self._stalled = silent_seconds(), collective_seconds()
        self._interval = min(1.0, self._silent / 10)
        self._host, self._count = socket.gethostname(), 0
        self._main = threading.main_thread().ident
        self._waiting: tuple[int, float] | None = None  # collectives begun, and since when it waits
        self._monitor = HeartbeatMonitor(self._silent, self._stalled, size)
        self._answered = time.monotonic()
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"heartbeat {work.__name__.strip('_')}", daemon=True)
            for work in (self._send_heartbeats, self._guard_the_store)
        ]

    def start(self) -> None:
        """Send the first heartbeat. All ranks must have sent theirs before `go_on`."""
        self._send_heartbeat()
        file = rank_log()
        if file is not None:
            faulthandler.enable(file)  # what kills the process from within leaves its stacks, too

    def go_on(self) -> None:
        """Start the threads: all ranks have sent a heartbeat."""
        self._answered = time.monotonic()
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the threads: from now on nobody takes this rank's silence for a hang."""
        self._over.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=2.0)
        faulthandler.cancel_dump_traceback_later()
        if not self._threads[0].is_alive():  # else it still waits for the store
            with contextlib.suppress(RuntimeError):  # the store left earlier
                self._send_heartbeat(is_last=True)
        atexit.unregister(self.stop)

    def _send_heartbeats(self) -> None:
        others = range(self._size) if self._rank == 0 else (0,)
        while not self._over.wait(self._interval):
            try:
                file = rank_log()
                if file is not None:  # written by a thread of C, if this one gets no turn any more
                    with contextlib.suppress(RuntimeError, ValueError, OSError):  # no thread to be had
                        faulthandler.dump_traceback_later(self._silent, file=file)
                self._send_heartbeat()
                heartbeats = [Heartbeat(**json.loads(text)) for text in self._store.multi_get(_keys(others))]
                diagnosis = self._monitor.observe(heartbeats, time.monotonic())
                if self._store.check([_DIAGNOSIS]):
                    diagnosis = Diagnosis(**json.loads(self._store.get(_DIAGNOSIS)))
                self._answered = time.monotonic()
            except (RuntimeError, ValueError) as error:  # the store went away: the guard counts the seconds
                log.debug("no answer of the store: %s", error)
                continue
            except Exception:  # without heartbeats the others would take this rank for silent
                log.warning("a heartbeat failed", exc_info=True)
                continue
            if diagnosis is not None and not self._over.is_set():
                self._give_up(diagnosis, with_store=True)

    def _guard_the_store(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            if now - looked > self._silent / 2:
                self._answered = now  # this process stood still itself
            looked = now
            if now - self._answered > self._silent and not self._over.is_set():
                self._give_up(self._store_is_gone(now - self._answered), with_store=False)

    def _send_heartbeat(self, *, is_last: bool = False) -> None:
        self._count = LEFT if is_last else self._count + 1
        self._store.set(_keys([self._rank])[0], json.dumps(asdict(self._own())))

    def _own(self) -> Heartbeat:
        frame = sys._current_frames().get(self._main or 0)
        begun = _collectives_begun()
        is_waiting = frame is not None and any(part in frame.f_code.co_filename for part in _WAITING_IN)
        if not is_waiting:
            self._waiting = None
        elif self._waiting is None or self._waiting[0] != begun:
            self._waiting = (begun, time.monotonic())
        waited = 0.0 if self._waiting is None else max(time.monotonic() - self._waiting[1], 1e-3)
        return Heartbeat(
            self._rank, self._host, self._count, str(phases.current()), _place_of(frame), waited, begun
        )

    def _store_is_gone(self, seconds: float) -> Diagnosis:
        first = self._monitor.of(0)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and first is not None:
            return Diagnosis(0, silence(first, seconds), is_silent=True)
        words = f"{self._store_name} has not answered for {seconds:.0f} s: its machine is cut off"
        return Diagnosis(None, words, is_silent=True)

    def _give_up(self, diagnosis: Diagnosis, *, with_store: bool) -> None:
        """Leave the stacks and the reason, wait for the others to do so, and end the process."""
        with ending:
            try:
                _end_within(4 * _LAST_WORDS)
                _bounded(lambda: self._leave_stacks(diagnosis), _LAST_WORDS)
                if with_store:
                    _bounded(lambda: self._agree(diagnosis), 2 * _LAST_WORDS)
                else:
                    _bounded(lambda: self._tell(diagnosis, is_only=is_first(diagnosis.message)), _LAST_WORDS)
            finally:
                os._exit(STALLED_EXIT_CODE)

    def _leave_stacks(self, diagnosis: Diagnosis) -> None:
        file = rank_log()
        if file is not None:
            with contextlib.suppress(OSError):  # a full disk
                print(f"giving up: {diagnosis.message}\nstacks of all threads:", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)

    def _agree(self, diagnosis: Diagnosis) -> None:
        """Tell all ranks; the first to do so prints it. Wait until all that can have left their stacks."""
        if self._store.add("told", 1) == 1:
            self._store.set(_DIAGNOSIS, json.dumps(asdict(diagnosis)))
            self._tell(diagnosis, is_only=True)
        self._store.set(f"dumped/{self._rank}", "")
        end = time.monotonic() + _LAST_WORDS
        silent = diagnosis.rank if diagnosis.is_silent else None
        missing = [f"dumped/{rank}" for rank in range(self._size) if rank != silent]
        while not self._store.check(missing) and time.monotonic() < end:
            time.sleep(0.05)
        if self._rank == 0:
            time.sleep(2 * self._interval)  # it may hold the store

    def _tell(self, diagnosis: Diagnosis, *, is_only: bool) -> None:
        file = rank_log()
        logs = "" if file is None else f"; the stacks of the ranks are in {Path(file.name).parent}"
        if is_only:
            print(f"error: {shown(diagnosis.message)}{logs}", file=sys.stderr, flush=True)
        log.error("%s", diagnosis.message)  # last: it may be its file system that does not answer


def start_heartbeat(rank: int, size: int, timeout: timedelta, meet: Callable[[], object]) -> HeartbeatThreads:
    """Exchange heartbeats with the ranks of torchrun's environment. meet: a barrier over all of them."""
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    threads = HeartbeatThreads(
        rank, size, dist.PrefixStore(f"heartbeat/{attempt}", store), f"the store at {host}:{port}"
    )
    threads.start()
    meet()
    threads.go_on()
    return threads


def _bounded(work: Callable[[], None], seconds: float) -> None:
    """Do it, but do not wait for it any longer."""

    def quietly() -> None:
        try:
            work()
        except (RuntimeError, OSError) as error:
            log.debug("the store went away: %s", error)

    thread = threading.Thread(target=quietly, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads: the alarm is the limit
        return quietly()
    thread.join(seconds)


def _end_within(seconds: float) -> None:
    """Have the kernel end this process then, whichever of its threads keeps the interpreter's lock."""
    ctypes.CDLL(None).signal(signal.SIGALRM, None)  # to the default; Python lets its main thread alone do so
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _keys(ranks: Sequence[int] | range) -> list[str]:
    return [f"rank/{rank}" for rank in ranks]


def _collectives_begun() -> int:
    """Of this process, over all its groups."""
    from torch.distributed import distributed_c10d

    groups: Mapping[Any, Any] = distributed_c10d._world.pg_map
    begun: dict[Any, int] = {}  # by backend: with GPUs a group has two, and itself asks only NCCL
    for group in list(groups):
        for device in group._device_types:
            with contextlib.suppress(RuntimeError):  # a group that has not begun, or one that does not count
                backend = group._get_backend(device)
                begun[backend] = backend._get_sequence_number_for_group()
    return sum(begun.values())


def _place_of(frame: FrameType | None) -> str:
    """The innermost line of this project on a stack."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PROJECT) and path.relative_to(PROJECT).parts[0] in _PACKAGES:
            return f"{path.relative_to(PROJECT)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of this program"
