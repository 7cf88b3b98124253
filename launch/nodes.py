"""Several machines: each is given the same command, and machine 0 decides. This is machine 0's side.

Takes a LaunchConfig whose `nnodes` is more than 1. `gather` waits for the other machines and returns them as
`Machines`, which start their part of a job, report how it ended and are sent home at the end. They talk over
one TCP connection each (`launch/channel.py`), the others by `launch/follow.py`, and share a secret that
machine 0 writes into `output_dir`; the ranks meet at the next port. Knows nothing of steps, of what a job
does, or of why it failed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import select
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.errors import UserError
from common.files import disk_errors
from common.launch_config import LaunchConfig
from launch.agent import STOPPED
from launch.channel import Channel, Message, interface_of
from launch.local import Meeting
from launch.supervise import Outcome, Say, StopRequests

LATE_SECONDS = 15.0
"""How much longer than allowed a machine may take to stop its ranks before it is taken to be lost."""
MOST_UNPROVED = 64
"""Connections of which it is not known whose they are: beyond that many the oldest are closed."""
UNPROVED_SECONDS = 10.0
"""How long such a connection may take to prove that it knows the secret."""
WAITING = 1024
"""Connections that may wait to be accepted: the system makes those beyond call again after a second."""
NAME_SECONDS = 30.0
"""How long machine 0's own name may be unknown: a pod starts before the cluster can resolve it."""
SECRET_BYTES = 32
SHARED = "output_dir must be a folder that all machines share, such as one on NFS"
EXPOSED = (
    "notice: torch and NCCL listen on every machine without a secret, and who reaches their ports can run "
    "code as you: use a private network, or a firewall (docs/security.md)"
)


@dataclass(frozen=True)
class Hello:
    """What a machine says of itself; `command` must be the same on all of them."""

    node_rank: int
    ranks: int
    command: Mapping[str, Any]
    host: str


@dataclass
class _Other:
    """Another machine, as machine 0 sees it."""

    hello: Hello
    channel: Channel
    is_running: bool = False
    must_end_by: float | None = None

    @property
    def name(self) -> str:
        return f"machine {self.hello.node_rank} ({self.hello.host})"


class Machines:
    """The other machines of a run, as machine 0 sees them; leaving the context sends them home."""

    def __init__(self, own: Hello, port: int) -> None:
        """port: of the rendezvous; the ranks meet at the next one."""
        self._own, self._port = own, port
        self._others: list[_Other] = []
        self._files: Mapping[Path, Path] = {}
        self.status = 1
        """with which the others are to end"""
        self.message: str | None = "machine 0 broke off"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UserError):
            self.status, self.message = UserError.EXIT_CODE, error.message
        elif isinstance(error, SystemExit) and isinstance(error.code, int):
            self.leave_with(error.code)
        for other in self._others:
            other.channel.send("end", status=self.status, message=self.message)
            other.channel.close()

    @property
    def hellos(self) -> list[Hello]:
        """What each machine said of itself, by its number."""
        return [self._own, *(other.hello for other in self._others)]

    @property
    def ranks(self) -> list[int]:
        """On each machine."""
        return [hello.ranks for hello in self.hellos]

    def admit(self, channel: Channel, message: Message) -> str:
        """Take in a machine that knows the secret; returns its name. UserError where it does not fit in."""
        command, host = message["command"], printable(message["host"])
        other = _Other(Hello(message["node_rank"], message["ranks"], command, host), channel)
        before = self.hellos
        self._others.append(other)  # also one that is refused is sent home, with the reason
        self._others.sort(key=lambda other: other.hello.node_rank)
        if reasons := differences(self._own.command, command):
            listed = "".join(f"\n    {printable(line)}" for line in reasons)
            raise UserError(
                f"{other.name} was given another command than machine 0:{listed}",
                hint="give every machine the same command, but for launch.node_rank",
            )
        for hello in before:
            if hello.node_rank == other.hello.node_rank:
                raise UserError(
                    f"two machines have launch.node_rank={hello.node_rank}: {hello.host} and {host}",
                    hint=f"number them from 0 to {command['launch.nnodes'] - 1}",
                )
        if len(reached := sorted({other.channel.own_address for other in self._others})) > 1:
            raise UserError(
                f"the other machines reach machine 0 at several addresses: {', '.join(reached)}",
                hint="launch.rdzv_endpoint=ADDRESS:PORT with one of them, the same on every machine",
            )
        channel.send("welcome")
        return other.name

    def forget_those_that_left(self) -> list[str]:
        """Before the first job no machine says anything, but that it leaves; returns the names of these."""
        left = [other for other in self._others if other.channel.receive() or not other.channel.is_open]
        for other in left:
            other.channel.close()
            self._others.remove(other)
        return [other.name for other in left]

    def leave_with(self, status: int) -> None:
        """Let the others end with this status."""
        self.status, self.message = status, None

    def expect(self, root: Path, files: Sequence[Path]) -> None:
        """Have the others wait until these files under `root` are for them what they are here."""
        self._files = {path.relative_to(root): path for path in files}

    def begin(self, name: str) -> Meeting:
        """Have them start their part of the job `name`; where all ranks meet."""
        run_id = f"{name}_{secrets.token_hex(4)}"
        files = {str(relative): sha256_of(path) for relative, path in self._files.items()}
        for other in self._others:
            other.is_running, other.must_end_by = True, None
            other.channel.send("job", name=name, run_id=run_id, files=files)
        address = self._others[0].channel.own_address
        return Meeting(len(self.ranks), 0, address, self._port + 1, run_id, interface_of(address))

    def ended(self) -> list[Outcome]:
        """How the job ended on those machines where it ended since the last call."""
        return [outcome for other in self._others for outcome in self._ended(other)]

    def _ended(self, other: _Other) -> list[Outcome]:
        outcomes = [
            _outcome(message, other.name)
            for message in other.channel.receive()
            if message["do"] in ("ended", "leaving")
        ]
        is_late = other.must_end_by is not None and time.monotonic() > other.must_end_by
        if other.is_running and not outcomes and (not other.channel.is_open or is_late):
            other.channel.close()
            why = "does not answer" if is_late else "is gone: its connection was closed"
            outcomes = [Outcome(1, lost=f"{other.name} {why}")]
        if outcomes:
            other.is_running = False
        return outcomes

    def is_running(self) -> bool:
        """Whether the job has not ended on any of them."""
        return any(other.is_running for other in self._others)

    def halt(self, seconds: float) -> None:
        """Have them stop the job, and kill what is left of it after so many seconds."""
        for other in self._others:
            if other.is_running:
                other.must_end_by = time.monotonic() + seconds + LATE_SECONDS
                other.channel.send("halt", seconds=seconds)


def gather(launch: LaunchConfig, own: Hello, folder: Path, say: Say) -> Machines:
    """Wait for the other machines, which share the parent of the run's `folder`; UserError without them."""
    address, port = endpoint_of(launch)
    machines = Machines(own, port)
    with contextlib.ExitStack() as sent_home, contextlib.ExitStack() as stack:
        sent_home.push(machines)
        listeners = [stack.enter_context(listener) for listener in _listen(address, port)]
        secret = stack.enter_context(_secret_in(secret_file(folder, launch)))
        rendezvous = stack.enter_context(contextlib.closing(_Rendezvous(listeners, secret)))
        requests = stack.enter_context(StopRequests())
        say(EXPOSED)
        say(f"machine 0 waits at {address}:{port} for {launch.nnodes - 1} other(s)")
        end = time.monotonic() + launch.join_seconds
        while len(machines.ranks) < launch.nnodes and not requests.received:
            if time.monotonic() > end:
                raise _nobody_came(launch, folder, machines, rendezvous.turned_away)
            for channel, message in rendezvous.answer():
                say(f"{machines.admit(channel, message)} is here with {message['ranks']} rank(s)")
            for name in machines.forget_those_that_left():
                say(f"{name} has left again")
        if requests.received:
            raise SystemExit(STOPPED)
        sent_home.pop_all()
    return machines


class _Rendezvous:
    """Where the other machines come in: who has not proved to know the secret learns and moves nothing."""

    def __init__(self, listeners: Sequence[socket.socket], secret: bytes) -> None:
        self._listeners, self._secret = listeners, secret
        self._unproved: list[Channel] = []
        self.turned_away: str | None = None
        """address of the last one that did not prove it"""

    def answer(self) -> list[tuple[Channel, Message]]:
        """Those that have proved it within a fraction of a second, each with the first that it says."""
        watched: list[Any] = [*self._listeners, *self._unproved]
        ready = select.select(watched, [], [], 0.2)[0]
        for listener in [listener for listener in self._listeners if listener in ready]:
            with contextlib.suppress(OSError):  # it has hung up already
                self._unproved.append(Channel(listener.accept()[0], self._secret, is_machine_0=True))
        heard = [(channel, channel.receive()) for channel in self._unproved if channel in ready]
        proved = {channel: messages[0] for channel, messages in heard if messages}
        waiting = [channel for channel in self._unproved if channel not in proved]
        earliest = time.monotonic() - UNPROVED_SECONDS
        for number, channel in enumerate(reversed(waiting)):
            if number >= MOST_UNPROVED or channel.since < earliest:
                channel.close()
            if not channel.is_open:
                self.turned_away = channel.address
        self._unproved = [channel for channel in waiting if channel.is_open]
        return list(proved.items())

    def close(self) -> None:
        """Hang up on all that have not proved it."""
        for channel in self._unproved:
            channel.close()


def secret_file(folder: Path, launch: LaunchConfig) -> Path:
    """Where the machines find their secret: beside the run's folder, whose name they may not agree on."""
    endpoint = (launch.rdzv_endpoint or "").encode()
    return folder.absolute().parent / f".machines-{hashlib.sha256(endpoint).hexdigest()[:8]}"


@contextlib.contextmanager
def _secret_in(path: Path) -> Iterator[bytes]:
    """A new secret, for as long as the context is open in a file that only this user can read."""
    secret = secrets.token_bytes(SECRET_BYTES)
    with disk_errors(path):
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
    try:
        yield secret
    finally:
        path.unlink(missing_ok=True)


def _outcome(message: Message, where: str) -> Outcome:
    cause, said = message.get("cause"), message.get("message")
    rank_and_code = None if cause is None else (int(cause[0]), int(cause[1]))
    lost = None if said is None else f"{where}: {said}"
    told = {name: message.get(name, False) for name in ("stopped", "oom_killed")}
    return Outcome(message["status"], rank_and_code, where=where, lost=lost, **told)


def sha256_of(path: Path) -> str:
    """The hash of a file's content; a word for one that cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What another machine was told differently, one line for each."""
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return [
        f"{key}: {ours.get(key)} on machine 0, {theirs.get(key)} there"
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]


def printable(text: str) -> str:
    """What a stranger sent, without the signs that a terminal would obey."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def endpoint_of(launch: LaunchConfig) -> tuple[str, int]:
    """Host and port of `launch.rdzv_endpoint`; UserError when it is no such thing."""
    host, colon, port = (launch.rdzv_endpoint or "").rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65535):
        raise UserError(
            f"launch.rdzv_endpoint={launch.rdzv_endpoint} is not allowed with launch.nnodes={launch.nnodes}",
            hint="allowed: HOST:PORT of machine 0, the same on every machine; PORT and PORT + 1 must be free",
        )
    return host, int(port)


def _listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on the interface that the endpoint names, and on no other."""
    end = time.monotonic() + NAME_SECONDS
    try:
        while not _is_known(host) and time.monotonic() < end:
            time.sleep(0.5)
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        address = str(place[0])
        listeners = [socket.create_server((address, port), family=family, backlog=WAITING)]
        if address.startswith("127.") and host not in (address, "localhost"):
            # Debian has a machine's own name stand for its loopback, where the others do not reach it.
            listeners += [socket.create_server((found, port), backlog=WAITING) for found in _way_out()]
    except OSError as error:
        raise UserError(
            f"machine 0 cannot listen at {host}:{port}: {error.strerror}",
            hint="launch.rdzv_endpoint=HOST:PORT with an address of machine 0 and a free port of it",
        ) from None
    for listener in listeners:
        listener.setblocking(False)
    return listeners


def _is_known(host: str) -> bool:
    with contextlib.suppress(socket.gaierror):
        return bool(socket.getaddrinfo(host, None))
    return False


def _way_out() -> list[str]:
    """This machine's address on the interface that leads to all networks which it is not part of."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect(("192.0.2.1", 9))  # of nobody (RFC 5737); nothing is sent
        return [str(asking.getsockname()[0])]
    return []


def _nobody_came(launch: LaunchConfig, folder: Path, machines: Machines, stranger: str | None) -> UserError:
    here = {hello.node_rank for hello in machines.hellos}
    missing = ", ".join(str(rank) for rank in range(launch.nnodes) if rank not in here)
    _, port = endpoint_of(launch)
    strangers = f"; {stranger} called and did not prove that it sees {folder.absolute().parent}"
    return UserError(
        f"machine {missing} of {launch.nnodes} did not come within {launch.join_seconds} s"
        + ("" if stranger is None else strangers),
        hint="start the same command there with its own launch.node_rank, let nothing block ports "
        f"{port} and {port + 1}, or wait longer: launch.join_seconds; {SHARED}",
    )
