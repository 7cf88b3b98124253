"""A machine that follows machine 0: it starts jobs that it knows by name when told to, and nothing else.

Takes a LaunchConfig whose `node_rank` is not 0, what this machine says of itself, and the jobs that machine 0
may ask for (`launch/nodes.py`); returns the exit status with which it is sent home.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.deadline import within
from common.errors import UserError
from common.launch_config import LaunchConfig
from launch.agent import STOPPED
from launch.channel import Channel, Message, interface_of
from launch.local import Job, Meeting
from launch.nodes import SECRET_BYTES, SHARED, Hello, endpoint_of, secret_file, sha256_of
from launch.supervise import POLL_SECONDS, Running, Say, StopRequests

SHARED_SECONDS = 60.0
"""How long a file that machine 0 wrote may take to be seen by another: what NFS remembers, and some."""
ANSWER_SECONDS = 5.0
"""How long machine 0 may take to be reached, to prove itself, and to answer."""


def follow(launch: LaunchConfig, own: Hello, folder: Path, jobs: Mapping[str, Job], say: Say) -> int:
    """Do what machine 0 says until it sends us home; returns the exit status.

    jobs: all that it may ask for, by name. UserError when it cannot be reached, does not want us, or its
    run's folder is another one than ours.
    """
    with StopRequests() as requests:
        met = _connect(launch, own, secret_file(folder, launch), requests)
        if met is None:
            return STOPPED
        channel, messages = met
        try:
            return _Follower(channel, launch, folder, jobs, requests).obey(messages, say)
        except UserError as error:
            channel.send("ended", status=UserError.EXIT_CODE, message=error.message)
            raise
        finally:
            channel.close()


@dataclass(frozen=True)
class _Follower:
    """This machine, connected to machine 0."""

    channel: Channel
    launch: LaunchConfig
    folder: Path
    jobs: Mapping[str, Job]
    requests: StopRequests

    def obey(self, messages: Sequence[Message], say: Say) -> int:
        """Do what is said until the end, first these messages; returns the exit status."""
        channel, requests, endpoint = self.channel, self.requests, self.launch.rdzv_endpoint
        is_leaving = False
        while messages or channel.is_open:
            for message in messages:
                match message["do"]:
                    case "welcome":
                        say(f"machine {self.launch.node_rank} follows machine 0 at {endpoint}")
                    case "job" if not is_leaving:
                        self.do(message)
                    case "end":
                        return _end(message) or (STOPPED if requests.received else 0)
            if requests.received and not is_leaving:
                is_leaving = True
                channel.send("leaving", status=STOPPED, stopped=True)
            messages = channel.receive(0.2)
        if requests.received:
            return STOPPED
        print(f"machine 0 at {endpoint} is gone: its connection was closed", file=sys.stderr)
        return 1

    def do(self, message: Mapping[str, Any]) -> None:
        """Run our part of a job, and say how it ended."""
        name = str(message["name"])
        if name not in self.jobs:
            raise UserError(
                f"machine 0 asks for {name}, which this run does not have", hint="use one version"
            )
        end = time.monotonic() + SHARED_SECONDS
        for relative, sha256 in message["files"].items():
            path = self.folder / relative
            while sha256_of(path) != sha256:
                if time.monotonic() > end:
                    raise UserError(f"{path} is not what machine 0 wrote", hint=SHARED)
                time.sleep(0.1)
        launch, channel = self.launch, self.channel
        assert launch.node_rank is not None
        address, port = endpoint_of(launch)
        run_id, interface = str(message["run_id"]), interface_of(channel.own_address)
        meeting = Meeting(launch.nnodes, launch.node_rank, address, port + 1, run_id, interface)
        running = Running(replace(self.jobs[name], meeting=meeting), (), self.requests)
        while (outcome := running.wait(POLL_SECONDS)) is None:
            for order in channel.receive():
                if order["do"] == "halt":
                    running.halt(float(order["seconds"]))
            if not channel.is_open:
                running.halt(0.0)
        told = {name: getattr(outcome, name) for name in ("status", "cause", "stopped", "oom_killed")}
        channel.send("ended", **told)


def _end(message: Mapping[str, Any]) -> int:
    """The status with which machine 0 sends us home; UserError when it has one."""
    status, said = int(message["status"]), message["message"] or "see what was printed there"
    if status == UserError.EXIT_CODE:
        raise UserError(f"machine 0: {said}")
    if status not in (0, STOPPED):
        print(f"machine 0 ended with exit status {status}: {said}", file=sys.stderr, flush=True)
    return status


def _connect(
    launch: LaunchConfig, own: Hello, file: Path, requests: StopRequests
) -> tuple[Channel, list[Message]] | None:
    """A connection to machine 0, which may be started later, and its answer; None when told to stop."""
    address, port = endpoint_of(launch)
    end = time.monotonic() + launch.join_seconds
    proof_by: float | None = None  # from when on machine 0 was reached
    while not requests.received:
        try:
            connection = within(
                ANSWER_SECONDS, lambda: socket.create_connection((address, port), ANSWER_SECONDS)
            )
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"machine 0 did not answer at {address}:{port} for {launch.join_seconds} s ({error})",
                    hint="start the same command there with launch.node_rank=0, "
                    "or wait longer: launch.join_seconds",
                ) from None
        else:
            if (met := _greet(connection, _secret_of(file), own)) is not None:
                return met
            proof_by = proof_by or time.monotonic() + SHARED_SECONDS
            if time.monotonic() > proof_by:
                raise UserError(
                    f"this machine finds in {file.parent} no secret that machine 0 at {address}:{port} knows",
                    hint=f"{SHARED}, and launch.rdzv_endpoint written alike on all of them",
                )
        time.sleep(0.3)
    return None


def _greet(
    connection: socket.socket, secret: bytes | None, own: Hello
) -> tuple[Channel, list[Message]] | None:
    """The connection, on which both sides have proved to know the secret, and what machine 0 says first."""
    if secret is not None:
        with contextlib.suppress(OSError):
            channel = Channel(connection, secret, is_machine_0=False)
            if channel.receive(ANSWER_SECONDS):
                channel.send("hello", **asdict(own))
                if messages := channel.receive(ANSWER_SECONDS):
                    return channel, messages
    connection.close()
    return None


def _secret_of(file: Path) -> bytes | None:
    """What the file holds; its folder is listed, because NFS remembers for a while what was not there."""
    with contextlib.suppress(OSError):
        if any(path.name == file.name for path in file.parent.iterdir()):
            secret = file.read_bytes()
            return secret if len(secret) == SECRET_BYTES else None
    return None
