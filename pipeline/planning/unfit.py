"""Steps whose states alone are larger than memory: refused before anything starts.

Takes a configuration and the ranks; returns nothing. Rows are not read: what is refused would not fit with a
pass of one token, and without samples. Whether full rows fit is said by `plan`. The
estimate may be wrong: only what is beyond memory by more than its error is refused.
"""

from __future__ import annotations

import dataclasses

from common.errors import UserError
from pipeline.config import PipelineConfig
from pipeline.planning import memory
from pipeline.planning.fitting import Room, settings_that_fit
from pipeline.planning.work import MicroBatchShape
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
    room = Room.here(gpu, ranks_here)
    for step in config.steps:
        work = workload_of(config, step, ranks, gpu=gpu)
        if work is None:
            continue
        bare = dataclasses.replace(
            work, batch=MicroBatchShape(1, 1, short=True), decoding=None, saves_beside=False
        )
        needed = memory.estimate(bare)
        if Room(ERROR * room.device, ERROR * room.host).takes(needed):
            continue
        fits = [
            f"{override}: about {found.device / 1e9:,.1f} GB"
            for override, found in settings_that_fit(bare, step, config, room)
        ]
        device = "a GPU" if gpu else "its share"
        what = f"about {needed.device / 1e9:,.1f} GB besides what its rows take, and {device}"
        there = f"here has {room.device / 1e9:,.1f} GB"
        if needed.device <= ERROR * room.device:
            what = f"about {needed.host_at_most / 1e9:,.1f} GB of host memory, and its share of that"
            there = f"here is {room.host / 1e9:,.1f} GB"
        raise UserError(
            f"{step.value}: a rank needs {what} {there}",
            hint="\n  ".join([*(fits[:WAYS] or ["no setting makes it fit: more ranks"]), ALL_THE_SAME]),
        )
