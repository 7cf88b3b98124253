"""Run a Python program as one rank or several, under torchrun's environment contract."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_ranks(
    command: Sequence[str], size: int, env: Mapping[str, str] | None = None, **popen: object
) -> list[subprocess.Popen]:
    """Start `python *command` once per rank; each rank is its own process group's member."""
    shared = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "disabled",
        **(env or {}),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **popen,  # type: ignore[call-overload]
        )
        for rank in range(size)
    ]


def run_ranks(command: Sequence[str], size: int, env: Mapping[str, str] | None = None) -> list[str]:
    """Run to the end; every rank must exit with 0. Returns each rank's output."""
    processes = start_ranks(command, size, env)
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * size, f"exit {codes}\n" + "\n".join(outputs)
    return outputs
