"""Machines on this one: network namespaces joined by cables (veth pairs), for whom root may make them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping


class NoNamespaces(Exception):
    """They cannot be made here; says why."""


@contextlib.contextmanager
def network(cables: Mapping[str, tuple[str, str]]) -> Iterator[dict[str, str]]:
    """The namespace of each machine, by its name.

    cables: which two machines each joins, by its name. Number k, from 0, ends in the interfaces NAME0 and
    NAME1, which have the addresses 10.91.k.1 and 10.91.k.2.
    """
    machines = {name: f"rlhf{os.getpid()}{name}" for ends in cables.values() for name in ends}
    if shutil.which("ip") is None:
        raise NoNamespaces("needs iproute2")
    try:
        for namespace in machines.values():
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        for number, (cable, ends) in enumerate(cables.items()):
            one, other = (machines[end] for end in ends)
            ip("link", "add", f"{cable}0", "netns", one, "type", "veth", "peer", f"{cable}1", "netns", other)
            for end, namespace in enumerate((one, other)):
                ip("-n", namespace, "addr", "add", f"10.91.{number}.{end + 1}/24", "dev", f"{cable}{end}")
                ip("-n", namespace, "link", "set", f"{cable}{end}", "up")
    except subprocess.CalledProcessError as error:
        remove(machines)
        raise NoNamespaces(f"no network namespaces here: {error.stderr.decode().strip()}") from None
    try:
        yield machines
    finally:
        remove(machines)


def ip(*arguments: str) -> None:
    """Call iproute2."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def remove(machines: Mapping[str, str]) -> None:
    """Take the namespaces away, and with them their cables."""
    for namespace in machines.values():
        subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)
