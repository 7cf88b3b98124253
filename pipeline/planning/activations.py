"""What a device holds of a pass's tokens: activations, logits, what attention works with. Pure.

Takes a `Workload` and one of the networks that learn, returns bytes per rank. Symbols as in `memory.py`.
"""

from __future__ import annotations

import math

from pipeline.planning.network import Network
from pipeline.planning.work import FP32, Head, Trained, Workload

CPU_CHUNK_BYTES = 4 << 20
"""As in `common.model.fused_loss`: fp32 logits made at once on the CPU."""
CPU_CHUNK_ROWS = 256
"""As in `common.model.fused_loss`: rows that are made at least."""
GPU_CHUNK_BYTES, GPU_CHUNK_ROWS = 1 << 30, 4096
"""As in `common.model.fused_loss`: rows of logits made at once on a GPU."""
FLASH_WIDTHS, FLASH_WIDEST = 8, 256
"""As in `common.model.flash_attention`: heads in steps of so many numbers, up to so many."""
ALIGNED = 32
"""As in `common.model.efficient_attention`."""
TILE = 8192
"""As in `common.model.tiled_mlp`: tokens of a tile of a feed-forward network, at most."""


def activations(work: Workload, part: Trained, *, recomputed: bool = True) -> float:
    """What autograd keeps of a micro-batch, bytes. recomputed: also of a layer that is run again, if any is.

    Per token and layer in fp32: each norm keeps its input, the normalised input and its output (6 h), the
    attention q, k, v, its output and that output end to end (3 q + 2 k), the feed-forward network both
    halves, the activated one and their product (4 i); times 4 bytes. In half precision norms compute in fp32
    (16 h bytes), and so does attention of documents up to 256 tokens on the CPU.
    The last layer's feed-forward network has trained positions only (`common.model.last_layer`); with
    recomputation a layer keeps its input, perhaps in host memory, and one layer at a time all of it
    (`_one_layer`); with a selective one it also keeps what its matrix products and attention give. A compiled
    layer keeps its input, both normalised inputs, what attention gives, both halves and their product (4 h +
    3 i) at all positions.
    """
    net, batch = part.network, work.batch
    n, m = batch.tokens, min(batch.trained, batch.tokens)
    b = work.weight_bytes
    norm = (8 if work.half else 12) * net.hidden
    if part.trained < net.parameters:
        norm -= b * net.hidden  # a frozen weight needs no normalised input
    attention = _attention_bytes(work, net)
    feed_forward = 4 * net.intermediate * b + _routing_bytes(work, net)
    attention += (8 if work.half else 12) * (net.query_width + net.kv_width) * net.has_qk_norm
    layer = 2 * norm + attention + feed_forward
    final = n * norm + 2 * m * net.hidden * b
    if work.compiled:
        layer = attention + (4 * net.hidden + 3 * net.intermediate) * b
    if work.checkpointing and not work.selective and not work.compiled:
        inputs = n * net.hidden * b * (1 if work.offload_activations else net.layers)
        if not recomputed:
            return final + inputs
        # on a GPU the final norm is through with its backward pass when a layer is computed again
        return (0 if work.gpu else final) + inputs + _one_layer(work, net, n, norm, attention)
    if work.checkpointing:
        kept = net.hidden * b + (_kept_products(work, part) if work.selective else 0)
        once = layer - (kept - net.hidden * b)  # what one layer has beside what it keeps
        return final + n * (net.layers * kept + (once if recomputed else 0))
    if work.compiled:
        return final + n * layer * net.layers
    return final + n * layer * net.layers - (n - m) * (feed_forward - net.hidden * b)


def _one_layer(work: Workload, net: Network, n: int, norm: int, attention: int) -> float:
    """Bytes of a layer that is run again and then backward: norms and attention, and the more of what two
    moments add. The feed-forward network: its four intermediates, on a GPU their four gradients beside them
    and those of its weights; in tiles (not with experts) all of one tile, the gradients of input and output,
    and the sums over tiles in fp32. On a GPU, the norm before it: five tensors in fp32, when its output is
    gone.
    """
    b, width = work.weight_bytes, net.intermediate * work.weight_bytes
    weights = 3 * net.intermediate * net.hidden
    of_network: float = n * 4 * width + (n * 4 * width + b * weights if work.gpu else 0)
    if work.tiled and n > TILE and not net.experts:
        tile = n / math.ceil(n / TILE)
        of_network = 2 * n * net.hidden * b + tile * 8 * width + (FP32 + b) * weights
    of_norm = n * (5 * FP32 - b) * net.hidden if work.gpu else 0
    return n * (2 * norm + attention) + max(of_network + n * _routing_bytes(work, net), of_norm)


def head_memory(work: Workload, part: Trained) -> float:
    """Logits of one chunk, fp32, up to three times (entropy needs a copy), and the output projection's
    gradient in fp32, 4 V h, with its product in the weights' dtype beside it in half precision on the CPU.

    On a GPU a chunk's logits and their gradient in the weights' dtype, and 4 V h alone; or, when the backward
    pass begins, 4 V h and what it is rounded to.
    """
    if part.head is Head.scalar:
        return 0.0
    net, m = part.network, min(work.batch.trained, work.batch.tokens)
    rows = chunk_rows(net.vocabulary, gpu=work.gpu)
    chunk = min(rows, max(m, 1)) * net.vocabulary
    weight = 0 if part.trained < net.parameters else net.vocabulary * net.hidden  # adapters: it is frozen
    if work.gpu:
        rounded = work.weight_bytes if work.half else 0
        return max((FP32 + work.weight_bytes) * chunk + FP32 * weight, (FP32 + rounded) * weight)
    product = FP32 + 2 if work.half else 0
    return 3 * FP32 * chunk + (FP32 + product) * weight


def chunk_rows(vocabulary: int, *, gpu: bool) -> int:
    """Rows of logits made at once: as `chunk_rows_for` in common/model/fused_loss.py."""
    if gpu:
        return min(GPU_CHUNK_ROWS, max(1, GPU_CHUNK_BYTES // (FP32 * vocabulary * 256)) * 256)
    return max(CPU_CHUNK_ROWS, CPU_CHUNK_BYTES // (FP32 * vocabulary))


def head_gradient(work: Workload, part: Trained) -> float:
    """Bytes of the output projection's gradient in the backward pass, rounded to the weights' dtype."""
    if part.head is Head.scalar or part.trained < part.network.parameters:
        return 0.0
    return work.weight_bytes * part.network.vocabulary * part.network.hidden


def attention_workspace(work: Workload, net: Network) -> float:
    """Bytes that a GPU's attention takes while its backward pass runs, where flash attention does not apply
    (`common.model.efficient_attention`; that of dropout, which a config may ask for, is left out).

    4 (d + 1) for each document, head of this rank, d wide, and token of the longest document; and, where
    query heads share key heads, keys, values and their gradients of all query heads (4 q b for each token).
    """
    batch, width = work.batch, -(-net.head_dim // FLASH_WIDTHS) * FLASH_WIDTHS
    if not work.gpu or (work.half and net.head_dim == width <= FLASH_WIDEST):
        return 0.0
    heads = math.ceil(net.heads / work.sharing)
    rows = -(-batch.longest // ALIGNED) * ALIGNED
    repeated = (
        4 * net.query_width * work.weight_bytes * batch.tokens if net.heads > _key_heads(work, net) else 0
    )
    return FP32 * (width + 1) * batch.documents * heads * rows + repeated


def _attention_bytes(work: Workload, net: Network) -> int:
    """Per token: q, k, v and the output as the kernel took them; on the CPU the output end to end, too. Of
    ranks that share rows each has its own heads of all tokens, which is as much."""
    b, kept = work.weight_bytes, 2 * (net.query_width + _key_heads(work, net) * net.head_dim)
    if work.gpu:
        return b * kept
    kernel = FP32 if work.batch.short else b
    return kernel * kept + b * net.query_width


def _key_heads(work: Workload, net: Network) -> int:
    """Of a layer, over all ranks that share its rows: repeated until each of them has as many."""
    return math.lcm(net.kv_heads, work.sharing)


def _routing_bytes(work: Workload, net: Network) -> int:
    """Per token, of experts: its copies for those it takes and what comes back of each, 2 c h; the routers'
    probabilities in fp32, and the order of the copies, five times int64."""
    return net.chosen * (2 * net.hidden * work.weight_bytes + 5 * 8) + FP32 * net.experts


def _kept_products(work: Workload, part: Trained) -> int:
    """Per token and layer: attention q and what the matrix products give, q + 2 k + 2 h + 2 i; adapters give
    as much beside it. A graph that is compiled leaves out the last product, which is only added to."""
    net, b = part.network, work.weight_bytes
    products = net.query_width + 2 * net.kv_width + 2 * net.hidden + 2 * net.intermediate
    if part.trained < net.parameters:
        products *= 2
    return b * (net.query_width + products - (net.hidden if work.compiled else 0))
