"""A machine that follows machine 0: it starts jobs that it knows by name when told to, and nothing else.

Takes a LaunchConfig whose `node_rank` is not 0, what this machine says of itself, and the jobs that machine 0
may ask for (`launch/nodes.py`); returns the exit status with which it is sent home.
"""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import disk_errors
from common.launch_config import LaunchConfig
from launch.agent import STOPPED
from launch.channel import Channel, interface_of
from launch.local import Job, Meeting
from launch.nodes import Hello, another_command, endpoint_of, not_shared, sha256_of
from launch.supervise import POLL_SECONDS, Running, Say, StopRequests

SHARED_SECONDS = 60.0
"""How long a file that machine 0 wrote may take to be seen by another: what NFS remembers, and some."""
_TOKEN = re.compile(r"\.machines-[0-9a-f]{8}")


def follow(launch: LaunchConfig, own: Hello, folder: Path, jobs: Mapping[str, Job], say: Say) -> int:
    """Do what machine 0 says until it sends us home; returns the exit status.

    jobs: all that it may ask for, by name. UserError when it cannot be reached, does not want us, or its
    run's folder is another one than ours.
    """
    with StopRequests() as requests:
        channel = _connect(endpoint_of(launch), launch.join_seconds, requests)
        if channel is None:
            return STOPPED
        try:
            return _Follower(channel, launch, folder, jobs, requests).obey(own, say)
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

    def obey(self, own: Hello, say: Say) -> int:
        """Do what is said until the end; returns the exit status."""
        channel, requests = self.channel, self.requests
        channel.send("hello", node_rank=own.node_rank, ranks=own.ranks, command=own.command, host=own.host)
        is_leaving = False
        while channel.is_open:
            if requests.received and not is_leaving:
                is_leaving = True
                channel.send("leaving", status=STOPPED, stopped=True)
            for message in channel.receive(0.2):
                match message["do"]:
                    case "welcome":
                        self.show_that_we_see(message)
                        say(f"machine {own.node_rank} follows machine 0 at {self.launch.rdzv_endpoint}")
                    case "job" if not is_leaving:
                        self.do(message)
                    case "end":
                        return _end(message) or (STOPPED if requests.received else 0)
        if requests.received:
            return STOPPED
        endpoint = self.launch.rdzv_endpoint
        print(f"machine 0 at {endpoint} is gone: its connection was closed", file=sys.stderr)
        return 1

    def show_that_we_see(self, message: Mapping[str, Any]) -> None:
        """Send back what is in the file that machine 0 wrote into the run's folder."""
        token, differs = str(message["token"]), [str(line) for line in message.get("differs", ())]
        if not _TOKEN.fullmatch(token):
            raise UserError("machine 0 speaks another language", hint="use one version on all machines")
        if not _within(0.0 if differs else SHARED_SECONDS, lambda: _is_there(self.folder, token)):
            ours = str(self.folder.absolute())
            self.channel.send("lost", folder=ours)
            if differs:
                raise another_command("this machine", differs)
            raise not_shared(Path(str(message["folder"])), ours, "this machine")
        with disk_errors(self.folder):
            self.channel.send("found", secret=(self.folder / token).read_text(encoding="utf-8"))

    def do(self, message: Mapping[str, Any]) -> None:
        """Run our part of a job, and say how it ended."""
        name = str(message["name"])
        if name not in self.jobs:
            raise UserError(
                f"machine 0 asks for {name}, which this run does not have", hint="use one version"
            )
        for relative, sha256 in message["files"].items():
            path = self.folder / relative
            if not _within(SHARED_SECONDS, lambda: sha256_of(path) == sha256):  # noqa: B023
                raise UserError(
                    f"{path} is not what machine 0 wrote", hint="all machines must share output_dir"
                )
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
        channel.send("ended", status=outcome.status, cause=outcome.cause, stopped=outcome.stopped)


def _end(message: Mapping[str, Any]) -> int:
    """The status with which machine 0 sends us home; UserError when it has one."""
    status, said = int(message["status"]), message["message"] or "see what was printed there"
    if status == UserError.EXIT_CODE:
        raise UserError(f"machine 0: {said}")
    if status not in (0, STOPPED):
        print(f"machine 0 ended with exit status {status}: {said}", file=sys.stderr, flush=True)
    return status


def _is_there(folder: Path, name: str) -> bool:
    """Whether the folder has the file; it is listed, because NFS remembers for a while what was not there."""
    with contextlib.suppress(OSError):
        return any(path.name == name for path in folder.iterdir())
    return False


def _within(seconds: float, is_so: Callable[[], bool]) -> bool:
    """Whether it becomes so within the time."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _connect(endpoint: tuple[str, int], seconds: float, requests: StopRequests) -> Channel | None:
    """A connection to machine 0, which may be started later than this one; None when told to stop."""
    address, port = endpoint
    end = time.monotonic() + seconds
    while not requests.received:
        try:
            return Channel(socket.create_connection(endpoint, timeout=5.0))
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"machine 0 did not answer at {address}:{port} for {seconds:.0f} s ({error})",
                    hint="start the same command there with launch.node_rank=0, "
                    "or wait longer: launch.join_seconds",
                ) from None
        time.sleep(0.3)
    return None
