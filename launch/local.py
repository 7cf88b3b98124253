"""Start a step's ranks on this machine, under torchrun's environment contract.

Takes a module to run and how many ranks it has, returns the started process. One rank is started
directly; more, also on several machines, are started and watched by torchrun's elastic agent
(`launch/agent.py`). Devices are counted without torch. Waiting, signals, exit statuses and restarts
are those of `launch/supervise.py`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path

from common.cores import count_cores
from common.errors import UserError
from common.launch_config import LaunchConfig, Launcher

PROJECT = Path(__file__).resolve().parent.parent
"""Folder that holds the packages, so that ranks find them from any working directory."""

SPINS = 10_000
"""How often a waiting thread looks again before it sleeps, where it may: well under a millisecond."""

KERNELS = {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
"""How many compiled kernels torch and oneDNN keep on the CPU. Packed rows vary in length, and in bf16 each
length has kernels of its own: with the default, 1,024 each, a model of 4M parameters grows by 25 MB per
micro-batch. What the layers of a micro-batch share still fits: it is no slower."""

KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 26), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
"""How glibc is told to keep what was freed. By default the end of its heap goes back after every backward
pass, and the kernel clears it at the next use (`benchmarks/results/allocator_bf16.json`). Tensors of 64 MiB
and more are mapped anew all the same: few are made, and kept ones leave gaps that no other fits."""
TCMALLOC = "tcmalloc_minimal"
"""An allocator that keeps it too, with less memory; taken where it is installed."""

ALLOWED_LOAD = 0.2
"""Share of a machine's processor time that others may use while it still counts as idle."""


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of several machines meet."""

    nnodes: int
    node_rank: int  # of this machine: it has the ranks after those of the machines before it
    address: str  # of machine 0
    port: int
    run_id: str  # of this start; another one for each restart
    interface: str | None = None  # the network interface that leads to the others, where it is known


@dataclass(frozen=True)
class Job:
    """A module to be run by a number of ranks."""

    module: str
    arguments: tuple[str, ...]
    ranks: int = 1  # on this machine
    log_dir: Path | None = None  # output and tracebacks of the ranks after the first
    meeting: Meeting | None = None  # with other machines

    @property
    def is_one_process(self) -> bool:
        """Whether its only rank is started directly."""
        return self.ranks == 1 and self.meeting is None


def gpus_of(launch: LaunchConfig) -> int | None:
    """GPUs of each machine that runs the steps; None where that is another one, and nothing says how many."""
    if not launch.is_elsewhere:
        return count_gpus()
    asked = {Launcher.slurm: launch.slurm.gpus_per_node, Launcher.k8s: launch.k8s.gpus_per_node}
    return asked.get(launch.kind)


def ranks_of(launch: LaunchConfig) -> int:
    """How many ranks the configuration asks for on each machine. UserError when it cannot have them.

    A machine of which nothing is known is taken to have as many GPUs as this one.
    """
    known, asked = gpus_of(launch), launch.nproc_per_node.strip()
    if asked == "auto":
        return max(count_gpus() if known is None else known, 1)
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(
            f"launch.nproc_per_node={asked} is not allowed", hint="allowed: auto, or a number from 1"
        )
    if known and known < int(asked):
        here, there = (
            f"this machine offers {known} GPU(s)",
            f"launch.{launch.kind.value}.gpus_per_node={known}",
        )
        raise UserError(
            f"launch.nproc_per_node={asked}, but {there if launch.is_elsewhere else here}",
            hint=f"launch.nproc_per_node={known}, or auto",
        )
    return int(asked)


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """CUDA devices that a process started here may use; 0 on a machine without."""
    present = _gpus_present()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or present == 0:
        return present
    count = 0
    for device in (part.strip() for part in visible.split(",")):
        # CUDA ignores everything after the first entry that names no device.
        if not device or device == "-1" or (device.isdecimal() and int(device) >= present):
            break
        count += 1
    return count


def start(job: Job, *, keep_open: Sequence[int] = (), report: int | None = None) -> subprocess.Popen[bytes]:
    """Start the job in a process group of its own; it is killed when this process dies.

    keep_open: file descriptors the process inherits, such as the lock of the run's folder. report: the one
    that torchrun's agent, where there is one, writes to which rank failed.
    """
    inherited = [*keep_open, *([] if report is None else [report])]
    return subprocess.Popen(
        command(job, report),
        env={**os.environ, **environment(job)},
        stdin=subprocess.DEVNULL,
        pass_fds=tuple(inherited),
        process_group=0,  # Ctrl-C reaches the ranks once, through the caller, not once per process
    )


def command(job: Job, report: int | None = None) -> list[str]:
    """The command line that runs the job on this machine."""
    logs = [] if job.log_dir is None else ["--log-dir", str(job.log_dir)]
    parent = ["--parent", str(os.getpid())]
    what = [job.module, *job.arguments]
    if job.is_one_process:
        return [sys.executable, "-m", "launch.rank", *parent, *logs, *what]
    options = ["--ranks", str(job.ranks), *parent, *logs]
    if report is not None:
        options += ["--report", str(report)]
    if job.meeting is not None:
        meeting = job.meeting
        options += ["--nnodes", str(meeting.nnodes), "--node-rank", str(meeting.node_rank)]
        options += ["--rdzv-endpoint", f"{meeting.address}:{meeting.port}", "--run-id", meeting.run_id]
    return [sys.executable, "-m", "launch.agent", *options, *what]


def environment(job: Job) -> dict[str, str]:
    """What the job's process needs beside this process's own environment."""
    values = {"PYTHONPATH": python_path()}
    if "OMP_NUM_THREADS" not in os.environ:
        values["OMP_NUM_THREADS"] = str(max(1, count_cores() // job.ranks))
    values |= {name: value for name, value in KERNELS.items() if name not in os.environ}
    if not count_gpus():
        values |= allocator()
        # spares DeepSpeed its search and a warning, also in processes that are no ranks
        values["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        values |= _how_threads_wait()
    values |= {name: value for name, value in _interfaces(job.meeting).items() if name not in os.environ}
    if job.is_one_process:
        values |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        # 0: torch takes one that is free when it listens; one chosen here could be taken by then
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return values


def allocator(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that have a process keep freed memory; none where the user chose an allocator."""
    if not {"LD_PRELOAD", "GLIBC_TUNABLES", *KEEPING}.isdisjoint(environment):
        return {}
    library = find_library(TCMALLOC)
    return KEEPING if library is None else {"LD_PRELOAD": library}


def python_path(environment: Mapping[str, str] = os.environ) -> str:
    """PYTHONPATH with this project in front, so that it is found from any folder."""
    return os.pathsep.join([str(PROJECT), *filter(None, [environment.get("PYTHONPATH")])])


def _interfaces(meeting: Meeting | None) -> dict[str, str]:
    """The network interfaces that ranks listen on: of one machine on its loopback, closed to all others.

    gloo would take the address that this machine's name stands for: of several machines on Debian one of the
    loopback, and of one machine perhaps one that others reach.
    """
    if meeting is not None:
        return {"GLOO_SOCKET_IFNAME": meeting.interface} if meeting.interface else {}
    present = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in present), None)  # Linux, BSD
    return {} if loopback is None else {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": f"={loopback}"}


def _how_threads_wait() -> dict[str, str]:
    """What OpenMP's threads do until the next parallel loop begins.

    Asleep, they wake too late for small matrices: on two cores of an EPYC a step of the demo took 80 ms, and
    45 ms with threads that spin for a moment first. But who spins takes the core from whoever it waits for:
    beside one other busy process that step took 260 ms, and 80 asleep.
    """
    return {"GOMP_SPINCOUNT": str(SPINS)} if is_idle() else {"OMP_WAIT_POLICY": "PASSIVE"}


def is_idle(seconds: float = 0.1) -> bool:
    """Whether this machine does next to nothing, watched for so long; False where that cannot be seen."""
    before = _busy_and_all()
    time.sleep(seconds)
    after = _busy_and_all()
    if before is None or after is None:
        return False
    busy, ticks = after[0] - before[0], after[1] - before[1]
    return busy <= ALLOWED_LOAD * ticks


def _busy_and_all() -> tuple[int, int] | None:
    """Clock ticks that the machine's processors worked, and those that have passed, since it was started."""
    try:
        counts = [int(count) for count in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle, waiting_for_disk = counts[3:5]
    except (OSError, ValueError, IndexError):  # not Linux
        return None
    return sum(counts) - idle - waiting_for_disk, sum(counts)


def _gpus_present() -> int:
    """GPUs of this machine or container, asked of the driver's own tool where there is one."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        try:
            listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            listed = None
        if listed is not None and listed.returncode == 0:
            return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    # Device nodes, because /proc/driver/nvidia also names GPUs that a container may not use.
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()])
