"""Start a step's ranks by forking a process that has everything imported.

Each rank is a process of its own under torchrun's environment contract: it can be killed, told to stop
and waited for. A start costs tenths of a second instead of the eight that the imports take.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (
    "pytest", "torch", "deepspeed", "deepspeed.ops", "setuptools", "pandas", "pyarrow.compute", "omegaconf",
    "rich.console", "peft", "transformers.optimization", "transformers.generation.utils",
    "transformers.models.llama.modeling_llama", "step1_sft.train", "step1_sft.__main__", "tests.forked",
)  # fmt: skip
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}
SECONDS = 120.0
"""After which a rank is taken to hang; those that it had to wait for a core are not counted."""

FIRST_PORT, PORTS, WORKERS = 10_240, 1_400, 16
_ports = itertools.count(os.getpid())  # two suites at a time begin at different ones

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(IMPORTED))


@dataclass
class Ranks:
    """All ranks of one start, and the file with everything they printed."""

    processes: list[Any]
    output: Path

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def tell(self, number: int, ranks: Sequence[int]) -> None:
        """Send a signal to some ranks."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        """SIGKILL all of them."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()

    def finish(self) -> list[int]:
        """Wait for all; exit codes by rank. One that hangs is killed, and so has -9; the output says it."""
        has_time = self.patience()
        while running := [process for process in self.processes if process.is_alive()]:
            if not has_time():
                hang = [rank for rank, process in enumerate(self.processes) if process in running]
                with self.output.open("a") as output:
                    print(f"ranks {hang} did not end within {SECONDS:.0f} s and were killed", file=output)
                break
            multiprocessing.connection.wait([process.sentinel for process in running], 0.5)
        self.kill()
        return [process.exitcode for process in self.processes]

    def patience(self) -> Callable[[], bool]:
        """Tells, asked now and then, whether `SECONDS` from now on are not over."""
        began, before, most = time.monotonic(), self._without_core(), 0.0

        def has_time() -> bool:
            nonlocal most
            for rank, seconds in self._without_core().items():
                most = max(most, seconds - before.get(rank, 0.0))
            return time.monotonic() - began < SECONDS + most

        return has_time

    def _without_core(self) -> dict[int, float]:
        """Of each rank that runs, `seconds_without_core`."""
        alive = ((rank, process.pid) for rank, process in enumerate(self.processes) if process.is_alive())
        return {rank: seconds_without_core(number) for rank, number in alive}


def seconds_without_core(process: int) -> float:
    """In which its first thread waited for a core; 0 where it has ended, or the kernel does not say."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def start(program: Callable[..., int], arguments: Sequence[Any], size: int, output: Path) -> Ranks:
    """Start `program(*arguments)` on every rank; it must be importable by name, and returns an exit code."""
    _start_server()
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port() if size > 1 else 0)}
    processes = []
    for rank in range(size):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _context.Process(target=_run, args=(environment, str(output), program, tuple(arguments)))
        process.start()
        processes.append(process)
    return Ranks(processes, output)


def run(program: Callable[..., int], arguments: Sequence[Any], size: int, output: Path) -> None:
    """Start it and wait; every rank must exit with 0."""
    codes = start(program, arguments, size, output).finish()
    assert codes == [0] * size, f"exit {codes}\n{output.read_text()[-4000:]}"


def free_port() -> int:
    """One that nothing listens at on loopback, and that nobody is given until it is listened at.

    The system hands out ports from 32768 on, to whoever connects or asks for any: these lie below, in a range
    for each of pytest's workers, and none comes twice in `PORTS` calls.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = FIRST_PORT + PORTS * (worker % WORKERS) + next(_ports) % PORTS
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def sft(config: str, *extra: str) -> int:
    """`python -m step1_sft --config CONFIG ...` in this process."""
    from step1_sft.__main__ import main

    sys.argv = ["step1_sft", "--config", config, *extra]
    return main()


def _start_server() -> None:
    kept = dict(os.environ)
    os.environ.update(ENVIRONMENT)  # the server's children inherit what it was started with
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _run(environment: dict[str, str], output: str, program: Callable[..., int], arguments: tuple) -> None:
    gc.freeze()  # DeepSpeed collects garbage often, each time among everything that was imported
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        status = program(*arguments)
    except Exception:
        traceback.print_exc()
        status = 1
    sys.exit(status)
