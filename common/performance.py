"""How fast a step was, and what share of the device's peak that is."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import torch

from common.distributed import World
from common.progress import peak_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def training_flops_per_token(model: PreTrainedModel) -> float:
    """Floating-point operations per token of a forward and backward pass: 6 per weight that multiplies
    and is trained, 4 per frozen one (its own gradient is not computed).

    Embeddings are looked up, not multiplied, so an input embedding of its own does not count; a tied one
    counts once, as the output projection. Attention scores are left out: at usual lengths they are
    under a tenth (PaLM, arXiv 2204.02311, appendix B). What a step leaves out because nobody reads it (logits
    of untrained tokens, `common/last_layer.py`) counts as done, as is usual for MFU.
    """
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding
    multiplied = [p for p in model.parameters() if is_tied or p is not embedding]
    return float(sum(_size(p) * (6 if p.requires_grad else 4) for p in multiplied))


def performance(
    flops_per_token: float, tokens: float, seconds: float | None, dtype: str, world: World
) -> dict[str, float]:
    """The `perf/` metrics of one step of `tokens` tokens over all ranks, in `seconds`.

    seconds: None where an interruption took a part of the step, which then has no speed.
    `perf/mfu` is present where the device's peak is known. `perf/peak_memory_gb` (10^9 bytes) is the
    device's on a GPU and this process's resident peak on the CPU.
    """
    metrics = {"perf/peak_memory_gb": _peak_memory() / 1e9}
    if seconds is None:
        return metrics
    metrics["perf/tokens_per_second"] = tokens / seconds
    if world.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(world.device), dtype)
        if peak is not None:
            metrics["perf/mfu"] = flops_per_token * tokens / seconds / (peak * world.size)
    return metrics


def _size(parameter: torch.nn.Parameter) -> int:
    """Weights in it, also when ZeRO-3 has partitioned it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _peak_memory() -> float:
    """Bytes."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
