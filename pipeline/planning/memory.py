"""What a device holds at the worst moment of training, term by term. Pure: numbers in, numbers out.

Takes a `Workload` (networks, a micro-batch, the settings that matter), returns a `MemoryEstimate`. Weights,
gradients and optimizer states are those of ZeRO (arXiv 1910.02054, section 3), with DeepSpeed's buffers;
activations are what our packed forward pass keeps for its backward pass. Reads no file, knows no config.

Symbols: P weights, T trained ones, R ranks, b bytes of a weight (4, or 2 in half precision), N tokens and M
trained tokens of a micro-batch, h hidden and i intermediate size, q width of all query heads, k of all keys,
L layers, V vocabulary, B = min(reduce_bucket_size, P).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pipeline.planning.activations import activations, attention_workspace, head_gradient, head_memory
from pipeline.planning.work import FP32, Trained, Workload

CPU_BASE = 463_000_000
"""Resident bytes of a rank before it has a model: Python with torch, DeepSpeed and transformers imported.
Measured by benchmarks/memory_plan.py."""
GPU_BASE = 1_000_000_000
"""CUDA context, libraries' workspaces and what the allocator cannot use; assumed, not measured."""
VLLM_BASE = 450_000_000
"""What vLLM takes beside its weights and its cache: modules, buffers, what a hand-over needs. Seen on the CPU
with SmolLM2 and 32 slots; on a GPU assumed, not measured."""
KERNELS = 100_000_000
"""In half precision on the CPU, at most: kernels that are kept for rows of other lengths (as many as
`launch.local.KERNELS` says), and the freed memory between them. Taken from experiment=gsm8k, whose process
had 60 to 95 MB less with none kept."""
LIVE_PARAMETERS = 1_000_000_000
"""Gathered weights that ZeRO-3 keeps at once: DeepSpeed's stage3_max_live_parameters."""
NF4_BYTES = 0.53
"""Of a 4-bit weight with its doubly quantized scales."""


PINNED_BLOCK = 64 << 20
"""As in `common.model.activation_offload`: bytes of a block of host memory."""

SHARED = ("optimizer", "average")
"""Terms of what ranks save, each its share, beside the weights."""


@dataclass(frozen=True)
class Term:
    """A part of the total, in bytes per rank: on the device and, offloaded, in host memory."""

    name: str
    device: float
    host: float = 0.0


@dataclass(frozen=True)
class MemoryEstimate:
    """All terms. On the CPU, host and device are one memory."""

    terms: tuple[Term, ...]
    gpu: bool
    host_to_load: float = 0.0  # bytes of host memory per rank beside a GPU, until a network is loaded

    @property
    def device(self) -> float:
        """Bytes of the device per rank; on the CPU everything."""
        return sum(term.device + (0 if self.gpu else term.host) for term in self.terms)

    @property
    def host(self) -> float:
        """Bytes of host memory per rank, beside a GPU."""
        return sum(term.host for term in self.terms) if self.gpu else 0.0

    @property
    def host_at_most(self) -> float:
        """Bytes of host memory per rank beside a GPU, also while a network is loaded."""
        return max(self.host, self.host_to_load)

    def of(self, name: str) -> float:
        """Bytes of a term, wherever they are."""
        return sum(term.device + term.host for term in self.terms if term.name == name)


def estimate(work: Workload) -> MemoryEstimate:
    """The peak of one rank.

    Moments compete: the loss of a pass, its backward pass, the update (gradients, buffers, activations,
    logits) and sampling (the KV cache). On a GPU the largest one counts. On the CPU all do: freed blocks
    below 32 MB stay with the process (glibc).
    """
    activated = max(activations(work, part) for part in work.networks)
    training = max(_moments(work), key=lambda terms: sum(map(_total, terms)))
    sampling = [Term("KV cache", kv_cache(work)), Term("vLLM's weights", weights_of_vllm(work))]
    sampling.append(Term("whole weights", whole_weights(work)))
    if work.gpu and sum(map(_total, sampling)) <= sum(map(_total, training)):
        sampling = []  # what training needs is free while responses are sampled
    elif work.gpu:
        training = [term for term in training if term.name == "gradients" and work.sharding.stage == 3]
    samples_by_vllm = work.decoding is not None and work.decoding.by_vllm
    base = Term("libraries", (GPU_BASE if work.gpu else CPU_BASE) + VLLM_BASE * samples_by_vllm)
    kernels = Term("kernels", min(KERNELS, activated) if work.half and not work.gpu else 0.0)
    terms = (base, kernels, *states(work), held(work), inputs_on_host(work), *training, *sampling)
    found = MemoryEstimate(terms, work.gpu)
    loaded = MemoryEstimate((base, loading(work)), work.gpu)
    host_to_load = loaded.host
    if loaded.device > found.device:  # then host memory is fullest at another moment
        others = Term("later in host memory", 0.0, max(0.0, found.host - loaded.host))
        found = dataclasses.replace(loaded, terms=(*loaded.terms, others))
    return dataclasses.replace(found, host_to_load=host_to_load)


def loading(work: Workload) -> Term:
    """On a GPU, before anything is trained: b P in host memory, from where it goes to the device. On stage 3
    a rank has its share b P / R on the device, and in host memory that of one tensor at a time; where a
    network has to be whole first, it is that in both.
    """
    if not work.gpu:
        return Term("loading", 0.0)
    largest = max((*(part.network for part in work.networks), *work.frozen), key=lambda net: net.parameters)
    whole, share = float(work.weight_bytes * largest.parameters), 1 / work.sharding.ranks
    if work.sharding.stage < 3:
        return Term("loading", 0.0, whole)
    if work.loaded_whole:
        return Term("loading", whole, whole)
    return Term("loading", whole * share, work.weight_bytes * largest.largest * share)


def _moments(work: Workload) -> list[list[Term]]:
    """The terms of each moment of training, of the largest network; on the CPU one moment has them all."""
    activated = Term("activations", max(activations(work, part) for part in work.networks))
    logits = Term("logits", max(head_memory(work, part) for part in work.networks))
    reducing = max((buffers(work, part) for part in work.networks), key=_total)
    gradients = _gradients_of_all(work)
    if not work.gpu:
        return [[gradients, reducing, activated, logits]]
    of_loss = Term("activations", max(activations(work, part, recomputed=False) for part in work.networks))
    of_head = Term("logits", max(head_gradient(work, part) for part in work.networks))
    attending = Term("attention", max(attention_workspace(work, part.network) for part in work.networks))
    # on stage 3 the head's gradient is reduced before the last layer is run again
    handed_on = work.sharding.stage == 3 and work.checkpointing and not work.selective and not work.compiled
    through = [
        max((_to_host(work, part) for part in work.networks), key=_total),
        *([reducing] if handed_on else []),
    ]
    updating = max((update_buffers(work, part) for part in work.networks), key=_total)
    return [
        [gradients, of_loss, logits],
        [gradients, of_loss, of_head, *through],
        [gradients, reducing, activated, attending, *([] if handed_on else [of_head])],
        [gradients, updating],
    ]


def states(work: Workload) -> list[Term]:
    """Weights b P, whole on stages 1 and 2 and shared by R on stage 3; of what learns an fp32 master 4 T / R
    (none where fp32 weights are their own) and the optimizer's state s T / R; frozen networks b P, shared
    like weights; an average 4 T / R.

    ZeRO's P_os, P_os+g and P_os+g+p (arXiv 1910.02054, section 5), with s = 8 for AdamW.
    """
    sharding, ranks = work.sharding, work.sharding.ranks
    share = ranks if sharding.stage == 3 else 1
    on_host = sharding.offload_param and sharding.stage == 3
    weights = sum(_weights(work, part) for part in work.networks) / share
    frozen = sum(network.parameters for network in work.frozen) * work.weight_bytes / share
    trained = sum(part.trained for part in work.networks)
    own_masters = not work.half and sharding.stage < 3 and not sharding.offload_optimizer
    master = 0 if own_masters else FP32
    state = sum(part.trained * (master + part.state_bytes) for part in work.networks) / ranks
    terms = [
        _placed("weights", weights, on_host),
        _placed("optimizer", state, sharding.offload_optimizer),
        _placed("frozen models", frozen, on_host or work.offload_frozen),
        Term("average", FP32 * trained / ranks if work.averaged else 0.0),
    ]
    if sharding.stage == 3:
        # a layer's whole weights, kept until as many are live as DeepSpeed allows
        whole = max(part.network.parameters for part in work.networks)
        terms.append(Term("gathered weights", min(whole, LIVE_PARAMETERS) * work.weight_bytes))
        if work.gpu:  # each engine has its bucket from the start, as large as it may get
            buckets = len(work.networks) * sharding.reduce_bucket_size
            terms.append(Term("buffers", _reduced_bytes(work) * buckets))
        if sharding.hpz > 1:  # ZeRO++'s second share, among so many ranks (arXiv 2306.10209)
            every = sum(_weights(work, part) for part in work.networks)
            every += sum(network.parameters for network in work.frozen) * work.weight_bytes
            terms.append(Term("second shares", every / sharding.hpz))
    if sharding.stage == 2 and sharding.offload_optimizer and work.gpu:
        # on their way to the host gradients pass through a buffer of the largest weight
        largest = max(min(part.trained, part.network.largest) for part in work.networks)
        terms.append(Term("buffers", work.weight_bytes * largest))
    return terms


def held(work: Workload) -> Term:
    """A checkpoint that is written beside training: a copy of what rank 0 saves in host memory, the trained
    weights b T (on stage 3 its share of them), its share of the optimizer's state and of an average."""
    if not work.saves_beside:
        return Term("checkpoint", 0.0)
    trained = work.weight_bytes * sum(part.trained for part in work.networks)
    weights = trained / (work.sharding.ranks if work.sharding.stage == 3 else 1)
    shares = sum(_total(term) for term in states(work) if term.name in SHARED)
    return Term("checkpoint", 0.0, weights + shares)


def gradients(work: Workload, part: Trained) -> Term:
    """Accumulated over the micro-batches of a step: stage 1 keeps all of them on every rank (g T), stages 2
    and 3 a share in fp32 (4 T / R). In fp16 stage 1 sums in fp32 beside the gradients: 4 T + 2 T; in bf16
    each is added to its sum as it comes.
    """
    sharding, trained = work.sharding, part.trained
    if sharding.stage == 1:
        return Term("gradients", trained * (FP32 + 2 if work.fp16 else FP32))
    return _placed("gradients", FP32 * trained / sharding.ranks, sharding.offload_optimizer)


def buffers(work: Workload, part: Trained) -> Term:
    """DeepSpeed's copies around a reduction and a step, as read in its 0.19.8 and seen in a process:

    stage 1: a bucket g B, the share in the partition g T / R, flattened 4 T / R (fp32 only; in half
    precision its other optimizer updates in place); none of them on one rank alone
    (`training/gradients.py`). Stage 2: one bucket, on a GPU with overlap two, and the share of the newest
    micro-batch b T / R; in half precision on a GPU the buckets alone, b B each. Stage 3: a bucket (on a GPU
    in `states`), its concatenation and the reduced share, which goes to the host bucket by bucket where the
    optimizer is there.
    """
    sharding, trained = work.sharding, part.trained
    bucket = min(sharding.reduce_bucket_size, trained)
    share = trained / sharding.ranks
    if sharding.stage == 1:
        none = work.half or _alone(work)
        return Term("buffers", 0.0 if none else FP32 * (bucket + 2 * share))
    if sharding.stage == 2:
        count = 2 if work.gpu and sharding.overlap_comm else 1
        if work.gpu and work.half:
            return Term("buffers", count * work.weight_bytes * bucket)
        return Term("buffers", count * FP32 * bucket + work.weight_bytes * share)
    width = work.weight_bytes
    flat = FP32 * share if work.half and not sharding.offload_optimizer else 0.0
    own = 0 if work.gpu else width * bucket  # on a GPU it is among the states
    return Term("buffers", own + max(flat, width * bucket + width * bucket / sharding.ranks))


def _to_host(work: Workload, part: Trained) -> Term:
    """On a GPU and stage 3, where the optimizer is in host memory, the gradient of the largest weight on its
    way there: the rank's share as it was reduced and in fp32, which are one where one rank alone reduces."""
    sharding = work.sharding
    if sharding.stage < 3 or not sharding.offload_optimizer:
        return Term("buffers", 0.0)
    share = min(part.trained, part.network.largest) / sharding.ranks
    copies = FP32 if sharding.ranks == 1 else work.weight_bytes + FP32
    return Term("buffers", copies * share)


def _reduced_bytes(work: Workload) -> int:
    """Of a number in a bucket of stage 3: one rank alone reduces in fp32."""
    return FP32 if work.sharding.ranks == 1 else work.weight_bytes


def update_buffers(work: Workload, part: Trained) -> Term:
    """On a GPU, in the update: stage 1 in half precision sends all gradients at once, rounded to b T, and one
    rank none unless in fp16; the others flatten the share in fp32, 4 T / R. On stage 3 an optimizer in host
    memory updates there."""
    if _alone(work) or (work.sharding.stage == 3 and work.sharding.offload_optimizer):
        return Term("buffers", 0.0)
    if work.sharding.stage == 1 and work.half:
        return Term("buffers", work.weight_bytes * part.trained)
    return Term("buffers", FP32 * part.trained / work.sharding.ranks)


def _alone(work: Workload) -> bool:
    """One rank of stage 1, whose gradients lie where the optimizer reads them."""
    sharding = work.sharding
    return sharding.stage == sharding.ranks == 1 and not sharding.offload_optimizer and not work.fp16


def inputs_on_host(work: Workload) -> Term:
    """L n h b in pinned memory, in blocks of which torch rounds the last up to a power of two."""
    if not work.offload_activations:
        return Term("inputs of layers", 0.0)
    net = max((part.network for part in work.networks), key=lambda each: each.layers * each.hidden)
    blocks, rest = divmod(work.batch.tokens * net.hidden * work.weight_bytes, PINNED_BLOCK)
    last = 1 << (rest - 1).bit_length() if rest else 0
    return Term("inputs of layers", 0.0, net.layers * (blocks * PINNED_BLOCK + last))


def kv_cache(work: Workload) -> float:
    """2 L k b bytes per cached token, for every slot to its capacity; logits of all slots three times."""
    if work.decoding is None:
        return 0.0
    net, slots = work.networks[0].network, work.decoding.slots
    cache = 2 * net.layers * net.kv_width * work.weight_bytes * slots * work.decoding.capacity
    if work.decoding.cache_bytes is not None:
        cache = int(work.decoding.cache_bytes)
    return cache + 3 * FP32 * slots * net.vocabulary


def whole_weights(work: Workload) -> float:
    """b P where ZeRO-3 holds the whole actor while it samples, less what is counted as gathered anyway."""
    if work.decoding is None or not work.decoding.gathers or work.sharding.stage < 3:
        return 0.0
    return float(work.weight_bytes * max(work.networks[0].network.parameters - LIVE_PARAMETERS, 0))


def weights_of_vllm(work: Workload) -> float:
    """b P, beside the actor's own; on the CPU b V h more, as the output layer is packed there and the
    embeddings that it shares its weights with are not. On a GPU they are there while it samples (sleep mode).
    """
    if work.decoding is None or not work.decoding.by_vllm:
        return 0.0
    net = work.networks[0].network
    packed = 0 if work.gpu else net.vocabulary * net.hidden
    return work.weight_bytes * (net.parameters + packed)


def _gradients_of_all(work: Workload) -> Term:
    """The sum over the networks where each keeps its gradients; else the largest."""
    each = [gradients(work, part) for part in work.networks]
    if work.sharding.stage == 3 or (work.sharding.stage == 1 and work.half):
        return Term("gradients", sum(term.device for term in each), sum(term.host for term in each))
    return max(each, key=_total)


def _weights(work: Workload, part: Trained) -> float:
    """Bytes of a network's weights, whole."""
    if part.quantized:
        return NF4_BYTES * part.network.parameters + work.weight_bytes * part.trained
    extra = part.trained if part.trained < part.network.parameters else 0
    return work.weight_bytes * (part.network.parameters + extra)


def _placed(name: str, size: float, on_host: bool) -> Term:
    return Term(name, 0.0, size) if on_host else Term(name, size)


def _total(term: Term) -> float:
    return term.device + term.host
