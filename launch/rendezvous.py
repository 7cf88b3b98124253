"""Where the ranks of one machine meet: a store that listens on the loopback interface alone.

torchrun's own rendezvous open a port on every interface, and read what comes in there as pickles (`c10d`) or
as the ranks' own messages. Nobody outside of the machine has to reach the ranks of one machine. Several
machines meet at torchrun's `static` rendezvous instead (`launch/agent.py`). Imports torch.
"""

from __future__ import annotations

import socket

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

LOOPBACK = "127.0.0.1"
BACKEND = "loopback"
STORE_SECONDS = 600
WAITING = 4096
"""Connections that may wait to be accepted: every rank has a few."""


def register() -> None:
    """Make `BACKEND` known to torchrun's agent. Called once in a process."""
    rendezvous_handler_registry.register(BACKEND, Loopback)


class Loopback(StaticTCPRendezvous):
    """torchrun's own of one agent, whose store its ranks use, too; only that store listens elsewhere."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        listener = socket.create_server((LOOPBACK, 0), backlog=WAITING)
        port = int(listener.getsockname()[1])
        super().__init__(LOOPBACK, port, 0, 1, parameters.run_id, STORE_SECONDS)
        self._store = TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            timeout=self.timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def get_backend(self) -> str:
        return BACKEND
