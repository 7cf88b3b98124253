"""Ports that a run opens: those of one machine are closed to every other."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import pytest

from benchmarks.sockets import address_in, listening
from launch import local
from launch.local import Job, Meeting, environment
from tests import tiny_run
from tests.forked import free_port

pytestmark = pytest.mark.slow  # whole runs of a process each


def addresses_listened_on(parent: int) -> dict[int, list[str]]:
    """Addresses of the listening TCP sockets of a process and everything below it, by process."""
    found = {
        process: [place[0] for place in places if not isinstance(place, str)]
        for process, places in listening(parent).items()
    }
    return {process: addresses for process, addresses in found.items() if addresses}


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def test_addresses_of_proc_are_read_as_they_are_meant() -> None:
    assert address_in("0100007F") == "127.0.0.1" and address_in("0" * 24 + "01000000") == "::1"
    assert is_loopback("127.0.0.2") and is_loopback("::1") and is_loopback("::ffff:127.0.0.1")
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1"]))
    with socket.create_server(("", 0)):
        (addresses,) = addresses_listened_on(os.getpid()).values()
        assert "0.0.0.0" in addresses


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_of_one_machine_listen_on_the_loopback_interface_alone(ranks: int, tmp_path: Path) -> None:
    typed = [*tiny_run.sft(tmp_path, steps=100_000), "run_name=a", f"launch.nproc_per_node={ranks}"]
    started = tiny_run.start([*typed, "tracking.wandb=offline"])
    try:
        tiny_run.wait_until(
            lambda: tiny_run.steps_done(tmp_path / "runs" / "a") >= 2 or started.poll() is not None,
            lambda: "no step was taken",
        )
        found = addresses_listened_on(started.pid)
        started.terminate()
        printed = started.communicate(timeout=tiny_run.PATIENCE_SECONDS)[0]
    finally:
        started.kill()
    assert started.returncode == 143, printed[-3000:]
    listened = [address for addresses in found.values() for address in addresses]
    assert [address for address in listened if not is_loopback(address)] == []
    assert ranks == 1 or len(found) >= 3  # the agent's store, and gloo in each rank


def test_only_ranks_of_one_machine_are_kept_to_the_loopback_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(local.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    alone = environment(Job("m", (), ranks=2))
    assert (alone["GLOO_SOCKET_IFNAME"], alone["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    meeting = Meeting(2, 0, "node-a", 29501, "x", "eth0")
    together = environment(Job("m", (), ranks=2, meeting=meeting))
    assert together["GLOO_SOCKET_IFNAME"] == "eth0" and "NCCL_SOCKET_IFNAME" not in together
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    assert "NCCL_SOCKET_IFNAME" not in environment(Job("m", (), ranks=2))


@pytest.mark.parametrize("endpoint", ["127.0.0.1", "127.0.0.2"])
def test_the_store_of_several_machines_listens_at_one_address_alone(endpoint: str) -> None:
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    from launch.rendezvous import OneAddress

    parameters = RendezvousParameters("static", f"{endpoint}:{free_port()}", "sft_1", 2, 2)
    held = OneAddress(parameters)
    at = {address for addresses in addresses_listened_on(os.getpid()).values() for address in addresses}
    assert at == {endpoint}
    with pytest.raises(DistNetworkError, match=f"cannot listen at {endpoint}.*in use"):
        OneAddress(parameters)
    del held
