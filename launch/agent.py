"""Several ranks: `python -m launch.agent --ranks N [--parent PID] [--log-dir DIR] MODULE ARGUMENTS...`

Starts N ranks of MODULE on this machine through torchrun's elastic agent and waits for them. Ends
with the exit status of the rank that failed first, without a traceback of its own. A signal that
asks to stop is passed to every rank once and then waited for: the ranks agree on when to save.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from common.errors import UserError
from launch.rank import die_with

STOPPED = 143
"""Exit status of ranks that were told to stop and saved."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS = 60
"""How long ranks may take to end after one was told to stop, before they are killed: time to finish a save.
After a rank failed, torch gives the others 30 s of its own."""


def main() -> int:
    """Run the ranks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.agent")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.parent is not None:
        die_with(args.parent)
    stopping = forward_signals()
    logs = [] if args.log_dir is None else ["--log-dir", str(args.log_dir)]
    rank = ["-m", "launch.rank", "--parent", str(os.getpid()), *logs, args.module, *args.arguments]
    failures = run_ranks(args.ranks, rank)
    first = first_failure(failures)
    if first is None:
        return 0
    number, exit_code = first
    status = exit_status(exit_code, stopping=bool(stopping))
    # Rank 0 shows its own traceback, and a status of 2 comes with a message already printed.
    if number != 0 and status not in (UserError.EXIT_CODE, STOPPED):
        tell(number, exit_code, args.log_dir)
    return status


def run_ranks(ranks: int, arguments: Sequence[str]) -> list[tuple[int, int]]:
    """Run `python ARGUMENTS` in every rank; (rank, exit code) of those that failed, the earliest first."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent reports a failed rank at length; what matters is said by `tell` in two lines.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    with tempfile.TemporaryDirectory(prefix="rlhf_agent_") as folder:
        options: dict[str, Any] = {
            "min_nodes": 1,
            "max_nodes": 1,
            "nproc_per_node": ranks,
            "run_id": f"local_{os.getpid()}",
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "127.0.0.1:0",
            "local_addr": "127.0.0.1",
            "max_restarts": 0,
            "logs_specs": DefaultLogsSpecs(log_dir=folder),
            # Its own handler would give the ranks 30 s and end with a traceback.
            "signals_to_handle": "SIGQUIT",
            "shutdown_timeout": GRACE_SECONDS,
        }
        config = LaunchConfig(**{name: value for name, value in options.items() if name in known})
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            found = sorted(error.failures.items(), key=lambda item: (item[1].timestamp, item[0]))
            return [(rank, failure.exitcode) for rank, failure in found]
    return []


def first_failure(failures: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The failure that explains the others: not a rank that was merely told to stop, if there is another."""
    causes = [(rank, code) for rank, code in failures if code not in (STOPPED, -signal.SIGTERM)]
    return next(iter(causes or failures), None)


def exit_status(exit_code: int, *, stopping: bool) -> int:
    """A rank's exit code as ours: death by signal as 128 + signal, by a signal to stop as told to stop."""
    if exit_code >= 0:
        return exit_code
    if stopping and -exit_code in STOP_SIGNALS:
        return STOPPED
    return 128 - exit_code


def forward_signals() -> list[int]:
    """Pass SIGTERM and SIGUSR1 on to the ranks, each once; returns the growing list of those passed on."""
    passed_on: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number in passed_on:
            return
        passed_on.append(number)
        ranks = children(os.getpid())
        if not ranks:
            sys.exit(STOPPED)
        for process in ranks:
            os.kill(process, number)

    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controller turns it into SIGTERM
    return passed_on


def children(parent: int) -> list[int]:
    """Ranks that `parent` started and that are alive, by process id."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            # After the command's name, which may hold anything, come state and parent.
            ancestor = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            is_rank = ancestor == parent and b"launch.rank" in (folder / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if is_rank:
            found.append(int(folder.name))
    return found


def tell(rank: int, exit_code: int, log_dir: Path | None) -> None:
    """Name the rank that failed first and show the end of its log, which the terminal has not seen."""
    print(f"rank {rank} failed first (exit status {exit_code})", file=sys.stderr)
    log = None if log_dir is None else log_dir / f"rank_{rank}.log"
    if log is not None and log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        print(f"the end of {log}:", *lines, sep="\n  ", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
