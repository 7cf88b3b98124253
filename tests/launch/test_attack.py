"""Runs that another user and a neighbour attack from their start to their end (`benchmarks/attack.py`)."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attack, attacker
from benchmarks.namespaces import NoNamespaces


@pytest.fixture(scope="module")
def left_alone() -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder of a run that nobody attacks, and the machines for those that are."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for network namespaces and another user")
    try:
        with attack.neighbourhood() as namespaces, attack.folder_for_all() as whole:
            attack.run_alone(whole, namespaces["a"])
            yield whole, namespaces
    except NoNamespaces as why:
        pytest.skip(str(why))


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_a_run_that_is_attacked_ends_as_one_that_was_left_alone(
    machines: int, left_alone: tuple[Path, dict[str, str]]
) -> None:
    result = attack.attack(machines, *left_alone)
    assert result.faults == []


def order(tmp_path: Path, **more: Any) -> dict[str, Any]:
    nothing: dict[str, Any] = {"ports": [], "torch": [], "processes": [], "folders": [], "recorded": []}
    return {**nothing, "phase": "start", "canary": f"{tmp_path}/ran", "looks_for": [b"key".hex()], **more}


def test_a_server_that_trusts_what_comes_runs_what_the_stranger_sends_and_tells_him_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacker, "FLOOD", 5)

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                with contextlib.closing(listener.accept()[0]) as connection:
                    said = connection.recv(1 << 16)
                    if said.startswith(b"\x80"):
                        pickle.loads(said)  # noqa: S301 - the stranger is our own
                    connection.sendall(b"the key")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        port = list(listener.getsockname())
        stranger = attacker.Stranger(lambda: order(tmp_path, ports=[port]))
        stranger.attack()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert (tmp_path / "ran").exists()
    assert stranger.heard == {b"the key".hex()}
    assert stranger.connections["start"] >= 20 and stranger.most_at_once == 5 and stranger.rounds == 1


def test_files_that_tell_a_secret_or_can_be_written_are_named(tmp_path: Path) -> None:
    (folder := tmp_path / "run").mkdir()
    (folder / "log").write_text("a key")
    (folder / "other").write_text("nothing")
    stranger = attacker.Stranger(lambda: order(tmp_path, folders=[str(folder)]))
    stranger.attack()
    assert stranger.got_at == {
        f"{folder}/log tells a secret",
        *(f"{folder}/{name} can be written" for name in ("log", "other", "stranger")),
    }


def test_whatever_they_got_or_heard_or_had_run_is_a_fault_and_so_is_an_attack_that_was_none(
    tmp_path: Path,
) -> None:
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary" / "ran").touch()
    run = attack.Attacked(tmp_path, 2, {})
    report = {"got_at": ["a file"], "most_at_once": 1100, "connections": {"start": 1, "training": 1}}
    heard = [b"the bearer-of-the-reward-server is".hex()]
    run.result.strangers = {"user": {**report, "heard": heard}}
    attack.judge(run, tmp_path)
    assert run.result.faults == [
        "the losses differ",  # there are none
        "what a stranger sent was run",
        "user: a file",
        "user was told b'the bearer-of-the-reward-server is'",
        "user did not attack during shutdown",
    ]
