"""What to set when a run does not fit into memory: overrides, each with what it would need.

Takes a configuration, a step and its ranks; returns lines for a person. By the same estimate as `plan`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from common.stage import Step
from launch.local import count_gpus
from pipeline.config import PipelineConfig
from pipeline.planning import devices, memory, workload
from pipeline.planning.whole import LAYER_BY_LAYER, SERVERS, sampled_whole
from pipeline.planning.work import Workload, with_sharding

WORTH_NAMING = 0.97
"""A way out needs less than this share of what the run needs."""


OFFLOAD = "model.activation_offload=true"
FULL = 8.0
SMALLER_STATES = {"adamw_bf16": 4.0, "adamw_8bit": 2.0}
"""Bytes of AdamW's states for each weight."""
GPUS = {"H100 (85.5 GB)": 81_559 * 2**20, "H200 (151 GB)": 143_771 * 2**20}
"""Bytes as nvidia-smi says them."""


def ways_out(config: PipelineConfig, step: Step, ranks: int, *, ranks_here: int | None = None) -> list[str]:
    """After a run died of memory: how much was short by the estimate, and what would fit, the mildest first.

    ranks: of the whole run; ranks_here: of this machine, all by default. Empty where the model's sizes are
    not known.
    """
    gpu = count_gpus() > 0
    work = workload.workload_of(config, step, ranks, gpu=gpu)
    if work is None:
        return []
    available = devices.memory_per_rank(gpu, ranks_here or ranks)
    needed = memory.estimate(work).device
    lines = [f"a rank needs about {needed / 1e9:.2f} GB"]
    if available is not None:
        short = needed - available
        lines[0] += f" and has {available / 1e9:.2f} GB"
        lines[0] += f": {short / 1e9:.2f} GB short" if short > 0 else ", shared with what else runs here"
    limit = min(needed * WORTH_NAMING, needed if available is None else available)
    return lines + ways_out_of(work, step, config, limit)


def ways_out_of(work: Workload, step: Step, config: PipelineConfig, limit: float) -> list[str]:
    """Overrides with which a rank needs at most `limit` bytes; all together when none alone is enough."""
    now = memory.estimate(work).device
    found = {  # all together may be one alone
        override: size
        for override, other in variants(work, step, config)
        if (size := memory.estimate(other).device) < now * WORTH_NAMING
    }
    fitting = {override: size for override, size in found.items() if size <= limit}
    return [
        f"{override}: about {size / 1e9:.2f} GB instead of {now / 1e9:.2f}"
        for override, size in (fitting or found).items()
    ]


def variants(work: Workload, step: Step, config: PipelineConfig) -> Iterator[tuple[str, Workload]]:
    """(overrides, the work with them): smaller passes, recomputation, its inputs in host memory, smaller
    optimizer states, sharding and offload; and all of these but the states."""
    name, micro = step.value, getattr(config, step.value).train.micro_batch_size
    smallest, small = work, ""
    rows = micro
    while rows > 1:
        rows = max(1, rows // 2)
        small = f"{name}.train.micro_batch_size={rows}"
        smallest = with_rows(work, rows / micro)
        yield small, smallest
    recompute = "model.gradient_checkpointing=true"
    if not work.checkpointing:
        selective = dataclasses.replace(work, checkpointing=True, selective=True)
        yield f"{recompute} model.checkpointing_policy=selective", selective
    else:
        recompute = "model.checkpointing_policy=full" if work.selective else ""
    if recompute:
        yield recompute, in_full(work)
    moved = ""
    if work.gpu and not work.offload_activations:
        moved = f"{OFFLOAD} model.compile=false" if config.model.compile else OFFLOAD
        yield f"{recompute} {moved}".lstrip(), offloaded(work)
    for optimizer, state_bytes in SMALLER_STATES.items():
        if work.gpu and (smaller := with_states(work, state_bytes)) != work:
            yield f"optim@{name}.optim={optimizer}", smaller
    for option, other in sharded(work):
        yield f"deepspeed={option}", other
    yield from elsewhere(work, config)
    everything = offloaded(smallest) if work.gpu else in_full(smallest)
    parts = [small, recompute, moved]
    for option, other in [("", everything), *sharded(everything)]:
        together = " ".join(filter(None, [*parts, f"deepspeed={option}" if option else ""]))
        yield together, other
        yield from ((f"{together} {way}".lstrip(), least) for way, least in elsewhere(other, config))


def elsewhere(work: Workload, config: PipelineConfig) -> Iterator[tuple[str, Workload]]:
    """With no whole copy of the actor on a rank: sampled by vLLM servers, which take no adapters; or on
    ZeRO-3 layer by layer."""
    if sampled_whole(work) == 0:
        return
    if not config.model.lora.enabled:
        yield SERVERS, dataclasses.replace(work, decoding=None)
    if work.decoding is not None and work.decoding.gathers:
        layered = dataclasses.replace(work.decoding, gathers=False)
        yield LAYER_BY_LAYER, dataclasses.replace(work, decoding=layered)


def in_full(work: Workload) -> Workload:
    """With layers that are recomputed in full; feed-forward networks are in tiles where none is compiled."""
    return dataclasses.replace(work, checkpointing=True, selective=False, tiled=not work.compiled)


def offloaded(work: Workload) -> Workload:
    """With the inputs of recomputed layers in host memory; none is compiled then."""
    return dataclasses.replace(in_full(work), offload_activations=True, tiled=True, compiled=False)


def with_states(work: Workload, state_bytes: float) -> Workload:
    """With that many bytes for AdamW's two states of a weight instead of 8."""
    networks = tuple(
        dataclasses.replace(part, state_bytes=state_bytes if part.state_bytes == FULL else part.state_bytes)
        for part in work.networks
    )
    return dataclasses.replace(work, networks=networks)


def with_rows(work: Workload, share: float) -> Workload:
    """With a share of the rows in each pass."""
    batch = work.batch
    fewer = dataclasses.replace(
        batch,
        tokens=max(1, round(batch.tokens * share)),
        trained=max(1, round(batch.trained * share)),
        documents=math.ceil(batch.documents * share),
    )
    return dataclasses.replace(work, batch=fewer)


def largest_rows(work: Workload, rows: int, limit: float, most: int) -> int:
    """The most rows of a pass, up to `most`, with which a rank needs at most `limit` bytes; 0: not even one.

    rows: that the work has now.
    """
    fits = (memory.estimate(with_rows(work, number / rows)).device <= limit for number in range(1, most + 1))
    return sum(1 for _ in itertools.takewhile(bool, fits))


def rows_that_fit(work: Workload, step: Step, config: PipelineConfig, ranks: int, here: float | None) -> str:
    """The largest micro-batch on this GPU (here: bytes, None: not known) and on others, in a line."""
    train, ranks = getattr(config, step.value).train, config.launch.data_ranks(ranks)
    most, rows = math.ceil(train.global_batch_size / ranks), workload.rows_per_pass(train, ranks)
    sizes = {**({} if here is None else {"here": here}), **GPUS}
    found = [
        f"{largest_rows(work, rows, size, most) or 'none'} {name if name == 'here' else f'on an {name}'}"
        for name, size in sizes.items()
    ]
    line = f"largest {step.value}.train.micro_batch_size that fits, up to {most}: {', '.join(found)}"
    ways = [
        f"{name} takes one row with {way}"
        for name, size in GPUS.items()
        if largest_rows(work, rows, size, 1) == 0 and (way := way_for_one_row(work, rows, step, config, size))
    ]
    return "; ".join([line, *ways])


def way_for_one_row(
    work: Workload, rows: int, step: Step, config: PipelineConfig, limit: float
) -> str | None:
    """The mildest override with which one row fits into `limit` bytes; None: none does, nor do all together.

    rows: that the work has now.
    """
    fitting = (
        override
        for override, other in variants(with_rows(work, 1 / rows), step, config)
        if "micro_batch_size" not in override and memory.estimate(other).device <= limit
    )
    return next(fitting, None)


def sharded(work: Workload) -> Iterator[tuple[str, Workload]]:
    """On the stages of `conf/deepspeed` that shard or offload more."""
    for option, (stage, offload_optimizer, offload_param) in OPTIONS.items():
        if stage > work.sharding.stage or (offload_optimizer and work.gpu):
            yield option, with_sharding(work, stage, offload_optimizer, offload_param)


OPTIONS = {
    "zero2": (2, False, False),
    "zero3": (3, False, False),
    "zero2_offload": (2, True, False),
    "zero3_offload": (3, True, True),
}
"""Files of conf/deepspeed: the stage, and whether the optimizer and the weights are offloaded."""
