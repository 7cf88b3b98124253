"""One rank: `python -m launch.rank [--parent PID] [--log-dir DIR] MODULE ARGUMENTS...`

Runs MODULE as `python -m MODULE ARGUMENTS...` would, in this process, after two preparations: the
rank dies when the process that started it does, and only the first rank writes to the terminal. What
the others print goes to `DIR/rank_N.log`, and so do their tracebacks; their stderr stays the terminal's,
because an error that a person must read may come from any of them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Become the module."""
    parser = argparse.ArgumentParser(prog="python -m launch.rank")
    parser.add_argument("--parent", type=int)
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.parent is not None:
        die_with(args.parent)
    log = None if os.environ.get("RANK", "0") == "0" else log_file(args.log_dir)
    if log is not None:
        _redirect_stdout(log)
    run(args.module, args.arguments, log)


def run(module: str, arguments: list[str], log: Path | None) -> None:
    """Run the module as __main__. With a log, a traceback is written there instead of to the terminal."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception:
        if log is None:
            raise
        with open(log, "a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        sys.exit(1)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the process `parent`, which started it, dies.

    Without it, ranks of a killed controller would go on and write into a run nobody watches.
    Does nothing where the kernel is not Linux.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above took effect
        os._exit(128 + signal.SIGKILL)


def log_file(folder: Path | None) -> Path | None:
    """This rank's log; its folder is made. None without a folder."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"rank_{os.environ.get('RANK', '0')}.log"


def _redirect_stdout(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    os.dup2(descriptor, 1)
    os.close(descriptor)


if __name__ == "__main__":
    main()
