"""Where ranks meet: a store that listens at one address alone.

torchrun's own rendezvous open a port on every interface, and read what comes in there as pickles (`c10d`) or
as the ranks' own messages. Of one machine it is the loopback address; of several the one at which the others
reached machine 0, whose agent holds the store: they come to it by torchrun's `static` (`launch/agent.py`).
Imports torch.
"""

from __future__ import annotations

import socket

from torch.distributed import DistNetworkError, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

LOOPBACK = "127.0.0.1"
BACKEND = "one_address"
STORE_SECONDS = 600
WAITING = 4096
"""Connections that may wait to be accepted: every rank has a few."""


def register() -> None:
    """Make `BACKEND` known to torchrun's agent. Called once in a process."""
    rendezvous_handler_registry.register(BACKEND, OneAddress)


class OneAddress(StaticTCPRendezvous):
    """torchrun's own of the agent that holds the store; only that store listens elsewhere."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        address, port = parse_rendezvous_endpoint(parameters.endpoint, 0)  # 0: any that is free
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            listener = socket.create_server((address, port), family=family, backlog=WAITING)
        except OSError as error:
            raise DistNetworkError(f"cannot listen at {address}:{port}: {error.strerror}") from None
        port = int(listener.getsockname()[1])
        super().__init__(address, port, 0, parameters.max_nodes, parameters.run_id, STORE_SECONDS)
        self._store = TCPStore(
            address,
            port,
            is_master=True,
            timeout=self.timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def get_backend(self) -> str:
        return BACKEND
