"""A run on the machines of a hostfile, started over ssh.

Takes the launch configuration and the overrides as typed; starts the same command on every machine, in the
same folder and with the same interpreter, prints what they print with the machine's name before it, and
returns the exit status of the run. When one ends badly the others are stopped; signals reach all. Knows
nothing of steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from common.errors import UserError
from common.launch_config import LaunchConfig
from launch.agent import exit_status
from launch.command import machine_arguments, override
from launch.local import PROJECT, python_path
from launch.remote import SAVE_SECONDS
from launch.supervise import Say, StopRequests

OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
"""Never ask for a password; notice within a minute that a machine is gone."""

PASSED_ON = (
    "RLHF_", "WANDB_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_", "NCCL_", "GLOO_",
    "OMP_", "GOMP_", "MKL_", "DS_", "PYTHON", "LD_LIBRARY_PATH", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip
"""Beginnings of the environment variables that every machine gets, in any case of letters."""

NOT_FOUND = 127
LOST = 255


@dataclass(frozen=True)
class Host:
    """A line of the hostfile."""

    name: str  # as ssh takes it: HOST or USER@HOST
    slots: int | None  # ranks; None where the line does not say, or launch.nproc_per_node does
    line: int

    @property
    def is_here(self) -> bool:
        """Whether it is this machine, and needs no ssh."""
        return self.name in ("localhost", socket.gethostname())

    @property
    def address(self) -> str:
        """By which the other machines reach it."""
        name = self.name.rpartition("@")[2]
        return socket.gethostname() if name == "localhost" else name


@dataclass(frozen=True)
class Machine:
    """A machine whose command runs."""

    host: Host
    process: subprocess.Popen[bytes]

    def send(self, line: str) -> None:
        """Write a line to its `launch.remote`; nothing where that has ended."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, or we have hung up
            os.write(self.process.stdin.fileno(), f"{line}\n".encode())

    def hang_up(self) -> None:
        """Leave it alone: its `launch.remote` notices, and ends the command."""
        if self.host.is_here:  # the process is `launch.remote`
            assert self.process.stdin is not None
            self.process.stdin.close()
        else:
            self.process.kill()


def launch(config: LaunchConfig, overrides: Sequence[str], run_dir: Path, say: Say) -> int:
    """Run it on every machine to the end. Returns 0, or the exit status of the machine that failed first.

    overrides: as typed. UserError for a hostfile that cannot be used, and where there is no ssh.
    """
    hosts = hosts_of(config)
    if shutil.which("ssh") is None and not all(host.is_here for host in hosts):
        raise UserError("there is no ssh on this machine", hint="install an OpenSSH client, or launch=local")
    port = random.randrange(20000, 32000, 2)  # noqa: S311 - to be free, not to be secret
    endpoint = config.rdzv_endpoint or f"{hosts[0].address}:{port}"
    shared = machine_arguments(overrides, len(hosts), {"run_name": run_dir.name})
    shared.append(override("launch.rdzv_endpoint", endpoint))
    say(f"ssh       {', '.join(host.name for host in hosts)}; they meet at {endpoint}")
    return Run(config.ssh_options, say).to_the_end(hosts, shared)


def hosts_of(config: LaunchConfig) -> list[Host]:
    """The machines that will be used, each with the ranks it is to have. UserError where none can be."""
    if config.hostfile is None:
        raise UserError(
            "launch=ssh needs the machines: launch.hostfile is missing",
            hint="launch.hostfile=FILE with a line of HOST slots=N for each, machine 0 first",
        )
    return choose(read_hostfile(Path(config.hostfile)), config)


def read_hostfile(path: Path) -> list[Host]:
    """The machines of a hostfile, in its order. UserError naming file and line for what is no host."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"launch.hostfile={path} cannot be read: {reason}", hint="a text file with lines of HOST slots=N"
        ) from None
    hosts: dict[str, Host] = {}
    for number, text in enumerate(lines, 1):
        words = text.partition("#")[0].split()
        if not words:
            continue
        host = Host(words[0], slots_of(words[1:], f"{path}, line {number}"), number)
        if host.name.startswith("-"):
            raise UserError(
                f"{path}, line {number}: {host.name} is not the name of a host", hint="HOST slots=N"
            )
        if host.name in hosts:
            raise UserError(
                f"{path}, line {number}: {host.name} is there already (line {hosts[host.name].line})",
                hint=f"one line with all its ranks: {host.name} slots=N",
            )
        hosts[host.name] = host
    if not hosts:
        raise UserError(
            f"{path} names no host", hint="a line of HOST slots=N for each machine, machine 0 first"
        )
    return list(hosts.values())


def slots_of(words: Sequence[str], place: str) -> int | None:
    """N of `slots=N`; None where there is nothing."""
    if not words:
        return None
    key, _, value = words[0].partition("=")
    if len(words) > 1 or key != "slots" or not value.isdecimal() or int(value) < 1:
        raise UserError(
            f"{place}: {' '.join(words)} is not understood", hint="HOST slots=N, with N of 1 or more"
        )
    return int(value)


def choose(hosts: Sequence[Host], config: LaunchConfig) -> list[Host]:
    """The first launch.nnodes machines, or all where that is 1; each with the ranks it is to have."""
    wanted = config.nnodes if config.nnodes > 1 else len(hosts)
    if wanted > len(hosts):
        raise UserError(
            f"launch.nnodes={wanted}, but {config.hostfile} names {len(hosts)} host(s)",
            hint=f"launch.nnodes={len(hosts)}, or more lines",
        )
    asked = config.nproc_per_node.strip()
    for host in hosts[:wanted]:
        if asked.isdecimal() and host.slots is not None and int(asked) > host.slots:
            raise UserError(
                f"launch.nproc_per_node={asked}, but {config.hostfile}, line {host.line} offers "
                f"{host.name} slots={host.slots}",
                hint="leave launch.nproc_per_node out: each host has the ranks that its line says",
            )
    return [host if asked == "auto" else replace(host, slots=None) for host in hosts[:wanted]]


class Run:
    """A run on several machines, as the machine that starts it sees it."""

    def __init__(self, ssh_options: Sequence[str], say: Say) -> None:
        self.ssh_options = [word for text in ssh_options for word in words_of(text)]
        self.say = say
        self.machines: list[Machine] = []

    def to_the_end(self, hosts: Sequence[Host], arguments: Sequence[str]) -> int:
        """Start every machine and wait for all; returns the exit status."""
        pumps: list[threading.Thread] = []
        with StopRequests() as requests:
            requests.pass_on_to(self.send_signal)
            try:
                for rank, host in enumerate(hosts):
                    machine = self.start(host, [*arguments, *of_machine(rank, host)])
                    self.machines.append(machine)
                    for number in list(requests.received):  # it came while they were being started
                        machine.send(signal.Signals(number).name)
                    pumps += printers(machine)
                status = self.wait()
            finally:
                for machine in self.machines:
                    if machine.process.poll() is None:
                        machine.hang_up()
        for pump in pumps:
            pump.join(10)
        return status

    def start(self, host: Host, arguments: Sequence[str]) -> Machine:
        """Start the command there. Its environment goes through its input: a command line would show it."""
        order = {
            "command": [sys.executable, "-m", "pipeline", *arguments],
            "environment": passed_on(os.environ),
            "folder": str(Path.cwd()),
        }
        process = subprocess.Popen(
            self.command(host),
            env={**os.environ, "PYTHONPATH": python_path(os.environ)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C is passed on, once
        )
        machine = Machine(host, process)
        machine.send(json.dumps(order))
        return machine

    def command(self, host: Host) -> list[str]:
        """What starts `launch.remote` on a machine."""
        if host.is_here:
            return [sys.executable, "-m", "launch.remote"]
        script = (
            f"cd -- {shlex.quote(str(Path.cwd()))} && PYTHONPATH={shlex.quote(str(PROJECT))}:$PYTHONPATH "
            f"exec {shlex.quote(sys.executable)} -m launch.remote; exit {NOT_FOUND}"
        )
        return ["ssh", *OPTIONS, *self.ssh_options, "--", host.name, f"exec /bin/sh -c {shlex.quote(script)}"]

    def wait(self) -> int:
        """Wait for all machines. After the first that fails the others are stopped; returns its status."""
        status, end = 0, 0.0
        running = list(self.machines)
        while running:
            for machine in [machine for machine in running if machine.process.poll() is not None]:
                running.remove(machine)
                code = exit_status(machine.process.returncode)
                if code != 0 and status == 0:
                    status, end = code, time.monotonic() + SAVE_SECONDS
                    self.explain(machine.host, code)
                    for other in running:
                        other.send("SIGTERM")
            if status != 0 and running and time.monotonic() > end:
                for machine in running:
                    machine.send("SIGKILL")
                    machine.hang_up()
            time.sleep(0.05)
        return status

    def explain(self, host: Host, code: int) -> None:
        """Say what the status of a machine means, where the machine itself has not said it."""
        if code == LOST:
            self.say(f"{host.name}: not reached, or no longer (ssh says why, above)")
        elif code == NOT_FOUND:
            self.say(f"{host.name}: needs the same folder and interpreter: {Path.cwd()}, {sys.executable}")
        elif code not in (UserError.EXIT_CODE, 143):
            self.say(f"{host.name}: ended with exit status {code}; the others are stopped")

    def send_signal(self, number: int) -> None:
        """Pass a signal on to all machines."""
        for machine in self.machines:
            machine.send(signal.Signals(number).name)


def words_of(option: str) -> list[str]:
    """The words of an entry of launch.ssh_options."""
    try:
        return shlex.split(option)
    except ValueError as error:
        raise UserError(
            f"launch.ssh_options: {option} is not understood: {error}",
            hint="words as a shell reads them, such as -p 2222; close every quote",
        ) from None


def of_machine(rank: int, host: Host) -> list[str]:
    """The arguments that are one machine's own."""
    own = [override("launch.node_rank", rank)]
    if host.slots is not None:
        own.append(override("launch.nproc_per_node", host.slots))
    return own


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that every machine gets."""
    chosen = {name: value for name, value in environment.items() if name.upper().startswith(PASSED_ON)}
    return {**chosen, "PYTHONPATH": python_path(environment)}


def printers(machine: Machine) -> list[threading.Thread]:
    """Threads that print what a machine prints, with its name before each line."""
    assert machine.process.stdout is not None and machine.process.stderr is not None
    pairs = [(machine.process.stdout, sys.stdout), (machine.process.stderr, sys.stderr)]
    threads = [
        threading.Thread(target=print_lines, args=(machine.host.name, source, target), daemon=True)
        for source, target in pairs
    ]
    for thread in threads:
        thread.start()
    return threads


def print_lines(name: str, source: IO[bytes], target: IO[str]) -> None:
    """Copy lines, each in one piece; once nobody reads them, drop what comes."""
    for line in source:
        text = line.decode(errors="replace").rstrip("\n")
        try:
            target.write(f"[{name}] {text}\n")
            target.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), target.fileno())
