"""Several machines: each is given the same command, and machine 0 decides. This is machine 0's side.

Takes a LaunchConfig whose `nnodes` is more than 1. `gather` waits for the other machines and returns them as
`Machines`, which start their part of a job, report how it ended and are sent home at the end. They talk over
one TCP connection each (`launch/channel.py`), the others by `launch/follow.py`; the ranks meet at the next
port. Knows nothing of steps, of what a job does, or of why it failed.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import select
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.artifacts import write_text
from common.errors import UserError
from common.launch_config import LaunchConfig
from launch.agent import STOPPED
from launch.channel import Channel, interface_of
from launch.local import Meeting
from launch.supervise import Outcome, Say, StopRequests

LATE_SECONDS = 15.0
"""How much longer than allowed a machine may take to stop its ranks before it is taken to be lost."""
MOST_UNPROVED = 64
"""Connections of which it is not known whose they are: beyond that many the oldest are closed."""


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
    refusal: UserError | None = None  # why it cannot take part, should it be one of us
    is_running: bool = False
    must_end_by: float | None = None

    @property
    def name(self) -> str:
        return f"machine {self.hello.node_rank} ({self.hello.host})"


class Machines:
    """The other machines of a run, as machine 0 sees them; leaving the context sends them home."""

    def __init__(self, others: Sequence[_Other], own: Hello, endpoint: tuple[str, int]) -> None:
        self._others = sorted(others, key=lambda other: other.hello.node_rank)
        self._endpoint = endpoint
        self._files: Mapping[Path, Path] = {}
        self.ranks = [own.ranks, *(other.hello.ranks for other in self._others)]
        """on each machine"""
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

    def leave_with(self, status: int) -> None:
        """Let the others end with this status."""
        self.status, self.message = status, None

    def expect(self, root: Path, files: Sequence[Path]) -> None:
        """Have the others wait until these files under `root` are for them what they are here."""
        self._files = {path.relative_to(root): path for path in files}

    def begin(self, name: str) -> Meeting:
        """Have them start their part of the job `name`; where all ranks meet."""
        address, port = self._endpoint
        run_id = f"{name}_{secrets.token_hex(4)}"
        files = {str(relative): sha256_of(path) for relative, path in self._files.items()}
        for other in self._others:
            other.is_running, other.must_end_by = True, None
            other.channel.send("job", name=name, run_id=run_id, files=files)
        interface = interface_of(self._others[0].channel.own_address)
        return Meeting(len(self.ranks), 0, address, port + 1, run_id, interface)

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
    """Wait for the other machines, which must see the run's `folder`; UserError when they do not come."""
    address, port = endpoint_of(launch)
    token = folder / f".machines-{secrets.token_hex(4)}"
    secret = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(address, port))
        write_text(token, secret)
        stack.callback(token.unlink, missing_ok=True)
        requests = stack.enter_context(StopRequests())
        say(f"machine 0 waits at {address}:{port} for {launch.nnodes - 1} other(s)")
        rendezvous = _Rendezvous(listener, own, token, secret, launch.nnodes)
        try:
            end = time.monotonic() + launch.join_seconds
            while len(rendezvous.joined) < launch.nnodes - 1 and not requests.received:
                if time.monotonic() > end:
                    raise _nobody_came(launch, rendezvous)
                rendezvous.answer(say)
            if requests.received:
                raise SystemExit(STOPPED)
        except (UserError, SystemExit) as error:
            message = error.message if isinstance(error, UserError) else None
            rendezvous.dismiss(STOPPED if message is None else UserError.EXIT_CODE, message)
            raise
    return Machines(list(rendezvous.joined.values()), own, (address, port))


class _Rendezvous:
    """Where the other machines come in: each says who it is, and shows that it sees the run's folder."""

    def __init__(self, listener: socket.socket, own: Hello, token: Path, secret: str, nnodes: int) -> None:
        self._listener, self._own, self._nnodes = listener, own, nnodes
        self._token, self._secret = token, secret
        self._strangers: list[Channel] = []
        self._known: list[_Other] = []  # said who they are, not yet that they see the folder
        self.joined: dict[int, _Other] = {}
        self.refusal: UserError | None = None
        """why the last one with another command could not take part"""

    def answer(self, say: Say) -> None:
        """Deal with what the machines say within a fraction of a second."""
        for other in [*self._known, *self.joined.values()]:
            if not other.channel.is_open:
                self._forget(other, say)
        others = [*self._known, *self.joined.values()]
        watched: list[Any] = [self._listener, *self._strangers, *(other.channel for other in others)]
        ready = select.select(watched, [], [], 0.2)[0]
        if self._listener in ready:
            self._strangers.append(Channel(self._listener.accept()[0]))
        for other in others:
            if other.channel in ready:
                for message in other.channel.receive():
                    self._hear(other, message, say)
        for channel in [channel for channel in self._strangers if channel in ready]:
            messages = channel.receive()
            if len(messages) > 1:  # nobody of us goes on before he is answered
                channel.close()
            elif messages:
                self._greet(channel, messages[0])
        for channels in (self._strangers, [other.channel for other in self._known if other.refusal]):
            for channel in channels[:-MOST_UNPROVED]:
                channel.close()
        self._strangers = [channel for channel in self._strangers if channel.is_open]

    def _greet(self, channel: Channel, message: Mapping[str, Any]) -> None:
        try:
            hello = Hello(
                int(message["node_rank"]),
                int(message["ranks"]),
                dict(message["command"]),
                printable(str(message["host"])),
            )
            reasons = [printable(line) for line in differences(self._own.command, hello.command)]
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            channel.close()
            return
        self._strangers.remove(channel)
        other = _Other(hello, channel)
        self._known.append(other)
        if reasons:
            self.refusal = other.refusal = another_command(other.name, reasons)
        folder = str(self._token.parent.absolute())
        channel.send("welcome", token=self._token.name, folder=folder, differs=reasons)

    def _hear(self, other: _Other, message: Mapping[str, Any], say: Say) -> None:
        if message["do"] == "found" and message.get("secret") == self._secret:
            self._admit(other)
            say(f"{other.name} is here with {other.hello.ranks} rank(s)")
        elif message["do"] == "lost" and other.refusal is None:
            raise not_shared(self._token.parent, printable(str(message.get("folder"))), other.name)
        else:
            other.channel.close()

    def _admit(self, other: _Other) -> None:
        if other.refusal is not None:
            raise other.refusal
        rank = other.hello.node_rank
        for hello in (self._own, *(joined.hello for joined in self.joined.values())):
            if hello.node_rank == rank:
                raise UserError(
                    f"two machines have launch.node_rank={rank}: {hello.host} and {other.hello.host}",
                    hint=f"number them from 0 to {self._nnodes - 1}",
                )
        self._known.remove(other)
        self.joined[rank] = other

    def _forget(self, other: _Other, say: Say) -> None:
        if other in self._known:
            self._known.remove(other)
        elif self.joined.pop(other.hello.node_rank, None) is not None:
            say(f"{other.name} has left again")

    def dismiss(self, status: int, message: str | None) -> None:
        """Let all that are here end with this status."""
        for other in [*self._known, *self.joined.values()]:
            other.channel.send("end", status=status, message=message)
            other.channel.close()
        for channel in self._strangers:
            channel.close()


def _outcome(message: Mapping[str, Any], where: str) -> Outcome:
    cause = message.get("cause")
    rank_and_code = None if cause is None else (int(cause[0]), int(cause[1]))
    said = message.get("message")
    lost = None if said is None else f"{where}: {said}"
    return Outcome(int(message["status"]), rank_and_code, bool(message.get("stopped")), where, lost)


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


def another_command(who: str, reasons: Sequence[str]) -> UserError:
    """The error for a machine that was not told what machine 0 was told."""
    listed = "".join(f"\n    {line}" for line in reasons)
    return UserError(
        f"{who} was given another command than machine 0:{listed}",
        hint="give every machine the same command, but for launch.node_rank",
    )


def printable(text: str) -> str:
    """What a stranger sent, without the signs that a terminal would obey."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def not_shared(folder: Path | str, other: str, who: str) -> UserError:
    """The error for a run's folder that is not one and the same on all machines."""
    return UserError(
        f"machine 0 writes to {folder}, and {who} sees nothing of it in {other}",
        hint="output_dir must be a folder that all machines share, such as one on NFS",
    )


def endpoint_of(launch: LaunchConfig) -> tuple[str, int]:
    """Host and port of `launch.rdzv_endpoint`; UserError when it is no such thing."""
    host, colon, port = (launch.rdzv_endpoint or "").rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65535):
        raise UserError(
            f"launch.rdzv_endpoint={launch.rdzv_endpoint} is not allowed with launch.nnodes={launch.nnodes}",
            hint="allowed: HOST:PORT of machine 0, the same on every machine; PORT and PORT + 1 must be free",
        )
    return host, int(port)


def _listen(address: str, port: int) -> socket.socket:
    """A socket that the other machines can reach; on all interfaces, unless the address is a loopback one."""
    try:
        if address == "localhost" or address.startswith("127."):
            return socket.create_server((address, port), backlog=64)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=64, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=64)
    except OSError as error:
        raise UserError(
            f"machine 0 cannot listen at port {port}: {error.strerror}",
            hint=f"launch.rdzv_endpoint={address}:ANOTHER_PORT, the same on every machine",
        ) from None


def _nobody_came(launch: LaunchConfig, rendezvous: _Rendezvous) -> UserError:
    missing = [str(rank) for rank in range(1, launch.nnodes) if rank not in rendezvous.joined]
    _, port = endpoint_of(launch)
    missed = f"machine {', '.join(missing)} of {launch.nnodes} did not come within {launch.join_seconds} s"
    return UserError(
        missed if rendezvous.refusal is None else f"{missed}; {rendezvous.refusal.message}",
        hint="start the same command there with its own launch.node_rank, let nothing block ports "
        f"{port} and {port + 1}, or wait longer: launch.join_seconds",
    )
