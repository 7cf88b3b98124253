"""Several machines on this one: who may come in, who leaves, and what the ranks find."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import UserError
from common.launch_config import LaunchConfig
from launch import nodes
from launch.channel import Channel, interface_of
from launch.follow import follow
from launch.local import Job
from launch.nodes import Hello, endpoint_of, gather
from launch.supervise import Outcome, leaving_when_told, supervise
from pipeline.checks import check_launch
from tests.forked import ROOT, free_port

COMMAND = {"launch.nnodes": 2, "run_name": "a", "steps": ["sft"]}
FOLLOWER = """
import json, sys
from pathlib import Path
from common.launch_config import LaunchConfig
from common.errors import UserError
from launch import follow, nodes
from launch.local import Job
follow.SHARED_SECONDS = 2.0
launch, rank, ranks, command, folder = json.loads(sys.argv[1])
own = nodes.Hello(rank, ranks, command, "b")
jobs = {"sft": Job("some_module", (folder,), ranks)}
try:
    sys.exit(follow.follow(LaunchConfig(**launch, node_rank=rank), own, Path(folder), jobs, print))
except UserError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def launch() -> LaunchConfig:
    return launch_of(2)


def launch_of(nnodes: int, seconds: int = 60) -> LaunchConfig:
    endpoint = f"127.0.0.1:{free_port()}"
    return LaunchConfig(nnodes=nnodes, node_rank=0, rdzv_endpoint=endpoint, join_seconds=seconds)


def own(ranks: int = 1) -> Hello:
    return Hello(0, ranks, COMMAND, "a")


@contextlib.contextmanager
def follower(
    launch: LaunchConfig, folder: Path, rank: int = 1, ranks: int = 1, command: dict[str, object] = COMMAND
) -> Iterator[subprocess.Popen[str]]:
    """Another machine, as a process."""
    told = {"nnodes": launch.nnodes, "rdzv_endpoint": launch.rdzv_endpoint, "join_seconds": 60}
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER, json.dumps([told, rank, ranks, command, str(folder)])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.getcwd()])},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


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


# --- Strangers: whoever does not know the secret ---------------------------------------------------

NONCE = b"0" * 64
HELLO = {"do": "hello", "node_rank": 1, "ranks": 1, "command": COMMAND, "host": "liar"}
SEALED_BY_A_GUESS = b"0" * 64 + json.dumps(HELLO).encode()
LINES = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    json.dumps(HELLO).encode() + b"\n",
    b'{"do": "lost", "folder": "x"}\n',
    b"[" * 60_000 + b"\n",
    b"\xff" * 200_000,
    NONCE + b"\n" + SEALED_BY_A_GUESS + b"\n",
    NONCE + b"\n" + b'0{"do": "lost"}\n',
]


def come_in_after(visit: Callable[[], None], launch: LaunchConfig, folder: Path) -> None:
    """Machine 0 waits while strangers visit it; then, or meanwhile, a machine of the run comes in."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:

        def knock() -> None:
            try:
                visit()
            finally:
                stack.enter_context(follower(launch, folder))

        knocking = pool.submit(knock)
        with gather(launch, own(), folder, print) as machines:
            assert [other.name for other in machines._others] == ["machine 1 (b)"]
        knocking.result()


def all_of(connection: socket.socket, seconds: float = 30.0) -> bytes:
    """What comes until the other side hangs up."""
    connection.settimeout(seconds)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while read := connection.recv(65536):
            received += read
    return received


def test_a_stranger_learns_nothing_and_ends_nothing(folder: Path, launch: LaunchConfig) -> None:
    heard: list[bytes] = []

    def visit() -> None:
        for line in LINES:
            with connect(endpoint_of(launch)) as stranger:
                with contextlib.suppress(OSError):  # hung up on while it still sends
                    stranger.sendall(line)
                    stranger.shutdown(socket.SHUT_WR)
                heard.append(all_of(stranger))

    come_in_after(visit, launch, folder)
    assert len(heard) == len(LINES)
    for received in heard:  # a nonce, and for who sent one a proof
        told = re.sub(rb"^[0-9a-f]{64}\n([0-9a-f]{64}\{\"do\": \"prove\"\}\n)?$", b"", received)
        assert told == b""


def test_two_thousand_strangers_do_not_keep_a_machine_out(folder: Path, launch: LaunchConfig) -> None:
    came = [0]

    def flood() -> None:
        with contextlib.ExitStack() as stack:
            for number in range(2000):
                stranger = stack.enter_context(connect(endpoint_of(launch)))
                with contextlib.suppress(OSError):
                    stranger.sendall(LINES[number % len(LINES)][:1000])
                came[0] += 1
                if number % 500 == 499:  # descriptors of this process are limited
                    stack.close()

    come_in_after(flood, launch, folder)
    assert came == [2000]


@contextlib.contextmanager
def rendezvous(folder: Path) -> Iterator[tuple[nodes._Rendezvous, bytes, tuple[str, int]]]:
    secret = secrets.token_bytes(32)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = nodes._Rendezvous([listener], secret)
        with contextlib.closing(made):
            yield made, secret, listener.getsockname()


def test_of_many_that_do_not_prove_to_be_ours_the_oldest_are_sent_away_and_all_after_a_while(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "MOST_UNPROVED", 3)
    with rendezvous(folder) as (made, _, endpoint), contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(endpoint)) for _ in range(5)]
        for _ in connections:
            made.answer()
        assert [is_closed(connection) for connection in connections] == [True, True, False, False, False]
        monkeypatch.setattr(nodes, "UNPROVED_SECONDS", 0.0)
        made.answer()
        assert all(is_closed(connection) for connection in connections)
        assert made.turned_away == "127.0.0.1"


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.1)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    return True


def pair(ours: bytes, theirs: bytes) -> tuple[Channel, Channel, socket.socket, socket.socket]:
    """Machine 0 and another, and the wires of a man between them who passes on what he likes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        wires = [socket.create_connection(listener.getsockname()) for _ in range(2)]
        ends = [listener.accept()[0] for _ in range(2)]
    zero, other = Channel(ends[0], ours, is_machine_0=True), Channel(ends[1], theirs, is_machine_0=False)
    return zero, other, wires[0], wires[1]


def meet() -> tuple[Channel, Channel, socket.socket, socket.socket]:
    """As `pair`, after the nonces and machine 0's proof."""
    zero, other, by_zero, by_other = pair(b"secret", b"secret")
    by_other.sendall(by_zero.recv(4096))
    by_zero.sendall(by_other.recv(4096))
    assert zero.receive(1) == []
    by_other.sendall(by_zero.recv(4096))
    assert [message["do"] for message in other.receive(5)] == ["prove"]
    return zero, other, by_zero, by_other


def test_messages_between_two_that_know_the_secret_arrive_in_order() -> None:
    zero, other, by_zero, by_other = meet()
    for number in range(3):
        other.send("ended", status=number)
    by_zero.sendall(by_other.recv(65536))
    assert [message["status"] for message in zero.receive(5)] == [0, 1, 2]
    zero.send("end")
    by_other.sendall(by_zero.recv(65536))
    assert other.receive(5) == [{"do": "end"}] and zero.is_open and other.is_open


@pytest.mark.parametrize("change", ["text", "seal", "again", "order", "left out", "back"])
def test_a_message_that_was_changed_on_its_way_is_refused(change: str) -> None:
    zero, other, by_zero, by_other = meet()
    other.send("ended", status=1)
    other.send("ended", status=2)
    first, second, _ = by_other.recv(65536).split(b"\n")
    sent = {
        "text": [first.replace(b"1}", b"0}")],
        "seal": [random.Random(0).randbytes(64).hex().encode()[:64] + first[64:]],
        "again": [first, first],
        "order": [second, first],
        "left out": [second],
        "back": [],
    }[change]
    if change == "back":  # machine 0 hears what it said itself
        zero.send("end")
        sent = [by_zero.recv(65536).rstrip(b"\n")]
    by_zero.sendall(b"\n".join(sent) + b"\n")
    assert [message["status"] for message in zero.receive(5)] == ([1] if change == "again" else [])
    assert not zero.is_open


def test_a_proof_that_was_seen_elsewhere_is_refused(folder: Path) -> None:
    _, other, _, by_other = meet()
    nonce = other._nonce
    other.send("hello")
    hello = by_other.recv(65536)
    zero, _, by_zero, _ = pair(b"secret", b"secret")
    by_zero.sendall(nonce + b"\n" + hello)
    assert zero.receive(2) == [] and not zero.is_open


def test_a_machine_tells_nothing_to_a_machine_0_that_does_not_know_the_secret() -> None:
    zero, other, by_zero, by_other = pair(b"guess", b"secret")
    by_other.sendall(by_zero.recv(4096))
    by_zero.sendall(by_other.recv(4096))
    zero.receive(1)
    by_other.sendall(by_zero.recv(4096))
    assert other.receive(5) == [] and not other.is_open


def test_the_secret_is_this_user_s_alone_and_gone_when_all_have_come(
    folder: Path, launch: LaunchConfig
) -> None:
    modes: list[int] = []

    def say(line: str) -> None:
        if "waits" in line:
            modes.append(nodes.secret_file(folder, launch).stat().st_mode & 0o777)

    with follower(launch, folder), gather(launch, own(), folder, say):
        assert modes == [0o600] and list(folder.parent.iterdir()) == [folder]


def test_machine_0_listens_on_the_interface_of_its_endpoint_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def bound(host: str, stands_for: str) -> list[str]:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (stands_for, 0))]
        monkeypatch.setattr(nodes.socket, "getaddrinfo", lambda *_, **__: found)
        listeners = nodes._listen(host, free_port())
        addresses = [listener.getsockname()[0] for listener in listeners]
        for listener in listeners:
            listener.close()
        return addresses

    monkeypatch.setattr(nodes, "_way_out", lambda: ["127.0.0.3"])
    assert bound("node-a", "127.0.1.1") == ["127.0.1.1", "127.0.0.3"]  # as Debian has it
    assert bound("localhost", "127.0.0.1") == bound("127.0.0.1", "127.0.0.1") == ["127.0.0.1"]
    with pytest.raises(UserError, match="cannot listen at node-a"):
        bound("node-a", "192.0.2.1")  # not an address of this machine


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


def connect(endpoint: tuple[str, int]) -> socket.socket:
    for _ in range(200):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(endpoint)
        time.sleep(0.02)
    raise AssertionError(endpoint)


def test_a_machine_0_that_never_answers_is_named() -> None:
    launch = launch_of(2, seconds=1)
    with pytest.raises(UserError, match=rf"machine 0 did not answer at {launch.rdzv_endpoint} for 1 s"):
        follow(launch, Hello(1, 1, COMMAND, "b"), Path(), {}, print)


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
            while not outcomes:
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
            status = supervise(job, name="sft", others=machines, restarts=1, say=lines.append)
            machines.leave_with(0)
        assert process.wait(60) == 0
    assert status == (0, False)
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
        assert supervise(Job("some_module", (str(folder),), 1), name="sft", others=machines) == (1, False)
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
