"""Several ranks, through torchrun's elastic agent:
`python -m launch.agent --ranks N [--parent PID] [--log-dir DIR] [--report FD]
[--nnodes N --node-rank K --rdzv-endpoint HOST:PORT --run-id ID] MODULE ARGUMENTS...`

Starts N ranks of MODULE on this machine and waits for them. Ends with the exit status of the rank whose
failure explains the others, without a traceback of its own, and writes "RANK EXIT_CODE" of that rank to the
file descriptor FD. A signal that asks to stop is passed to every rank once and then waited for: the ranks
agree on when to save. Restarts nothing: the agent cannot tell what a person has to fix (exit status 2) or who
was told to stop (143) from a rank that died (see `launch/supervise.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from common.errors import UserError
from launch.rank import die_with

STOPPED = 143
"""Exit status of ranks that were told to stop and saved."""
STALLED = 75
"""Exit status of ranks that ended because one of them hangs (`common/runtime/heartbeat.py`) and is named."""
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
    parser.add_argument("--report", type=int)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--rdzv-endpoint")
    parser.add_argument("--run-id", default=f"local_{os.getpid()}")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.parent is not None:
        die_with(args.parent)
    stopping = forward_signals()
    logs = [] if args.log_dir is None else ["--log-dir", str(args.log_dir)]
    rank = ["-m", "launch.rank", "--parent", str(os.getpid()), *logs, args.module, *args.arguments]
    meeting = meeting_options(args.nnodes, args.node_rank, args.rdzv_endpoint)
    try:
        failures = run_ranks(args.ranks, rank, {**meeting, "run_id": args.run_id})
    except ConnectionError as error:
        print(f"the ranks could not meet at {args.rdzv_endpoint}: {error}", file=sys.stderr)
        return 1
    first = first_failure([(rank, as_told(code, stopping=bool(stopping))) for rank, code in failures])
    if first is None:
        return 0
    if args.report is not None:
        os.write(args.report, "{} {}".format(*first).encode())
    return exit_status(first[1])


def meeting_options(nnodes: int, node_rank: int, endpoint: str | None) -> dict[str, Any]:
    """What torchrun's agent is told about where the ranks meet.

    Those of one machine on its loopback interface. Several machines are numbered by the user (`static`): the
    rendezvous named `c10d` would number them by the order of their names, and rank 0, which has the terminal,
    could be on any.
    """
    from launch import rendezvous

    rendezvous.register()
    return {
        "rdzv_backend": rendezvous.BACKEND if node_rank == 0 else "static",
        "rdzv_endpoint": endpoint or rendezvous.LOOPBACK,
        "rdzv_configs": {"rank": node_rank},
        "min_nodes": nnodes,
        "max_nodes": nnodes,
    }


def run_ranks(ranks: int, arguments: Sequence[str], meeting: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Run `python ARGUMENTS` in every rank; (rank, exit code) of those that failed, in their order.

    Without those that torch has killed because another one failed. ConnectionError when the machines cannot
    meet.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent reports a failed rank at length; what matters is said by the controller in two lines.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    failed_before = note_what_fails_first()
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    with tempfile.TemporaryDirectory(prefix="rlhf_agent_") as folder:
        options: dict[str, Any] = {
            "nproc_per_node": ranks,
            "max_restarts": 0,
            "logs_specs": DefaultLogsSpecs(log_dir=folder),
            # Its own handler would give the ranks 30 s and end with a traceback.
            "signals_to_handle": "SIGQUIT",
            "shutdown_timeout": GRACE_SECONDS,
            **meeting,
        }
        config = LaunchConfig(**{name: value for name, value in options.items() if name in known})
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            return [
                (rank, failure.exitcode)
                for rank, failure in sorted(error.failures.items())
                if failure.pid in failed_before or -failure.exitcode not in (signal.SIGTERM, signal.SIGKILL)
            ]
        except DistError as error:
            raise ConnectionError(str(error).splitlines()[0]) from None
    return []


def note_what_fails_first() -> set[int]:
    """A set that will have the ranks, by process id, that have failed when torch begins to end the others."""
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    failed: set[int] = set()
    close = SubprocessContext.close

    def note_and_close(context: SubprocessContext, *how: Any, **more: Any) -> None:
        if not failed:  # torch closes more than once
            processes = [handler.proc for handler in context.subprocess_handlers.values()]
            failed.update(process.pid for process in processes if process.poll())
        close(context, *how, **more)

    SubprocessContext.close = note_and_close  # type: ignore[method-assign,assignment]
    return failed


def first_failure(failures: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The failure that explains the others.

    A message to the user, then death by a signal that none of us sent (the others fail because that rank
    is gone), then any other; last, ranks that were merely told to stop.
    """
    return min(failures, key=lambda failure: gravity(failure[1]), default=None)


def gravity(exit_code: int) -> int:
    """How little a failure explains: 0 for a cause, more for what may be its consequence."""
    if exit_code in (UserError.EXIT_CODE, STALLED):
        return 0
    if exit_code == STOPPED:
        return 3
    return 1 if exit_code < 0 else 2


def as_told(exit_code: int, *, stopping: bool) -> int:
    """The exit code of a rank that we told to stop, if so, and that may have died of it.

    One that died of a signal to stop from elsewhere keeps its code: the others fail because it is gone.
    """
    return STOPPED if stopping and -exit_code in STOP_SIGNALS else exit_code


def exit_status(exit_code: int) -> int:
    """A rank's exit code as ours: death by signal as 128 + signal, by a signal to stop as told to stop."""
    if -exit_code in STOP_SIGNALS:
        return STOPPED
    return exit_code if exit_code >= 0 else 128 - exit_code


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


if __name__ == "__main__":
    sys.exit(main())
