"""Steps whose states alone are larger than memory: refused before anything starts.

Takes a configuration and the ranks; returns nothing. Rows are not read: what is refused would not fit with a
pass of one token, and without samples. Whether full rows fit is said by `plan`. The
estimate may be wrong: only what is beyond memory by more than its error is refused.
"""

from __future__ import annotations

import dataclasses
import math

from common.errors import UserError
from pipeline.config import PipelineConfig
from pipeline.planning import devices, memory
from pipeline.planning.fitting import variants
from pipeline.planning.work import MicroBatchShape, Workload
from pipeline.planning.workload import workload_of

ERROR = 1.1
"""The estimate is at most this many times what a rank takes; see benchmarks/results/memory_plan.json."""
WAYS = 3
"""So many are named, the mildest first."""
ALL_THE_SAME = "launch.check_memory=false starts it all the same"


def refuse_unfit(config: PipelineConfig, ranks: int, ranks_here: int, *, gpu: bool) -> None:
    """UserError where a rank of this machine has no room for a step, with the nearest settings that have.

    ranks: of the whole run; ranks_here: of this machine. A step whose network is not known here passes.
    """
    if not config.launch.check_memory:
        return
    available, host = devices.memory_per_rank(gpu, ranks_here), devices.host_memory()
    for step in config.steps:
        work = workload_of(config, step, ranks, gpu=gpu)
        if work is None:
            continue
        bare = dataclasses.replace(
            work, batch=MicroBatchShape(1, 1, short=True), decoding=None, saves_beside=False
        )
        needed, on_host = _device_and_host(bare)
        # on the CPU the device is the host
        room, host_room = available or math.inf, (host or math.inf) / ranks_here if gpu else math.inf
        if needed <= ERROR * room and on_host <= ERROR * host_room:
            continue
        fits = [
            f"{override}: about {size[0] / 1e9:,.1f} GB"
            for override, other in variants(bare, step, config)
            if (size := _device_and_host(other))[0] <= room and size[1] <= host_room
        ]
        what = (
            f"about {needed / 1e9:,.1f} GB besides what its rows take, and {'a GPU' if gpu else 'its share'}"
        )
        there = f"here has {room / 1e9:,.1f} GB"
        if needed <= ERROR * room:
            what = f"about {on_host / 1e9:,.1f} GB of host memory, and its share of that"
            there = f"here is {host_room / 1e9:,.1f} GB"
        raise UserError(
            f"{step.value}: a rank needs {what} {there}",
            hint="\n  ".join([*(fits[:WAYS] or ["no setting makes it fit: more ranks"]), ALL_THE_SAME]),
        )


def _device_and_host(work: Workload) -> tuple[float, float]:
    """Bytes that a rank needs of its device, and of host memory beside a GPU, also while it loads."""
    found = memory.estimate(work)
    return found.device, max(found.host, found.host_to_load)
