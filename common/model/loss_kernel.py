"""One pass of a GPU over a chunk of logits: losses, entropies, hits and gradient, by a Triton kernel.

`score_rows` reads fp32 logits twice and writes their gradient once, in the dtype that products take: 10 bytes
a logit in half precision, where torch's operations in `fused_loss` move 38, and 70 with entropies. The
products before and after it are cuBLAS's. Needs Triton, which torch's wheels for GPUs bring. The formulas are
those of `fused_loss`.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from common.notices import notice

BLOCK = 4096
"""Logits of a row that are in registers at once."""
WARPS = 8
SLOWER = "four to seven times the memory traffic over its logits"


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def is_used(hidden: torch.Tensor) -> bool:
    """Whether a chunk's logits are scored by the kernel: on a GPU, with Triton."""
    return hidden.is_cuda and has_triton()


def say_without_kernel(device: torch.device) -> None:
    if device.type == "cuda" and not has_triton():
        notice("the loss head has no kernel of its own, since triton is not installed", SLOWER)


def score_rows(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    *,
    losses: torch.Tensor | None = None,
    entropies: torch.Tensor | None = None,
    correct: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    by_loss: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
) -> None:
    """Of softmax((logits + bias) / temperature), for each row, what is given to be written into.

    logits: fp32 [m, V]; bias [V]; targets int64 [m]. losses, entropies: fp32 [m], in nats. correct: int32
    [m], 1 where the target has the largest logit. gradient: [m, V], by (logits + bias) / temperature, of
    the row's loss times `by_loss` plus its entropy times `by_entropy`, fp32 [m]; without both, of its loss.
    ValueError for other shapes, and for what does not lie side by side: a kernel would read elsewhere.
    """
    by_row = (targets, losses, entropies, correct, by_loss, by_entropy)
    _check(by_row, logits.shape[:1])
    _check((logits, gradient), logits.shape)
    _check((bias,), logits.shape[1:])
    if len(targets):
        _operator()(
            logits, bias, targets, temperature, losses, entropies, correct, gradient, by_loss, by_entropy
        )


def _check(tensors: tuple[torch.Tensor | None, ...], shape: torch.Size) -> None:
    for tensor in tensors:
        if tensor is not None and not (tensor.shape == shape and tensor.is_contiguous()):
            raise ValueError(f"expected {tuple(shape)}, side by side, got {tuple(tensor.shape)}")


@cache
def _operator() -> Any:
    """torch's operator around the kernel: what derives shapes only need not run it."""

    @torch.library.custom_op("rlhf::score_rows", mutates_args=("losses", "entropies", "correct", "gradient"))
    def operator(
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        losses: torch.Tensor | None,
        entropies: torch.Tensor | None,
        correct: torch.Tensor | None,
        gradient: torch.Tensor | None,
        by_loss: torch.Tensor | None,
        by_entropy: torch.Tensor | None,
    ) -> None:
        rows, columns = logits.shape
        is_weighed = by_loss is not None or by_entropy is not None
        has_entropy = entropies is not None or by_entropy is not None
        kernel()[(rows,)](
            logits, bias, targets, losses, entropies, correct, gradient, by_loss, by_entropy, columns,
            temperature, IS_WEIGHED=is_weighed, HAS_ENTROPY=has_entropy, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip

    operator.register_fake(lambda *arguments: None)
    return operator


@cache
def kernel() -> Any:
    """The kernel; one program for each row."""
    import triton
    import triton.language as tl

    @triton.jit
    def score_row(
        logits, bias, targets, losses, entropies, correct, gradient, by_loss, by_entropy, columns,
        temperature, IS_WEIGHED: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        places = tl.arange(0, BLOCK)
        largest, total, weighted = float("-inf"), 0.0, 0.0
        predicted = tl.zeros((), tl.int64)
        of_target = 0.0
        for start in range(0, columns, BLOCK):
            at = start + places
            z = tl.load(logits + row * columns + at, mask=at < columns, other=float("-inf"))
            if bias is not None:
                z += tl.load(bias + at, mask=at < columns, other=0.0).to(tl.float32)
            z = z / temperature
            of_target += tl.sum(tl.where(at == target, z, 0.0), 0)
            high = tl.max(z, 0)
            predicted = tl.where(high > largest, start + tl.argmax(z, 0), predicted)
            now = tl.maximum(largest, high)
            # what was summed up relative to the largest so far; nothing was before the first block
            change = tl.where(total > 0, largest - now, 0.0)
            e = tl.exp(z - now)
            if HAS_ENTROPY:
                weighted = (weighted + total * change) * tl.exp(change)
                weighted += tl.sum(tl.where(e > 0, e * (z - now), 0.0), 0)
            total = total * tl.exp(change) + tl.sum(e, 0)
            largest = now
        log_total = tl.log(total)
        entropy = log_total - weighted / total  # H = log Z - E[z], both relative to the largest logit
        if losses is not None:
            tl.store(losses + row, log_total - (of_target - largest))
        if entropies is not None:
            tl.store(entropies + row, entropy)
        if correct is not None:
            tl.store(correct + row, (predicted == target).to(tl.int32))
        if gradient is not None:
            loss_counts = 0.0 if IS_WEIGHED else 1.0
            if by_loss is not None:
                loss_counts = tl.load(by_loss + row)
            for start in range(0, columns, BLOCK):
                at = start + places
                z = tl.load(logits + row * columns + at, mask=at < columns, other=float("-inf"))
                if bias is not None:
                    z += tl.load(bias + at, mask=at < columns, other=0.0).to(tl.float32)
                z = z / temperature - largest
                p = tl.exp(z) / total
                by_z = p * loss_counts
                if by_entropy is not None:  # -p (log p + H)
                    slope = p * (z - log_total + entropy)
                    by_z -= tl.load(by_entropy + row) * tl.where(p > 0, slope, 0.0)
                by_z = tl.where(at == target, by_z - loss_counts, by_z)
                found = by_z.to(gradient.dtype.element_ty)
                tl.store(gradient + row * columns + at, found, mask=at < columns)

    return score_row
