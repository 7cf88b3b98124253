"""Where the ranks of one machine meet: a store that listens on the loopback interface alone.

torchrun's own rendezvous open a port on every interface, and read what comes in there as pickles (`c10d`) or
as the ranks' own messages. Nobody outside of the machine has to reach the ranks of one machine. Several
machines meet at torchrun's `static` rendezvous instead (`launch/agent.py`). Imports torch.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

LOOPBACK = "127.0.0.1"
BACKEND = "loopback"
STORE_TIMEOUT = timedelta(minutes=10)
WAITING = 4096
"""Connections that may wait to be accepted: every rank has a few."""


def register() -> None:
    """Make `BACKEND` known to torchrun's agent. Called once in a process."""
    rendezvous_handler_registry.register(BACKEND, Loopback)


class Loopback(RendezvousHandler):
    """A rendezvous of one agent, whose store its ranks use, too (MASTER_ADDR and MASTER_PORT)."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        listener = socket.create_server((LOOPBACK, 0), backlog=WAITING)
        self._port = int(listener.getsockname()[1])
        self._store = TCPStore(
            LOOPBACK,
            self._port,
            is_master=True,
            timeout=STORE_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        meeting_point = RendezvousStoreInfo(LOOPBACK, self._port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, meeting_point)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """One agent has nobody to tell."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True
