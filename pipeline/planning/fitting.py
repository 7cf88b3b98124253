"""What to set when a run does not fit into memory: overrides, each with what it would need.

Takes a configuration, a step and its ranks; returns lines for a person. By the same estimate as `plan`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from common.stage import Step
from launch.local import count_gpus
from pipeline.config import PipelineConfig
from pipeline.planning import devices, memory, workload
from pipeline.planning.memory import MemoryEstimate
from pipeline.planning.whole import LAYER_BY_LAYER, SERVERS, sampled_whole
from pipeline.planning.work import Workload, with_sharding

WORTH_NAMING = 0.97
"""A way out needs less than this share of what the run needs."""


OFFLOAD = "model.activation_offload=true"
WAITS = "{}.train.async_save=false"
FULL = 8.0
SMALLER_STATES = {"adamw_bf16": 4.0, "adamw_8bit": 2.0}
"""Bytes of AdamW's states for each weight."""
GPUS = {"H100 (85.5 GB)": 81_559 * 2**20, "H200 (151 GB)": 143_771 * 2**20}
"""Bytes as nvidia-smi says them."""


@dataclass(frozen=True)
class Room:
    """Bytes that a rank may use of its device and, beside a GPU, of host memory; without end where that is
    not known."""

    device: float
    host: float = math.inf

    @classmethod
    def here(cls, gpu: bool, ranks_here: int) -> Room:
        """On this machine, with so many ranks of it."""
        of_device = devices.memory_per_rank(gpu, ranks_here)
        of_host = devices.host_memory_per_rank(gpu, ranks_here)
        return cls(math.inf if of_device is None else of_device, math.inf if of_host is None else of_host)

    def takes(self, needed: MemoryEstimate) -> bool:
        """Whether there is room, on the device and in host memory, also while a network is loaded."""
        return needed.device <= self.device and needed.host_at_most <= self.host


def ways_out(config: PipelineConfig, step: Step, ranks: int, *, ranks_here: int | None = None) -> list[str]:
    """After a run died of memory: how much was short by the estimate, and what would fit, the mildest first.

    ranks: of the whole run; ranks_here: of this machine, all by default. Empty where the model's sizes are
    not known.
    """
    gpu = count_gpus() > 0
    work = workload.workload_of(config, step, ranks, gpu=gpu)
    if work is None:
        return []
    room = Room.here(gpu, ranks_here or ranks)
    needed = memory.estimate(work)
    line = f"a rank needs about {needed.device / 1e9:.2f} GB"
    if room.device < math.inf:
        short = needed.device - room.device
        line += f" and has {room.device / 1e9:.2f} GB"
        line += f": {short / 1e9:.2f} GB short" if short > 0 else ", shared with what else runs here"
    if needed.host_at_most > room.host:
        short = needed.host_at_most - room.host
        line += f"; of host memory {needed.host_at_most / 1e9:.2f} GB, {short / 1e9:.2f} GB short"
    else:
        room = dataclasses.replace(room, device=min(needed.device * WORTH_NAMING, room.device))
    return [line, *ways_out_of(work, step, config, room)]


def ways_out_of(work: Workload, step: Step, config: PipelineConfig, room: Room) -> list[str]:
    """Overrides with which a rank has room; where none gives it that, those that need less of the device.

    None is named that host memory has no room for; where that is what is short, none that does not fit.
    """
    now = memory.estimate(work)
    if now.host_at_most > room.host:
        return [
            f"{override}: about {needed.device / 1e9:.2f} GB, of host memory {needed.host_at_most / 1e9:.2f} "
            f"GB instead of {now.host_at_most / 1e9:.2f}"
            for override, needed in dict(settings_that_fit(work, step, config, room)).items()
        ]
    found = {  # all together may be one alone
        override: needed.device
        for override, needed in in_host_memory(work, step, config, room)
        if needed.device < now.device * WORTH_NAMING
    }
    fitting = {override: size for override, size in found.items() if size <= room.device}
    return [
        f"{override}: about {size / 1e9:.2f} GB instead of {now.device / 1e9:.2f}"
        for override, size in (fitting or found).items()
    ]


def settings_that_fit(
    work: Workload, step: Step, config: PipelineConfig, room: Room
) -> Iterator[tuple[str, MemoryEstimate]]:
    """(overrides with which a rank has room, what it needs then), the mildest first."""
    found = in_host_memory(work, step, config, room)
    return ((override, needed) for override, needed in found if needed.device <= room.device)


def in_host_memory(
    work: Workload, step: Step, config: PipelineConfig, room: Room
) -> Iterator[tuple[str, MemoryEstimate]]:
    """(overrides with which a rank has room in host memory, what it needs then); if it takes that, without
    a checkpoint that is held there."""
    for override, other in variants(work, step, config):
        needed = memory.estimate(other)
        if needed.host_at_most > room.host and other.saves_beside:
            override = f"{override} {WAITS.format(step.value)}"
            needed = memory.estimate(dataclasses.replace(other, saves_beside=False))
        if needed.host_at_most <= room.host:
            yield override, needed


def variants(work: Workload, step: Step, config: PipelineConfig) -> Iterator[tuple[str, Workload]]:
    """(overrides, the work with them): no copy of a checkpoint in host memory, smaller passes, recomputation,
    its inputs in host memory, smaller optimizer states, sharding and offload; and all but copy and states."""
    name, micro = step.value, getattr(config, step.value).train.micro_batch_size
    if work.gpu and work.saves_beside:
        yield WAITS.format(name), dataclasses.replace(work, saves_beside=False)
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


def largest_rows(work: Workload, rows: int, room: Room, most: int) -> int:
    """The most rows of a pass, up to `most`, that a rank has room for; 0: not even one.

    rows: that the work has now.
    """
    fits = (room.takes(memory.estimate(with_rows(work, number / rows))) for number in range(1, most + 1))
    return sum(1 for _ in itertools.takewhile(bool, fits))


def rows_that_fit(work: Workload, step: Step, config: PipelineConfig, ranks: int, here: Room | None) -> str:
    """The largest micro-batch on this GPU (None: not known) and on others, in a line. What host memory other
    GPUs lie beside is not known."""
    train, ranks = getattr(config, step.value).train, config.launch.data_ranks(ranks)
    most, rows = math.ceil(train.global_batch_size / ranks), workload.rows_per_pass(train, ranks)
    others = {name: Room(size) for name, size in GPUS.items()}
    found = [
        f"{largest_rows(work, rows, room, most) or 'none'} {name if name == 'here' else f'on an {name}'}"
        for name, room in {**({} if here is None else {"here": here}), **others}.items()
    ]
    line = f"largest {step.value}.train.micro_batch_size that fits, up to {most}: {', '.join(found)}"
    ways = [
        f"{name} takes one row with {way}"
        for name, room in others.items()
        if largest_rows(work, rows, room, 1) == 0 and (way := way_for_one_row(work, rows, step, config, room))
    ]
    return "; ".join([line, *ways])


def way_for_one_row(work: Workload, rows: int, step: Step, config: PipelineConfig, room: Room) -> str | None:
    """The mildest override with which there is room for one row; None: none does, nor do all together.

    rows: that the work has now.
    """
    fitting = settings_that_fit(with_rows(work, 1 / rows), step, config, room)
    return next((override for override, _ in fitting if "micro_batch_size" not in override), None)


def sharded(work: Workload) -> Iterator[tuple[str, Workload]]:
    """On the stages of `conf/deepspeed` that shard or offload more, or shard as much and offload nothing."""
    now = work.sharding
    for option, (stage, offload_optimizer, offload_param) in OPTIONS.items():
        onto_device = stage == now.stage and now.offload_optimizer and not offload_optimizer
        if stage > now.stage or onto_device or (offload_optimizer and work.gpu):
            yield option, with_sharding(work, stage, offload_optimizer, offload_param)


OPTIONS = {
    "zero2": (2, False, False),
    "zero3": (3, False, False),
    "zero2_offload": (2, True, False),
    "zero3_offload": (3, True, True),
}
"""Files of conf/deepspeed: the stage, and whether the optimizer and the weights are offloaded."""
