"""What every benchmark needs: the machine in words, a child process measured from outside, results on disk.

Takes command lines and numbers; returns plain values and writes `results/<name>.json`. It trains nothing
and knows no library that is compared. CPU-seconds are those of a whole process tree, so that they mean
the same for a program that starts others; they hardly move when the machine is busy, unlike wall time.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
POLL_SECONDS = 0.02
PACKAGES = ("torch", "transformers", "deepspeed", "trl", "datasets", "tokenizers")


class ChildFailed(RuntimeError):
    """A measured process ended with another status than 0; the text has the end of its output."""


@dataclass(frozen=True)
class Usage:
    """What a whole process tree took, from start to exit."""

    wall_seconds: float
    cpu_seconds: float
    peak_rss_mb: float  # 10^6 bytes, of its largest process


@dataclass(frozen=True)
class Tick:
    """Seen from outside, when a process had finished its `step`-th step."""

    step: int
    wall_seconds: float  # since the process began
    cpu_seconds: float  # of the process tree until then, also of those in it that have ended


def machine() -> dict[str, Any]:
    """Processor, cores, versions, commit, date and the load of the last minute."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": _gpu_name(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),  # noqa: TID251
        "load_average": round(os.getloadavg()[0], 2),
    }


def run_measured(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    steps_file: Path | None = None,
) -> tuple[Usage, list[Tick]]:
    """Run a command to its end; its output goes to `log`. ChildFailed when its status is not 0.

    steps_file: a file to which the process appends a line per step. One `Tick` is returned for each line,
    as seen within `POLL_SECONDS`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, cwd=PROJECT, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
            stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        ticks, status, usage = _watch(process.pid, began, steps_file)
    except BaseException:
        process.kill()
        raise
    process.returncode = status
    wall = time.monotonic() - began
    if status != 0:
        raise ChildFailed(f"{' '.join(command)} ended with status {status}:\n{_tail(log)}")
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6), ticks


def _watch(pid: int, began: float, steps_file: Path | None) -> tuple[list[Tick], int, Any]:
    """Poll until the process is gone: (ticks, exit status, its resource usage with its children's)."""
    ticks: list[Tick] = []
    seen = 0
    while True:
        waited, status, usage = os.wait4(pid, os.WNOHANG)
        if waited:
            return ticks, os.waitstatus_to_exitcode(status), usage
        if steps_file is not None and steps_file.exists() and (size := steps_file.stat().st_size) > seen:
            seen = size
            lines = steps_file.read_bytes().count(b"\n")
            ticks.append(Tick(lines, time.monotonic() - began, _cpu_of_tree(pid)))
        time.sleep(POLL_SECONDS)


def _cpu_of_tree(pid: int) -> float:
    import psutil

    total = 0.0
    with_children = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in with_children:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
        total += times.children_user + times.children_system  # of those that ended and were waited for
    return total


def steady_rate(
    ticks: Sequence[Tick], totals: Sequence[int], skip: int = 2, unit: str = "tokens"
) -> dict[str, float]:
    """How many per CPU-second and per second of wall time after the first `skip` steps.

    totals: the running total of `unit` after each step (`totals[0]` after the first).
    """
    first = next(tick for tick in ticks if tick.step >= skip)
    last = ticks[-1]
    if last.step <= first.step:
        raise ValueError(f"{last.step} steps are too few to leave out {skip}")
    done = totals[last.step - 1] - totals[first.step - 1]
    return {
        f"{unit}_per_cpu_second": done / (last.cpu_seconds - first.cpu_seconds),
        f"{unit}_per_second": done / (last.wall_seconds - first.wall_seconds),
    }


def median_of(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each number over several runs."""
    return {name: statistics.median(record[name] for record in records) for name in records[0]}


def threads_environment(threads: int) -> dict[str, str]:
    """The same threading for every side: so many OpenMP threads, which sleep while they wait."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
        "RAYON_NUM_THREADS": str(threads),
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONUNBUFFERED": "1",
    }


def write_results(name: str, result: Mapping[str, Any], *, to: Path | None = None) -> Path:
    """Write `<name>.json` with the machine and the command beside the result. Returns its path."""
    folder = RESULTS if to is None else to
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    command = " ".join(["python -m", _module_name(), *sys.argv[1:]])
    record = {"command": command, "machine": machine(), **result}
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Text columns: the first to the left, the others to the right; floats with four digits that count."""
    cells = [[*head], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return "benchmarks" if spec is None else spec.name


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit measured, with a + where files under version control were changed."""

    def git(*arguments: str) -> str:
        asked = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=True)
        return asked.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _tail(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
