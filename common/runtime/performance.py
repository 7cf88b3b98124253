"""How fast a step was, and what share of the device's peak that is."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.runtime.distributed import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Teraflops of dense matrix products with fp32 accumulation, (bf16 and fp16, fp32), from NVIDIA's data sheets.
# fp32 is without TF32, which torch leaves off. None: not published, or not supported.
_PEAK_TERAFLOPS: dict[str, tuple[float | None, float | None]] = {
    "GB200": (2500.0, 80.0),
    "B200": (2250.0, 75.0),
    "H200 NVL": (835.0, 60.0),
    "H200": (989.4, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.4, 67.0),
    "H800": (989.4, 67.0),
    "H20": (148.0, 44.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX A6000": (154.8, 38.7),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}


def training_flops_per_token(model: PreTrainedModel) -> float:
    """Floating-point operations per token of a forward and backward pass: 6 per weight that multiplies
    and is trained, 4 per frozen one (its own gradient is not computed).

    Embeddings are looked up, not multiplied, so an input embedding of its own does not count; a tied one
    counts once, as the output projection. Attention scores are left out: at usual lengths they are
    under a tenth (PaLM, arXiv 2204.02311, appendix B). What a step leaves out because nobody reads it (logits
    of untrained tokens, `common/model/last_layer.py`) counts as done, as is usual for MFU.
    """
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding
    multiplied = [p for p in model.parameters() if is_tied or p is not embedding]
    return float(sum(weights_in(p) * (6 if p.requires_grad else 4) for p in multiplied))


def performance(
    flops_per_token: float, tokens: float, seconds: float | None, dtype: str, world: World
) -> dict[str, float]:
    """The `perf/` metrics of one step of `tokens` tokens over all ranks, in `seconds`.

    seconds: None where an interruption took a part of the step, which then has no speed.
    `perf/mfu` is present where the device's peak is known. `perf/memory_gb` (10^9 bytes) is what this rank's
    tensors take of its GPU now, on the CPU the process's resident memory; `perf/peak_memory_gb` the most so
    far.
    """
    now, peak = _memory()
    metrics = {"perf/memory_gb": now / 1e9, "perf/peak_memory_gb": peak / 1e9}
    if seconds is None:
        return metrics
    metrics["perf/tokens_per_second"] = tokens / seconds
    if world.device.type == "cuda":
        fastest = peak_flops(torch.cuda.get_device_name(world.device), dtype)
        if fastest is not None:
            metrics["perf/mfu"] = flops_per_token * tokens / seconds / (fastest * world.size)
    return metrics


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak floating-point operations per second of one device, or None when it is not known.

    device_name: as the driver gives it (`NVIDIA H100 80GB HBM3`). dtype: bf16, fp16 or fp32.
    """
    for name in sorted(_PEAK_TERAFLOPS, key=len, reverse=True):
        if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE):
            half, single = _PEAK_TERAFLOPS[name]
            teraflops = {"bf16": half, "fp16": half, "fp32": single}.get(dtype)
            return None if teraflops is None else teraflops * 1e12
    return None


def weights_in(parameter: torch.nn.Parameter) -> int:
    """Weights in it, also when ZeRO-3 has partitioned it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _memory() -> tuple[float, float]:
    """Bytes now, and the most so far."""
    if torch.cuda.is_available():
        return float(torch.cuda.memory_allocated()), float(torch.cuda.max_memory_allocated())
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    # the kernel notes the peak now and then, so that it may lag behind
    return float(resident), max(float(resident), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0)
