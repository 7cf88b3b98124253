"""What torch's own ports allow to whoever reaches them: why docs/security.md asks for a network of their own.

These are no wishes. A test that fails here says that torch has become stricter, and the page can say less.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from datetime import timedelta
from pathlib import Path

import pytest

from benchmarks.sockets import listening
from tests import forked
from tests.forked import free_port
from tests.programs import strangers
from tests.runs import wait_while

pytestmark = pytest.mark.slow


def test_the_store_gives_its_keys_to_anyone_and_takes_theirs() -> None:
    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    from launch.rendezvous import OneAddress

    endpoint = ("127.0.0.1", free_port())
    held = OneAddress(RendezvousParameters("static", "{}:{}".format(*endpoint), "sft_0123abcd", 2, 2))
    assert held._store is not None
    ours = PrefixStore("sft_0123abcd", held._store)
    ours.set("heartbeat/0/rank/1", '{"host": "node-b", "doing": "step 7"}')
    ours.set("default_pg/0//cpu//0/1", "where rank 1 listens")
    stranger = TCPStore(*endpoint, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    seen = {key: stranger.get(key) for key in stranger.list_keys()}
    assert seen["sft_0123abcd/heartbeat/0/rank/1"] == b'{"host": "node-b", "doing": "step 7"}'
    stranger.set("sft_0123abcd/default_pg/0//cpu//0/1", "where a stranger listens")
    assert ours.get("default_pg/0//cpu//0/1") == b"where a stranger listens"
    assert stranger.delete_key("sft_0123abcd/heartbeat/0/rank/1")
    assert not ours.check(["heartbeat/0/rank/1"])


def test_who_comes_as_a_rank_has_the_others_run_what_he_sends(tmp_path: Path) -> None:
    (ran := tmp_path / "ran").mkdir()
    ranks = forked.start(strangers.gather, (ran,), 2, tmp_path / "output.txt")
    first = ranks.processes[0].pid
    ranks.finish()
    assert str(first) in {path.name for path in ran.iterdir()}


def test_gloo_keeps_what_anyone_connects_and_ends_its_rank_when_descriptors_run_out(tmp_path: Path) -> None:
    most = 256
    until = tmp_path / "until"
    ranks = forked.start(strangers.wait_with_few_descriptors, (until, most), 2, tmp_path / "output.txt")
    try:
        wait_while(ranks, lambda: len(gloo_ports(ranks)) < 1)
        with contextlib.ExitStack() as stack:
            while ranks.processes[0].is_alive():
                for port in gloo_ports(ranks):
                    with contextlib.suppress(OSError):
                        connection = socket.create_connection(port, timeout=5)
                        stack.enter_context(contextlib.closing(connection)).sendall(b"12345678")
        ranks.processes[0].join()
        assert ranks.processes[0].exitcode == -signal.SIGABRT
        assert "accept: Too many open files" in ranks.output.read_text()
    finally:
        ranks.kill()


def gloo_ports(ranks: forked.Ranks) -> list[tuple[str, int]]:
    """Where rank 0 listens."""
    places = listening(ranks.processes[0].pid)[ranks.processes[0].pid]
    return [place for place in places if not isinstance(place, str)]
