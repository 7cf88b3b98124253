"""Memory, traffic, steps per hour and cost on up to 4,096 GPUs, by formula: `python -m benchmarks.scale`.

Arithmetic, not a measurement: `plan`'s memory formulas (held to a fake GPU's peak at 1B, 7B, 8B and 70B), the
operations of a decoder, ZeRO's traffic (arXiv 1910.02054, section 7), that of ranks that share rows, and
the assumptions in `Cluster`. For every model, number of devices and task it takes the lightest setting that
fits, with the fewest ranks that share a row, and names what breaks first. Prints the tables of docs/scale.md;
writes `results/scale.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.measure import RESULTS, table, write_results
from pipeline.planning.fitting import Room
from pipeline.planning.memory import MemoryEstimate, estimate
from pipeline.planning.network import Network, from_fields
from pipeline.planning.work import Decoding, Head, MicroBatchShape, Sharding, Trained, Workload

GB, HALF = 1e9, 2


@dataclass(frozen=True)
class Cluster:
    """H100 SXM in nodes of eight. What is not a data sheet's figure is an assumption, and says so."""

    memory: float = 80 * GB
    host: float = 250 * GB  # assumed, per device
    operations: float = 989e12  # dense bf16, data sheet
    reached: float = 0.40  # assumed share of it; see the roofline for what is at most possible
    bandwidth: float = 3.35e12  # of the device's memory, bytes per second, data sheet
    read: float = 0.6  # assumed share of it while responses are sampled
    in_node: float = 450 * GB  # NVLink, one direction
    between_nodes: float = 50 * GB  # 400 Gbit/s per device
    per_node: int = 8
    dollars_per_hour: float = 2.5  # assumed
    to_disk: float = 2 * GB  # assumed, bytes per second and node
    hours_to_failure: float = (
        50_700  # of one device: 419 interruptions in 54 days on 16,384 (arXiv 2407.21783)
    )
    from_disk: float = 2 * GB  # assumed, bytes per second and node
    restart_seconds: float = field(default_factory=lambda: restart_measured())
    noticed_later: float = 30  # assumed, on GPUs: seconds until ranks that wait for one are ended

    def wire(self, ranks: int) -> float:
        """Bytes per second that a rank sends in a ring through all of them."""
        return self.in_node if ranks <= self.per_node else self.between_nodes


def restart_measured() -> float:
    """Seconds from the death of a rank to the end of the next step; see `restart_time`."""
    found = json.loads((RESULTS / "restart_time.json").read_text())
    return float(found["medians"]["all"])


@dataclass(frozen=True)
class Model:
    """active: weights that a token passes through; all of them unless it is a mixture of experts."""

    name: str
    network: Network
    active: int


@dataclass(frozen=True)
class Task:
    """An optimizer step: tokens in all, in sequences of one length."""

    name: str
    length: int
    tokens: int = 4 << 20
    networks: int = 1  # that learn: actor and critic
    frozen: int = 0
    response: int = 0  # tokens of a sequence that are sampled

    @property
    def sequences(self) -> int:
        return self.tokens // self.length


@dataclass(frozen=True)
class Outcome:
    """One cell of the tables; memory, host and wire in bytes per rank and step. Where nothing fits, the last
    numbers are None, and memory and host those of the setting that comes nearest: with the least host memory
    of those that the device has room for, or else the least of the device."""

    model: str
    task: str
    devices: int
    sharing: int  # ranks that share a row
    setting: str
    memory: float
    host: float
    wire: float | None
    seconds: float | None
    dollars_per_step: float | None
    breaks_first: str


def llama(hidden: int, intermediate: int, layers: int, heads: int) -> Network:
    """Of Llama 3.1: eight key heads, 128,256 tokens."""
    fields = {
        "vocab_size": 128_256, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
    }  # fmt: skip
    network = from_fields(fields)
    assert network is not None
    return network


def mixture() -> Model:
    """The shape of Qwen3-30B-A3B: 128 experts of 768, eight of them for a token."""
    fields = {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 8 * 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "model_type": "qwen3_moe",
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    }  # fmt: skip
    network = from_fields(fields)
    assert network is not None
    idle = 48 * (128 - 8) * 3 * 2048 * 768
    return Model("30B-A3B", network, network.parameters - idle)


def models() -> list[Model]:
    dense = {
        "8B": llama(4096, 14_336, 32, 32),
        "70B": llama(8192, 28_672, 80, 64),
        "405B": llama(16_384, 53_248, 126, 128),
    }
    return [*(Model(name, network, network.parameters) for name, network in dense.items()), mixture()]


TASKS = (
    Task("SFT, 8k", 8192),
    Task("SFT, 128k", 131_072),
    Task("PPO, 2k", 2048, tokens=1 << 20, networks=2, frozen=2, response=1024),
)
DEVICES = (1, 8, 64, 512, 4096)


@dataclass(frozen=True)
class Setting:
    """offload: inputs of layers in host memory."""

    name: str
    sharding: Sharding
    offload: bool = False


SETTINGS = (
    Setting("ZeRO-1", Sharding(1, 1)),
    Setting("ZeRO-2", Sharding(2, 1)),
    Setting("ZeRO-3", Sharding(3, 1)),
    Setting("ZeRO-3, activations in host memory", Sharding(3, 1), offload=True),
    Setting("ZeRO-3, optimizer in host memory", Sharding(3, 1, offload_optimizer=True)),
    Setting(
        "ZeRO-3, all of these in host memory",
        Sharding(3, 1, offload_optimizer=True, offload_param=True), offload=True,
    ),
)  # fmt: skip


def workload(model: Model, task: Task, ranks: int, sharing: int, setting: Setting) -> Workload:
    """One sequence per pass, layers recomputed, feed-forward networks without experts in tiles."""
    part = Trained(model.network, model.network.parameters, Head.tokens)
    scored = replace(part, network=model.network.without_head(), head=Head.scalar)
    decoding = Decoding(slots=64, capacity=task.length, gathers=True) if task.response else None
    return Workload(
        networks=(part, scored)[: task.networks],
        batch=MicroBatchShape(task.length // sharing, task.length // sharing, short=False),
        sharding=replace(setting.sharding, ranks=ranks),
        half=True, gpu=True, checkpointing=True, tiled=model.active == model.network.parameters,
        offload_activations=setting.offload, decoding=decoding,
        frozen=(model.network,) * task.frozen,
    )  # fmt: skip


def operations(model: Model, task: Task) -> float:
    """Of a step, all ranks together: 8 per weight and token (forward, backward, forward again), and
    attention: a token reads half of its sequence's keys and values, 2 q operations a piece, four times."""
    net = model.network
    attention = 4 * 2 * net.layers * net.query_width * task.length
    learned = (8 * model.active + attention) * task.tokens * task.networks
    scored = (2 * model.active + attention / 4) * task.tokens * (task.networks + task.frozen)
    return learned + (scored if task.response else 0)


def sampling_seconds(model: Model, task: Task, ranks: int, cluster: Cluster) -> float:
    """A new token of each of 64 slots reads all weights once, and the slots' caches."""
    if not task.response:
        return 0.0
    slots = 64
    net, rounds = model.network, math.ceil(task.sequences / (ranks * slots))
    weights = HALF * net.parameters  # with 64 slots some token takes every expert
    cache = 2 * net.layers * net.kv_width * HALF * slots * task.length / 2
    return rounds * task.response * (weights + cache) / (cluster.bandwidth * cluster.read)


def exchanged_bytes(model: Model, task: Task, ranks: int, sharing: int) -> float:
    """Sent by a rank in a step to those it shares rows with: in every pass and layer queries, keys, values
    and results of its slice, forward, forward again and backward."""
    net, passes = model.network, math.ceil(task.sequences * sharing / ranks)
    per_token = 2 * (net.query_width + net.kv_width) * HALF * (sharing - 1) / sharing
    return 3 * passes * net.layers * per_token * task.length / sharing


def wire_bytes(model: Model, task: Task, ranks: int, sharing: int, stage: int) -> float:
    """Sent by a rank in a step. Stage 1: gradients summed (2 b P) and weights gathered (b P), once; stage 2:
    gradients scattered at every pass (b P) and weights gathered once; stage 3: b P twice to gather and once
    to scatter, at every pass."""
    if ranks == 1:
        return 0.0
    size = HALF * model.network.parameters * (ranks - 1) / ranks
    passes = math.ceil(task.sequences * sharing / ranks)
    per_step = {1: 3 * size, 2: passes * size + size, 3: 3 * size * passes}[stage]
    return per_step * task.networks


def sharings(task: Task, devices: int, cluster: Cluster) -> list[int]:
    """Ranks that may share a row: within a node, and as many as give each device work. PPO's are short."""
    if task.response:
        return [1]
    most = min(devices, cluster.per_node)
    idle = min(most, devices // task.sequences)
    return [ranks for ranks in (1, 2, 4, 8) if max(1, idle) <= ranks <= most]


def lightest(
    model: Model, task: Task, devices: int, cluster: Cluster
) -> tuple[Setting | None, int, int, MemoryEstimate]:
    """(the setting, None if none fits; ranks that share a row; ranks that have work; their memory)"""
    room = Room(cluster.memory, cluster.host)
    smallest: tuple[int, int, MemoryEstimate] | None = None
    for setting in SETTINGS:
        for sharing in sharings(task, devices, cluster):
            ranks = min(devices, task.sequences * sharing)  # further ones have nothing to do
            found = estimate(workload(model, task, ranks, sharing, setting))
            if room.takes(found):
                return setting, sharing, ranks, found
            if smallest is None or _distance(found, room) < _distance(smallest[2], room):
                smallest = sharing, ranks, found
    assert smallest is not None
    return None, *smallest


def _distance(found: MemoryEstimate, room: Room) -> tuple[float, float]:
    """How far a setting that does not fit is from fitting: by the device, then by host memory."""
    return max(found.device, room.device), found.host_at_most


def _too_little(found: MemoryEstimate, cluster: Cluster) -> str:
    """What a setting that does not fit takes too much of."""
    if found.device <= cluster.memory:
        return f"host memory: {found.host_at_most / GB:.0f} GB"
    return f"memory: {max(found.terms, key=lambda term: term.device).name}"


def _by_servers(model: Model, task: Task, ranks: int, sharing: int, cluster: Cluster) -> str:
    """What trains, where vLLM servers on other devices sample, if that fits; else, or if nothing is sampled,
    nothing."""
    for setting in SETTINGS:
        work = workload(model, task, ranks, sharing, setting)
        if work.decoding is None:
            return ""
        needed = estimate(replace(work, decoding=None))
        if Room(cluster.memory, cluster.host).takes(needed):
            return f"; with servers {needed.device / GB:.1f} GB"
    return ""


def outcome(model: Model, task: Task, devices: int, cluster: Cluster) -> Outcome:
    """The lightest setting that fits, and what limits it."""
    setting, sharing, ranks, found = lightest(model, task, devices, cluster)
    if setting is None:
        limit = _too_little(found, cluster) + _by_servers(model, task, ranks, sharing, cluster)
        return Outcome(
            model.name, task.name, devices, sharing, "none fits", found.device, found.host_at_most,
            None, None, None, limit,
        )  # fmt: skip
    wire = wire_bytes(model, task, ranks, sharing, setting.sharding.stage)
    exchanged = exchanged_bytes(model, task, ranks, sharing)
    computing = operations(model, task) / (ranks * cluster.operations * cluster.reached)
    sending = wire / cluster.wire(ranks)
    sampling = sampling_seconds(model, task, ranks, cluster)
    # gradients and weights are sent while others are computed, at best; slices are waited for
    seconds = max(computing, sending) + exchanged / cluster.in_node + sampling
    if ranks < devices:
        breaks = f"{task.sequences:,} sequences for {devices:,} devices"
    elif sending > computing + sampling:
        breaks = "the wire"
    elif sampling > computing:
        breaks = "sampling"
    else:
        breaks = "computation"
    cost = seconds * devices * cluster.dollars_per_hour / 3600
    return Outcome(
        model.name, task.name, devices, sharing, setting.name, found.device, found.host_at_most,
        wire + exchanged, seconds, cost, breaks,
    )  # fmt: skip


@dataclass(frozen=True)
class Survival:
    """How often a run of so many devices is hit, and what the best interval between checkpoints costs."""

    model: str
    devices: int
    hours_to_failure: float
    checkpoint_seconds: float
    restart_seconds: float  # from a failure to the end of the first step after it, without work done again
    interval_minutes: float  # of Young's formula, the square root of 2 C M
    lost: float  # share of the time: writing, work done again, restarts
    lost_hourly: float  # the same with an hour between checkpoints


CHECKPOINT = 14
"""Bytes per weight: the weight, its master, AdamW's two states."""


def survival(model: Model, devices: int, cluster: Cluster) -> Survival:
    """All nodes write a checkpoint, each its share."""
    mean = cluster.hours_to_failure / devices * 3600
    share = CHECKPOINT * model.network.parameters / math.ceil(devices / cluster.per_node)
    writing, restarting = share / cluster.to_disk, restart(model, share, cluster)

    def lost(interval: float) -> float:
        return writing / interval + (interval / 2 + restarting) / mean

    best = math.sqrt(2 * writing * mean)
    return Survival(
        model.name, devices, mean / 3600, writing, restarting, best / 60, lost(best), lost(3600.0)
    )  # fmt: skip


def restart(model: Model, share: float, cluster: Cluster) -> float:
    """What was measured with a small model, and what grows: each node reads the network that training began
    with, whole, and its share of the checkpoint (bytes)."""
    read = HALF * model.network.parameters + share
    return cluster.noticed_later + cluster.restart_seconds + read / cluster.from_disk


def outcomes(cluster: Cluster) -> Iterator[Outcome]:
    for task in TASKS:
        for model in models():
            for devices in DEVICES:
                yield outcome(model, task, devices, cluster)


def rendered(found: list[Outcome], task: Task) -> str:
    """The table of one task."""
    rows = []
    for each in found:
        if each.task != task.name:
            continue
        fits = each.seconds is not None and each.wire is not None and each.dollars_per_step is not None
        rows.append(
            [
                each.model, each.devices, each.sharing, each.setting, each.memory / GB,
                each.wire / GB if fits else "-",  # type: ignore[operator]
                3600 / each.seconds if fits else "-",  # type: ignore[operator]
                each.dollars_per_step if fits else "-",
                each.breaks_first,
            ]
        )  # fmt: skip
    head = [
        "model",
        "devices",
        "share a row",
        "lightest setting",
        "GB",
        "GB sent",
        "steps/h",
        "$/step",
        "limited by",
    ]
    return table(head, rows)


def main() -> int:
    """Print the tables, write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    arguments = parser.parse_args()
    cluster = Cluster()
    found = list(outcomes(cluster))
    survivals = [survival(model, devices, cluster) for model in models() for devices in DEVICES[1:]]
    for task in TASKS:
        print(f"\n{task.name}: {task.tokens:,} tokens per step\n{rendered(found, task)}")
    head = ["model", "devices", "h to a failure", "s of a checkpoint", "s of a restart"]
    head += ["min between checkpoints", "% of time lost", "% if they are hourly"]
    lost = [
        [
            s.model, s.devices, s.hours_to_failure, s.checkpoint_seconds, s.restart_seconds,
            s.interval_minutes, 100 * s.lost, 100 * s.lost_hourly,
        ]
        for s in survivals
    ]  # fmt: skip
    print(f"\nfailures\n{table(head, lost)}")
    result = {
        "cluster": asdict(cluster),
        "outcomes": [asdict(each) for each in found],
        "survivals": [asdict(each) for each in survivals],
    }
    print(f"written: {write_results('scale', result, to=arguments.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
