"""Who is to blame, as told from what ranks say of themselves. Ranks that do hang: tests/faults."""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import signal
import sys
import threading
import tomllib
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from common import limits
from common.errors import UserError
from common.runtime import distributed, heartbeat
from common.runtime.heartbeat import Diagnosis, Heartbeat, HeartbeatMonitor, stalled_among

ROOT = Path(__file__).resolve().parents[3]


def a_heartbeat(rank: int, count: int = 1, *, waiting: float = 0.0, collectives: int = 7) -> Heartbeat:
    return Heartbeat(
        rank, f"node{rank}", count, "step 4, training", "train.py:1 in train", waiting, collectives
    )


def test_a_rank_that_does_not_beat_is_blamed_after_the_limit_and_not_before() -> None:
    monitor = HeartbeatMonitor(silent=10.0, stalled=100.0, size=3)
    for second in range(11):
        assert (
            monitor.observe(
                [a_heartbeat(0, second), a_heartbeat(1, 5), a_heartbeat(2, second)], 50.0 + second
            )
            is None
        )
    diagnosis = monitor.observe([a_heartbeat(0, 11), a_heartbeat(1, 5), a_heartbeat(2, 11)], 61.0)
    assert diagnosis is not None and (diagnosis.rank, diagnosis.is_silent) == (1, True)
    assert diagnosis.message == (
        "rank 1 on node1 has not answered for 11 s; it was in step 4, training (train.py:1 in train)"
    )


def test_of_several_silent_ranks_the_first_to_fall_silent_is_blamed() -> None:
    monitor = HeartbeatMonitor(silent=3.0, stalled=100.0, size=3)
    for second in range(8):
        counts = (second, min(second, 4), min(second, 2))
        diagnosis = monitor.observe(
            [a_heartbeat(rank, count) for rank, count in enumerate(counts)], float(second)
        )
        if second < 6:
            assert diagnosis is None
            continue
        assert diagnosis is not None and diagnosis.rank == 2
        break


def test_a_process_that_stood_still_itself_blames_nobody_for_the_time() -> None:
    monitor = HeartbeatMonitor(silent=10.0, stalled=100.0, size=2)
    assert monitor.observe([a_heartbeat(0, 1), a_heartbeat(1, 1)], 0.0) is None
    assert (
        monitor.observe([a_heartbeat(0, 1), a_heartbeat(1, 1)], 3600.0) is None
    )  # a suspended job, or a laptop that slept
    assert monitor.observe([a_heartbeat(0, 2), a_heartbeat(1, 1)], 3604.0) is None
    assert monitor.observe([a_heartbeat(0, 3), a_heartbeat(1, 1)], 3608.0) is None
    diagnosis = monitor.observe([a_heartbeat(0, 4), a_heartbeat(1, 1)], 3612.0)
    assert diagnosis is not None and diagnosis.rank == 1


def test_a_rank_that_left_may_be_silent_and_the_others_go_on_to_watch_each_other() -> None:
    monitor = HeartbeatMonitor(silent=10.0, stalled=100.0, size=3)
    for second in range(30):
        assert (
            monitor.observe(
                [a_heartbeat(0, second), a_heartbeat(1, heartbeat.LEFT), a_heartbeat(2, second)],
                float(second),
            )
            is None
        )
    diagnosis = monitor.observe(
        [
            a_heartbeat(0, 30, waiting=101.0),
            a_heartbeat(1, heartbeat.LEFT, waiting=101.0),
            a_heartbeat(2, 30),
        ],
        30.0,
    )
    assert diagnosis is not None and diagnosis.rank == 2


def test_a_rank_that_ends_says_so_after_the_heartbeat_that_is_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    class UnderWay:
        def is_alive(self) -> bool:
            return not events

        def join(self, timeout: float) -> None:
            rank_1._send_heartbeat()
            events.append("ended")

    store = dist.HashStore()
    rank_1 = heartbeat.HeartbeatThreads(1, 2, store, "the store")
    rank_1._threads = [UnderWay()]  # type: ignore[list-item]
    monkeypatch.setattr(
        heartbeat.faulthandler, "cancel_dump_traceback_later", lambda: events.append("disarmed")
    )
    rank_1.stop()
    assert events == ["ended", "disarmed"]
    assert json.loads(store.get("rank/1"))["count"] == heartbeat.LEFT


def test_collectives_of_all_backends_of_a_group_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With GPUs a group asks its default backend only, and small values travel over the other one."""

    class Backend:
        def __init__(self, begun: int | None) -> None:
            self.begun = begun

        def _get_sequence_number_for_group(self) -> int:
            if self.begun is None:
                raise RuntimeError("not begun")
            return self.begun

    class Group:
        def __init__(self, **backends: Backend) -> None:
            self._device_types, self._get_backend = [*backends], backends.__getitem__

    gloo = Backend(2)
    groups = {
        Group(cpu=Backend(5), cuda=Backend(30)): 0,
        Group(cpu=gloo, cuda=gloo): 1,
        Group(cpu=Backend(None)): 2,
    }
    monkeypatch.setattr(distributed_c10d, "_world", SimpleNamespace(pg_map=groups))
    assert heartbeat._collectives_begun() == 5 + 30 + 2


@pytest.mark.parametrize("home", ["checkout", "lib/python3.11/site-packages"])
def test_the_line_of_this_project_is_found_wherever_it_is_installed(
    home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Path("/") / home

    def frame_in(file: str, name: str, body: str) -> Any:
        scope: dict[str, Any] = {"sys": sys}
        text = f"def {name}(inner=None):\n    return {body}"
        exec(compile(text, str(project / file), "exec"), scope)  # noqa: S102 - a function of another file
        return scope[name]

    library = frame_in("torch/nn.py", "forward", "sys._getframe()")
    ours = frame_in("common/training/engine.py", "step", "inner()")
    monkeypatch.setattr(heartbeat, "PROJECT", project)
    assert heartbeat._place_of(ours(library)) == "common/training/engine.py:2 in step"
    assert heartbeat._place_of(None) == "outside of this program"


def test_every_package_of_this_project_is_known() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(heartbeat._PACKAGES) == set(pyproject["tool"]["importlinter"]["root_packages"])


def test_who_does_not_wait_keeps_the_others_waiting() -> None:
    waiting = [
        a_heartbeat(0, waiting=31.0),
        a_heartbeat(1, waiting=0.0, collectives=6),
        a_heartbeat(2, waiting=30.0),
    ]
    assert stalled_among(waiting, 31.0) is None
    diagnosis = stalled_among(waiting, 30.5)
    assert diagnosis is not None and (diagnosis.rank, diagnosis.is_silent) == (1, False)
    assert diagnosis.message == (
        "rank 1 on node1 has kept the others waiting for 31 s (RLHF_COLLECTIVE_SECONDS=... allows more); "
        "it is in step 4, training (train.py:1 in train)"
    )


def test_of_ranks_that_all_wait_the_one_that_is_behind_is_blamed() -> None:
    waiting = [a_heartbeat(0, waiting=31.0, collectives=9), a_heartbeat(1, waiting=31.0, collectives=8)]
    diagnosis = stalled_among(waiting, 30.0)
    assert diagnosis is not None and diagnosis.rank == 1
    assert diagnosis.message.startswith(
        "rank 1 on node1 waits in another collective (its number 8, not 9) than the others for 31 s (RLHF_"
    )


def test_when_all_wait_for_the_same_nobody_is_blamed() -> None:
    diagnosis = stalled_among([a_heartbeat(0, waiting=31.0), a_heartbeat(1, waiting=32.0)], 30.0)
    assert diagnosis is not None and diagnosis.rank is None
    assert diagnosis.message.startswith("all ranks have waited in one collective for 32 s")


def test_only_who_hears_all_ranks_tells_who_keeps_them_waiting() -> None:
    late = a_heartbeat(0, waiting=50.0)
    assert HeartbeatMonitor(10.0, 30.0, size=2).observe([late], 0.0) is None
    assert (
        HeartbeatMonitor(10.0, 30.0, size=2).observe([late, replace(late, rank=1, waiting=0.0)], 0.0)
        is not None
    )


@pytest.mark.parametrize("text", ["0", "soon", "-5", "nan", "inf", ""])
def test_a_limit_that_is_no_number_of_seconds_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, limit in (
        ("RLHF_COLLECTIVE_SECONDS", limits.collective_seconds),
        ("RLHF_SILENT_SECONDS", limits.silent_seconds),
    ):
        monkeypatch.setenv(variable, text)
        with pytest.raises(UserError, match=f"{variable}={text} is not allowed"):
            limit()
        monkeypatch.setenv(variable, "12.5")
        assert limit() == 12.5
        monkeypatch.delenv(variable)
    assert (limits.collective_seconds(), limits.silent_seconds()) == (1800, 300)


def test_a_group_that_others_make_has_the_timeout_of_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed names none for its groups, and torch's own would be half an hour."""
    import torch

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RLHF_COLLECTIVE_SECONDS", "7")
    try:
        distributed.init_world()
        groups = [dist.group.WORLD, dist.new_group([0])]
        timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        assert timeouts == [timedelta(seconds=7 + distributed.HEARTBEAT_FIRST)] * 2
    finally:
        distributed.close_world()


class Left(BaseException):
    """Raised in place of the end of this process."""


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Lets `_give_up` raise Left; the seconds after which the kernel was asked to end the process."""

    def leave(status: int) -> None:
        assert status == heartbeat.STALLED_EXIT_CODE
        raise Left

    limits: list[float] = []
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(heartbeat, "_end_within", limits.append)
    monkeypatch.setattr(heartbeat, "is_first", lambda message: True)
    return limits


class FullLog(io.StringIO):
    name = "logs/rank_1.log"

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "full")


class StuckLog(FullLog):
    def write(self, text: str) -> int:
        threading.Event().wait()
        return 0


@pytest.mark.parametrize("log", [FullLog, StuckLog])
@pytest.mark.parametrize("with_store", [False, True])
def test_a_log_that_cannot_be_written_keeps_nobody_from_saying_who_hangs_and_leaving(
    leaving: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    log: type,
    with_store: bool,
) -> None:
    monkeypatch.setattr(heartbeat, "_LAST_WORDS", 0.5)
    monkeypatch.setattr(heartbeat, "rank_log", log)
    store = dist.HashStore()
    diagnosis = Diagnosis(0, "rank 0 is silent", True)
    with pytest.raises(Left):
        heartbeat.HeartbeatThreads(1, 2, store, "the store")._give_up(diagnosis, with_store=with_store)
    assert leaving == [2.0]
    assert capsys.readouterr().err == "error: rank 0 is silent; the stacks of the ranks are in logs\n"
    assert store.check(["diagnosis", "dumped/1"]) == with_store


def test_of_all_ranks_the_first_tells_why_and_each_waits_for_those_that_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diagnosis = Diagnosis(1, "rank 1 is silent", True)
    store, naps = dist.HashStore(), []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        store.multi_set(["dumped/2", "dumped/3"], ["", ""])

    monkeypatch.setattr(heartbeat.time, "sleep", nap)
    for rank in (0, 3):
        heartbeat.HeartbeatThreads(rank, 4, store, "the store")._agree(diagnosis)
    assert naps == [0.05, 2.0]  # rank 0 until those two have left their stacks, then while others look
    assert capsys.readouterr().err.count("error: rank 1 is silent") == 1
    assert Diagnosis(**json.loads(store.get("diagnosis"))) == diagnosis


def test_the_kernel_ends_a_process_that_keeps_the_interpreters_lock() -> None:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, lambda number, frame: None)  # as a function of the user's may
        heartbeat._end_within(0.05)
        ctypes.PyDLL(None).sleep(60)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGALRM


def test_a_rank_beats_on_when_there_is_no_thread_to_be_had_for_its_stacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Scarce:
        """A store that fails once, and ends the watch at the fourth heartbeat."""

        def __init__(self) -> None:
            self.heartbeats = 0
            self.store = dist.HashStore()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.store, name)

        def set(self, key: str, value: str) -> None:
            self.heartbeats += 1
            if self.heartbeats == 2:
                raise MemoryError("passing")
            self.store.set(key, value)
            if self.heartbeats == 4:
                rank_0._over.set()

    def no_thread(*arguments: object, **options: object) -> None:
        raise RuntimeError("unable to start watchdog thread")

    store = Scarce()
    rank_0 = heartbeat.HeartbeatThreads(0, 1, store, "the store")
    rank_0._interval = 0.0
    monkeypatch.setattr(heartbeat, "rank_log", lambda: sys.stderr)
    monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback_later", no_thread)
    rank_0._send_heartbeats()
    assert store.heartbeats == 4
    assert [record.message for record in caplog.records] == ["a heartbeat failed"]
