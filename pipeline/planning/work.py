"""The work of a step as the estimates take it: networks, a micro-batch, and the settings that matter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

from pipeline.planning.network import Network

FP32 = 4
"""Bytes of a number."""


class Head(Enum):
    """What lies above the decoder in training."""

    tokens = "tokens"  # cross-entropy of trained tokens
    scalar = "scalar"  # one number per document or token


@dataclass(frozen=True)
class MicroBatchShape:
    """The largest micro-batch of a rank. short: its documents have at most 256 tokens. documents, longest:
    their number and the tokens of the longest, also those of the ranks that share its rows."""

    tokens: int
    trained: int
    short: bool = True
    documents: int = 0
    longest: int = 0


@dataclass(frozen=True)
class Sharding:
    """What of the DeepSpeed settings decides memory. hpz: ranks that hold each weight once more (hpZ)."""

    stage: int
    ranks: int
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket_size: int = 200_000_000
    overlap_comm: bool = True
    hpz: int = 1


@dataclass(frozen=True)
class Trained:
    """One network that learns. trained: weights that do; state_bytes: the optimizer's, for each of them."""

    network: Network
    trained: int
    head: Head
    state_bytes: float = 8.0
    quantized: bool = False


@dataclass(frozen=True)
class Decoding:
    """Responses decoded side by side. slots and tokens of each slot, as the cache is allocated. by_vllm:
    with weights of its own. cache_bytes: of a cache that is given a size; None: of the slots. gathers: ZeRO-3
    holds all weights meanwhile."""

    slots: int
    capacity: int
    by_vllm: bool = False
    cache_bytes: float | None = None
    gathers: bool = False


@dataclass(frozen=True)
class Workload:
    """Everything that an estimate depends on."""

    networks: tuple[Trained, ...]  # each learns in its turn
    batch: MicroBatchShape
    sharding: Sharding
    half: bool  # bf16 or fp16
    gpu: bool
    checkpointing: bool = False
    selective: bool = False  # of checkpointing: matrix products and attention are kept
    tiled: bool = False  # of checkpointing: feed-forward networks run in tiles
    offload_activations: bool = False  # of checkpointing: inputs of layers are in host memory
    decoding: Decoding | None = None
    frozen: tuple[Network, ...] = ()
    offload_frozen: bool = False
    averaged: bool = False
    fp16: bool = False  # of the two half precisions
    compiled: bool = False  # the decoder's layers
    loaded_whole: bool = False  # also at stage 3
    saves_beside: bool = False  # checkpoints are held in host memory
    sharing: int = 1  # ranks that share each row

    @property
    def weight_bytes(self) -> int:
        """Of one weight in the forward pass."""
        return 2 if self.half else FP32


def with_stage(work: Workload, stage: int) -> Workload:
    """The same work on another ZeRO stage; offload stays where that stage has it."""
    now = work.sharding
    return with_sharding(work, stage, now.offload_optimizer and stage >= 2, now.offload_param and stage == 3)


def with_sharding(work: Workload, stage: int, offload_optimizer: bool, offload_param: bool) -> Workload:
    """The same work, sharded and offloaded otherwise."""
    sharding = dataclasses.replace(
        work.sharding, stage=stage, offload_optimizer=offload_optimizer, offload_param=offload_param
    )
    return dataclasses.replace(work, sharding=sharding)
