"""Probes of cores, memory, GPUs and of what torch makes of them. `judge_` functions weigh what was found."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.config import Dtype, dtype_on
from common.cores import count_cores
from launch.local import count_gpus, python_path
from pipeline.doctor.findings import GIB, Findings, Machine, note, ok, warning
from pipeline.planning import devices

LEAST_MEMORY = GIB
"""What one rank of the smallest model takes, its imports included."""
LEAST_SHARED = 128 * 2**20
"""/dev/shm through which GPUs of one machine talk; containers offer 64 MiB unless told otherwise."""
FASTER = 1.2
"""By which factor another dtype has to be faster to be worth a word."""


def cores(machine: Machine) -> Findings:
    """CPU cores that a run may use, and whether they are free."""
    usable, present = count_cores(), os.cpu_count() or 1
    limited = f" of {present} (affinity or a container's quota)" if usable < present else ""
    yield ok("cpu", f"{usable} core(s){limited}, {platform.machine()}")
    load = os.getloadavg()[0]  # of the last minute: the other probes are at work now
    if load > usable / 2:
        yield note("cpu", f"other work is going on (load {load:.1f}): runs will be slower")
    threads = machine.environment.get("OMP_NUM_THREADS")
    if threads is not None and threads.isdecimal() and int(threads) > usable:
        text = f"OMP_NUM_THREADS={threads} on {usable} core(s): threads take turns"
        yield note("cpu", text, "unset OMP_NUM_THREADS: it is then cores divided by ranks")


def memory(machine: Machine) -> Findings:
    """Memory that is free, also within a container's limit."""
    fields, limit, used = devices.machine_memory(), devices.container_limit(), 0
    with suppress(OSError, ValueError, KeyError):  # file caches can be given back
        stats = dict(line.split() for line in (devices.GROUP / "memory.stat").read_text().splitlines())
        used = int((devices.GROUP / "memory.current").read_text()) - int(stats["inactive_file"])
    return judge_memory(fields["MemTotal"], fields["MemAvailable"], limit, max(0, used))


def judge_memory(total: int, free: int, limit: int | None, used: int) -> Findings:
    """What memory is worth. limit, used: a container's, in bytes."""
    within = ""
    if limit is not None and limit < total:
        total, free = limit, min(free, max(0, limit - used))
        within = " (a container's limit)"
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{within}"
    short = f"{text}; a rank takes about {LEAST_MEMORY / GIB:.0f} GiB"
    yield ok("memory", text) if free >= LEAST_MEMORY else warning("memory", short, "end something else")


def gpus(machine: Machine) -> Findings:
    """GPUs as the driver sees them."""
    tool = machine.tool("nvidia-smi")
    nodes = [path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()]
    if tool is None:
        asked = f"{len(nodes)} in /dev, but there is no nvidia-smi to ask about them"
        yield note("gpu", asked if nodes else "none: runs use the CPU")
        return
    fields = "index,name,memory.used,memory.total,driver_version"
    answer = machine.answer(tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    lines = [line for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode == 0 and lines:
        rows = [[field.strip() for field in line.split(",")] for line in lines]
        yield from judge_gpus(rows, machine.environment)
        return
    said = " ".join((answer.stderr or answer.stdout).split())[:200] or "no GPU"
    if nodes:
        way_out = "repair the driver, or CUDA_VISIBLE_DEVICES= to run on the CPU"
        yield warning("gpu", f"{len(nodes)} in /dev, but nvidia-smi fails: {said}", way_out)
    else:
        yield note("gpu", f"none: runs use the CPU (nvidia-smi: {said})")


def judge_gpus(rows: list[list[str]], environment: Mapping[str, str]) -> Findings:
    """What the driver's rows are worth: index, name, MiB used, MiB in all, version of the driver."""
    names = [row[1] for row in rows]
    listed = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    yield ok("gpu", f"{listed}, driver {rows[0][4]}")
    for index, name, used, total, _ in rows:
        if used.isdecimal() and total.isdecimal() and int(used) > 0.1 * int(total):
            text = f"GPU {index} ({name}): {int(used) / 1024:.1f} of {int(total) / 1024:.1f} GiB are in use"
            yield note("gpu", text, "nvidia-smi says by whom")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        offered = count_gpus(environment)
        text = f"CUDA_VISIBLE_DEVICES={visible} leaves {offered} of {len(rows)}"
        yield note("gpu", text, "unset it to use all" if offered < len(rows) else "")


def torch(machine: Machine) -> Findings:
    """What torch makes of the devices, asked in a process of its own."""
    command = (sys.executable, "-m", "pipeline.doctor.torch_probe")
    seconds, path = machine.child_seconds, python_path(machine.environment)
    try:
        answer = machine.answer(*command, seconds=seconds, PYTHONPATH=path)
    except subprocess.TimeoutExpired:
        text = f"did not import and look at the devices within {seconds:.0f} s"
        yield warning("torch", text, "see whether `python -c 'import torch; torch.cuda.init()'` ends")
        return
    if answer.returncode != 0:
        said = (answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[-1]
        yield warning("torch", f"cannot be imported: {said}", "install it again: see constraints.txt")
        return
    found = json.loads(answer.stdout.strip().splitlines()[-1])
    yield from judge_torch(found, count_gpus(machine.environment))
    yield from judge_products(found)


def judge_torch(found: Mapping[str, Any], offered: int) -> Findings:
    """What torch's answer is worth where the launcher would start a rank on each of `offered` GPUs."""
    seen, cuda, version = found["devices"], found["cuda"], found["torch"]
    sees, other_build = f"sees {len(seen)} of {offered} GPU(s)", "install another build"
    why = f": {found['error']}" if found["error"] else ""
    is_short, on_cpu = len(seen) < offered, "CUDA_VISIBLE_DEVICES= to run on the CPU"
    older = "the driver may be older than this CUDA: install another build of torch"
    faults = (
        (not found["gloo"], "has no gloo, over which ranks agree", other_build),
        (is_short and not cuda, f"is for the CPU, on {offered} GPU(s)", f"install a CUDA build, or {on_cpu}"),
        (is_short, f"(CUDA {cuda}) {sees}{why}", older),
        (seen and not found["nccl"], "has no NCCL, over which GPUs talk", other_build),
    )
    for is_so, text, way_out in faults:
        if is_so:
            yield warning("torch", f"{version} {text}", way_out)
            return
    if not seen:
        built = "for the CPU" if cuda is None else f"CUDA {cuda}, unused"
        yield ok("torch", f"{version} ({built}), gloo")
        return
    bf16 = all(device["bf16"] for device in seen)
    built = f"{version} (CUDA {cuda}, NCCL {found['nccl']})"
    yield ok("torch", f"{built}, {len(seen)} GPU(s){', bf16' if bf16 else ''}")
    if not bf16:
        yield note("torch", "not all GPUs compute in bf16, which is the default", "model.dtype=fp16 or fp32")
    if found["apart"]:
        pairs = ", ".join(f"{one}-{other}" for one, other in found["apart"][:8])
        yield note("torch", f"GPUs that do not reach each other's memory: {pairs}: slower collectives")


def judge_products(found: Mapping[str, Any]) -> Findings:
    """Which dtype would be faster here, beside the one that `model.dtype=auto` stands for."""
    speed = found["gflops"]
    if not speed:
        return
    chosen = dtype_on(Dtype.auto, gpu=bool(found["devices"])).value
    other = next(name for name in speed if name != chosen)
    measured = ", ".join(f"{name} {gflops:,.0f}" for name, gflops in speed.items())
    text = f"model.dtype=auto is {chosen} here; matrix products in GFLOP/s: {measured}"
    ratio = speed[other] / speed[chosen]
    rounding = ", with more rounding" if other == Dtype.bf16.value else ""
    way_out = f"model.dtype={other} is {ratio:.1f} times as fast in these{rounding}"
    yield ok("dtype", text) if ratio < FASTER else note("dtype", text, way_out)


def shared_memory(machine: Machine) -> Findings:
    """/dev/shm, which NCCL uses between the GPUs of a machine."""
    return judge_shared_memory(shutil.disk_usage("/dev/shm").free, count_gpus(machine.environment))


def judge_shared_memory(free: int, devices: int) -> Findings:
    """What /dev/shm is worth to so many devices."""
    text = f"{free / GIB:.1f} GiB free"
    if devices > 1 and free < LEAST_SHARED:
        text += f", too little for {devices} GPUs to talk through"
        yield warning("/dev/shm", text, "start the container with --shm-size=8g (or --ipc=host)")
    else:
        yield ok("/dev/shm", text)
