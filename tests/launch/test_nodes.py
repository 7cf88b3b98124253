"""Several machines on this one: who may come in, who leaves, and what the ranks find."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import UserError
from common.launch_config import LaunchConfig
from launch import nodes
from launch.channel import interface_of
from launch.follow import follow
from launch.local import Job
from launch.nodes import Hello, endpoint_of, gather
from launch.supervise import Outcome, leaving_when_told, supervise
from pipeline.checks import check_launch
from tests.launch.conftest import COMMAND, follower, launch_of, own


def test_a_machine_comes_in_and_ends_as_machine_0_says(folder: Path, launch: LaunchConfig) -> None:
    lines: list[str] = []
    with follower(launch, folder, ranks=3) as process:
        with gather(launch, own(2), folder, lines.append) as machines:
            assert machines.ranks == [2, 3]
            machines.leave_with(5)
        assert process.wait(30) == 5
        assert "machine 0 ended with exit status 5: see what was printed there" in process.communicate()[1]
    assert "machine 1 (b) is here with 3 rank(s)" in lines
    assert sum("without a secret" in line and "firewall" in line for line in lines) == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_machine_0_that_is_told_to_stop_between_jobs_ends_with_all_others(
    number: signal.Signals, folder: Path, launch: LaunchConfig
) -> None:
    with follower(launch, folder) as process:
        with (
            pytest.raises(SystemExit) as ended,
            leaving_when_told(),
            gather(launch, own(), folder, print),
        ):
            os.kill(os.getpid(), number)
            time.sleep(10)
        assert (ended.value.code, process.wait(30)) == (143, 143)


def test_an_error_of_machine_0_ends_the_others_with_its_words(folder: Path, launch: LaunchConfig) -> None:
    with follower(launch, folder) as process:
        with pytest.raises(UserError, match="too few rows"), gather(launch, own(), folder, print):
            raise UserError("too few rows", hint="more of them")
        assert process.wait(30) == 2
        assert "machine 0: too few rows" in process.communicate()[1]


def test_machines_that_did_not_come_are_named(folder: Path) -> None:
    launch = launch_of(3, seconds=4)
    command = {**COMMAND, "launch.nnodes": 2}
    with follower(launch, folder, rank=1, command=command) as process:
        with pytest.raises(UserError, match=r"machine 2 of 3 did not come within 4 s") as caught:
            gather(launch, own(), folder, print)
        assert str(endpoint_of(launch)[1] + 1) in str(caught.value)
        assert process.wait(30) == 2


def test_two_machines_with_one_number_are_refused(folder: Path) -> None:
    launch = launch_of(3)
    with follower(launch, folder) as first, follower(launch, folder) as second:
        with pytest.raises(UserError, match=r"two machines have launch\.node_rank=1: b and b"):
            gather(launch, own(), folder, print)
        assert {first.wait(30), second.wait(30)} == {2}


def test_machine_0_that_is_reached_at_several_addresses_is_told_to_name_one() -> None:
    machines = nodes.Machines(own(), 29500)
    for number, address in enumerate(["10.0.0.1", "10.0.1.1"], start=1):
        channel: Any = SimpleNamespace(own_address=address, send=lambda *_, **__: None, close=lambda: None)
        message = {"node_rank": number, "ranks": 1, "command": COMMAND, "host": "b"}
        refused = pytest.raises(UserError, match="several addresses: 10.0.0.1, 10.0.1.1")
        with contextlib.nullcontext() if number == 1 else refused:
            machines.admit(channel, message)
    assert machines.begin("sft").address == "10.0.0.1"


def test_another_command_is_refused_with_the_difference_on_both_sides(
    folder: Path, launch: LaunchConfig
) -> None:
    with follower(launch, folder, command={**COMMAND, "run_name": "c"}) as process:
        with pytest.raises(UserError, match=r"run_name: a on machine 0, c there"):
            gather(launch, own(), folder, print)
        assert process.wait(30) == 2
        assert "run_name: a on machine 0, c there" in process.communicate()[1]


def test_a_folder_that_is_not_shared_is_named_on_both_sides(folder: Path) -> None:
    launch = launch_of(2, seconds=4)
    elsewhere = folder.parent / "elsewhere" / "run"
    elsewhere.mkdir(parents=True)
    with follower(launch, elsewhere) as process:
        with pytest.raises(UserError) as caught:
            gather(launch, own(), folder, print)
        named = f"127.0.0.1 called and did not prove that it sees {folder.parent}"
        assert named in str(caught.value) and "share" in str(caught.value)
        printed = process.communicate()[1]
        assert f"finds in {elsewhere.parent} no secret" in printed and "share" in printed
        assert process.returncode == 2


def test_who_has_another_command_and_so_another_folder_is_refused_with_the_difference(
    folder: Path, launch: LaunchConfig
) -> None:
    command = {**COMMAND, "run_name": "c\x1b[2J"}
    with follower(launch, folder.parent / "c", command=command) as process:
        with pytest.raises(UserError, match=r"machine 1 \(b\) was given another command") as caught:
            gather(launch, own(), folder, print)
        assert "run_name: a on machine 0, c\\x1b[2J there" in caught.value.message
        assert process.wait(30) == 2
        assert "run_name: a on machine 0, c\\x1b[2J there" in process.communicate()[1]


def test_machine_0_that_is_told_to_stop_while_the_last_one_joins_stops(
    folder: Path, launch: LaunchConfig
) -> None:
    def say(line: str) -> None:
        if "is here" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    with follower(launch, folder) as process:
        with pytest.raises(SystemExit) as ended:
            gather(launch, own(), folder, say)
        assert (ended.value.code, process.wait(30)) == (143, 143)


def test_a_machine_0_that_never_answers_is_named() -> None:
    launch = launch_of(2, seconds=1)
    with pytest.raises(UserError, match=rf"machine 0 did not answer at {launch.rdzv_endpoint} for 1 s"):
        follow(launch, Hello(1, 1, COMMAND, "b"), Path(), {}, print)


def test_a_name_that_is_looked_up_for_ever_ends_the_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    is_known = threading.Event()  # never, while it is asked
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: is_known.wait(10) and [])
    monkeypatch.setattr("launch.follow.ANSWER_SECONDS", 0.1)
    launch = LaunchConfig(nnodes=2, node_rank=1, rdzv_endpoint="a:1234", join_seconds=0)
    with pytest.raises(UserError, match="machine 0 did not answer at a:1234 for 0 s"):
        follow(launch, Hello(1, 1, COMMAND, "b"), Path(), {}, print)
    is_known.set()


def test_a_machine_0_that_vanished_ends_the_others(folder: Path, launch: LaunchConfig) -> None:
    with follower(launch, folder) as process:
        machines = gather(launch, own(), folder, print)
        machines._others[0].channel.close()
        assert process.wait(30) == 1
        assert f"machine 0 at {launch.rdzv_endpoint} is gone" in process.communicate()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_machine_that_is_told_to_stop_between_jobs_stops_the_run(
    number: signal.Signals, folder: Path, launch: LaunchConfig
) -> None:
    with follower(launch, folder) as process:
        with gather(launch, own(), folder, print) as machines:
            process.send_signal(number)
            outcomes: list[Outcome] = []
            machines.begin("sft")
            end = time.monotonic() + 60
            while not outcomes and time.monotonic() < end:
                outcomes = machines.ended()
            assert (outcomes[0].status, outcomes[0].stopped, outcomes[0].lost) == (143, True, None)
            assert not machines.is_running()
            machines.leave_with(143)
        assert process.wait(30) == 143


def test_a_machine_that_died_between_jobs_is_named_by_the_next_one(
    folder: Path, launch: LaunchConfig
) -> None:
    with follower(launch, folder) as process, gather(launch, own(), folder, print) as machines:
        process.kill()
        process.wait()
        for _ in range(2):  # the first message to it may still be sent
            machines.begin("sft")
            while machines.is_running():
                outcomes = machines.ended()
            assert outcomes[0].lost == "machine 1 (b) is gone: its connection was closed"


def test_only_known_jobs_run_and_only_when_the_files_are_there(folder: Path, launch: LaunchConfig) -> None:
    for name, changed, message in (
        ("rm", False, "asks for rm"),
        ("sft", True, "is not what machine 0 wrote"),
    ):
        with follower(launch, folder) as process, gather(launch, own(), folder, print) as machines:
            written = folder / "resolved.yaml"
            written.write_text("a")
            machines.expect(folder, [written])
            machines._files = {Path("resolved.yaml"): folder.parent / "other"} if changed else {}
            (folder.parent / "other").write_text("b")
            machines.begin(name)
            while machines.is_running():
                outcomes = machines.ended()
            assert outcomes[0].status == 2 and message in str(outcomes[0].lost)
            assert process.wait(30) == 2


def test_machine_0_that_is_told_to_stop_while_it_waits_ends_with_those_that_came(folder: Path) -> None:
    launch = launch_of(3)
    with follower(launch, folder) as process:

        def say(line: str) -> None:
            if "is here" in line:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(SystemExit) as ended:
            gather(launch, own(), folder, say)
        assert (ended.value.code, process.wait(30)) == (143, 143)
    assert list(folder.iterdir()) == []


def test_one_of_several_machines_has_a_number_and_an_endpoint() -> None:
    check_launch(LaunchConfig())
    check_launch(LaunchConfig(nnodes=2, node_rank=1, rdzv_endpoint="a:29500"))
    with pytest.raises(UserError, match=r"launch\.nnodes=2, and launch\.node_rank is missing"):
        check_launch(LaunchConfig(nnodes=2, rdzv_endpoint="a:29500"))
    with pytest.raises(UserError, match=r"launch\.rdzv_endpoint=None is not allowed with launch\.nnodes=2"):
        check_launch(LaunchConfig(nnodes=2, node_rank=0))


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
seen = " ".join(os.environ[name] for name in names)
(folder / f"rank_{rank}").write_text(seen + " " + os.environ.get("GLOO_SOCKET_IFNAME", ""))
if (folder / "wait").exists():
    (folder / f"pid_{rank}").write_text(str(os.getpid()))
    time.sleep(600)
if rank == "2" and not (folder / "died").exists():
    (folder / "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_ranks_are_numbered_by_machine_and_all_are_started_again_when_one_died(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    Path("some_module.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    launch = launch_of(2)
    port = endpoint_of(launch)[1] + 1
    lines: list[str] = []
    with follower(launch, folder, ranks=1) as process:
        with gather(launch, own(2), folder, print) as machines:
            job = Job("some_module", (str(folder),), 2)
            outcome = supervise(job, name="sft", others=machines, restarts=1, say=lines.append)
            machines.leave_with(0)
        assert process.wait(60) == 0
    assert (outcome.status, outcome.stopped) == (0, False)
    assert lines == [
        "sft: rank 2 on machine 1 (b) died (SIGKILL); starting again from the last checkpoint, restart 1 of 1"
    ]
    assert [(folder / f"rank_{rank}").read_text() for rank in range(3)] == [
        f"3 0 2 0 127.0.0.1 {port} lo",
        f"3 1 2 0 127.0.0.1 {port} lo",
        f"3 0 1 1 127.0.0.1 {port} lo",
    ]


def test_a_machine_that_vanishes_takes_its_ranks_along_and_ends_those_of_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    Path("some_module.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    (folder / "wait").touch()
    launch = launch_of(2)
    with follower(launch, folder) as process, gather(launch, own(), folder, print) as machines:

        def kill() -> None:
            while not all((folder / f"pid_{rank}").exists() for rank in (0, 1)):
                time.sleep(0.05)
            process.kill()

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        outcome = supervise(Job("some_module", (str(folder),), 1), name="sft", others=machines)
        assert (outcome.status, outcome.stopped) == (1, False)
        thread.join()
    assert "machine 1 (b) is gone: its connection was closed" in capfd.readouterr().err
    end = time.monotonic() + 30
    while any(is_alive((folder / f"pid_{rank}").read_text()) for rank in (0, 1)):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(process_id: str) -> bool:
    with contextlib.suppress(OSError):
        return "State:\tZ" not in Path("/proc", process_id, "status").read_text()
    return False


@pytest.mark.parametrize("endpoint", [None, "host", "host:", ":29500", "host:0", "host:65535", "host:port"])
def test_an_endpoint_is_a_host_and_a_port_that_has_a_next_one(endpoint: str | None) -> None:
    with pytest.raises(UserError, match=r"launch\.rdzv_endpoint"):
        endpoint_of(LaunchConfig(nnodes=2, node_rank=0, rdzv_endpoint=endpoint))
    assert endpoint_of(LaunchConfig(nnodes=2, rdzv_endpoint="a.b:65534")) == ("a.b", 65534)


def test_a_port_that_is_taken_is_named(folder: Path, launch: LaunchConfig) -> None:
    with (
        socket.create_server(endpoint_of(launch)),
        pytest.raises(UserError, match=f"cannot listen at {launch.rdzv_endpoint}"),
    ):
        gather(launch, own(), folder, print)


def test_the_interface_is_the_one_with_the_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
    assert nodes.differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == [
        "b: 2 on machine 0, 3 there",
        "c: None on machine 0, 4 there",
    ]
