"""The CUDA branch of packed attention with real numbers on the CPU, against the branch that computes there.

torch's op gets a kernel for the CPU that follows flash attention's contract: int32 boundaries, the last query
aligned with the last key, a window that counts the tokens before the query, grouped heads when asked for, and
of each document's keys the first `seqused_k` only.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from common.model import attention

varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
LENGTHS = [9, 4, 1, 12, 7]
TOLERANCE = 1e-5  # fp32 sums in another order; the largest seen is 3.1e-6


def documents(
    cu_q: torch.Tensor, cu_k: torch.Tensor, used: torch.Tensor | None = None
) -> Iterator[tuple[slice, slice]]:
    counts = (cu_k.diff() if used is None else used).tolist()
    for (a, b), c, count in zip(pairwise(cu_q.tolist()), cu_k.tolist()[:-1], counts, strict=True):
        yield slice(a, b), slice(c, c + count)


def scores(q: torch.Tensor, k: torch.Tensor, scale: float, window: list[int]) -> torch.Tensor:
    """[H, queries, keys], minus infinity where a query does not see; window: tokens before and after it."""
    left, right = window
    keys = k.shape[1]
    row = torch.arange(q.shape[1])[:, None] + keys - q.shape[1]
    column = torch.arange(keys)[None]
    seen = (column <= row + right) if right >= 0 else torch.ones_like(column > row)
    if left >= 0:
        seen &= column >= row - left
    return (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))


def heads_of(x: torch.Tensor, part: slice, groups: int = 1) -> torch.Tensor:
    """fp32 [H, tokens, d]."""
    return x[part].float().transpose(0, 1).repeat_interleave(groups, 0)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
    max_q: int, max_k: int, is_causal: bool = False, scale: float | None = None,
    window_size: list[int] | None = None, enable_gqa: bool = False,
    used: torch.Tensor | None = None, *more: Any, **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    assert query.shape[1] == key.shape[1] or enable_gqa
    assert cu_q.dtype is cu_k.dtype is torch.int32
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert max_q >= int(cu_q.diff().max()) and max_k >= int(cu_k.diff().max())
    groups, outs, sums = query.shape[1] // key.shape[1], [], []
    assert used is None or (used.dtype is torch.int32 and used.is_contiguous())
    for own, seen in documents(cu_q, cu_k, used):
        k, v = heads_of(key, seen, groups), heads_of(value, seen, groups)
        s = scores(heads_of(query, own), k, scale or query.shape[-1] ** -0.5, window_size or [-1, -1])
        outs.append((s.softmax(-1) @ v).transpose(0, 1))
        sums.append(s.logsumexp(-1))
    return torch.cat(outs).to(query.dtype), torch.cat(sums, 1), torch.zeros(2, dtype=torch.uint64)


def backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int, is_causal: bool,
    rng_state: torch.Tensor, scale: float | None = None, window_size: list[int] | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    groups, factor = query.shape[1] // key.shape[1], scale or query.shape[-1] ** -0.5
    dq, dk, dv = (torch.zeros(x.shape) for x in (query, key, value))
    for own, seen in documents(cu_q, cu_k):
        q, o, g = (heads_of(x, own) for x in (query, out, grad))
        k, v = heads_of(key, seen, groups), heads_of(value, seen, groups)
        p = scores(q, k, factor, window_size or [-1, -1]).sub(lse[:, own, None]).exp()
        ds = p * (g @ v.transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * factor
        dq[own] = (ds @ k).transpose(0, 1)
        for total, part in ((dk, ds.transpose(1, 2) @ q), (dv, p.transpose(1, 2) @ g)):
            total[seen] = part.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)


@pytest.mark.parametrize("shared", [(), (0, 5, 3, 0, 2)], ids=["", "shared prefixes"])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 32), (4, 2, 64), (6, 1, 16)])
def test_the_cuda_branch_gives_what_the_cpu_branch_gives(
    heads: int, groups: int, width: int, window: int | None, shared: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    bounds, count = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()], sum(LENGTHS)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    prefix = attention.SharedPrefix(shared, cu_seqlens, count, max(LENGTHS)) if shared else None
    q, k, v = (torch.randn(1, n, count, width, requires_grad=True) for n in (heads, groups, groups))
    cuda = attention._varlen(q, k, v, cu_seqlens, max(LENGTHS), attention.Scores(None), window, prefix)
    cpu = attention._by_document(q, k, v, LENGTHS, attention.Scores(None), window, prefix)
    grad = torch.randn_like(cuda)
    found, wanted = (torch.autograd.grad(out, (q, k, v), grad) for out in (cuda, cpu))
    for one, other in zip((cuda, *found), (cpu, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
