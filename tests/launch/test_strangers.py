"""Who does not know the secret of a run learns nothing and ends nothing; changed messages are refused."""

from __future__ import annotations

import contextlib
import json
import random
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.launch_config import LaunchConfig
from launch import nodes
from launch.channel import Channel
from launch.nodes import endpoint_of, gather
from tests.forked import free_port
from tests.launch.conftest import COMMAND, connect, follower, own

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


def test_a_proof_that_was_seen_elsewhere_is_refused() -> None:
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


def test_a_name_that_the_cluster_does_not_know_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    known = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    answers = iter([unknown, known, known])

    def getaddrinfo(*_: Any, **__: Any) -> Any:
        answer = next(answers, unknown)
        if answer is unknown:
            raise unknown
        return answer

    monkeypatch.setattr(nodes.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(nodes, "_way_out", list)
    for listener in nodes._listen("a-x-node-0-0.a-x", free_port()):
        listener.close()
    monkeypatch.setattr(nodes, "NAME_SECONDS", 0.0)
    with pytest.raises(UserError, match="cannot listen at nobody:.*not known"):
        nodes._listen("nobody", free_port())
