"""Attention in one call for fp32 and dropout, with real numbers on the CPU, against the loop over documents.

torch's memory-efficient kernel is for CUDA; here a stand-in follows its contract, as read in its source:
int32 bounds, one head of keys for each of queries, a window that counts the token itself, sums of weights
padded to the longest document. Like torch's derivative it knows what it is told and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import notices
from common.model import attention
from common.model import efficient_attention as operator

LENGTHS = [9, 4, 1, 40, 7]
CAUSAL_FROM_TOP_LEFT = 1
TOLERANCE = 1e-5  # fp32 sums in another order


def weights_of(q: torch.Tensor, k: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """[H, T, T] of scores, minus infinity where a query does not see."""
    assert window is None or window > 0
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))[None]
    seen = (distance >= 0) & (distance < (window or len(q)))
    return (q.transpose(0, 1) @ k.permute(1, 2, 0) * scale).masked_fill(~seen, float("-inf"))


def kept(shape: torch.Size, dropout: float, seed: torch.Tensor, at: int) -> torch.Tensor:
    """Which weights are kept, and by how much they grow."""
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(int(seed) + at))
    return (draws >= dropout) / (1 - dropout)


def check(bounds: torch.Tensor, longest: int, given: tuple[torch.Tensor, ...], mask_type: int) -> None:
    assert bounds.dtype is torch.int32 and bounds.is_contiguous() and mask_type == CAUSAL_FROM_TOP_LEFT
    assert bounds.diff().max() <= longest <= given[0].shape[1]
    for x in given:
        assert x.shape[0] == 1 and x.shape[2] == given[0].shape[2] and x.shape[3] % 8 == 0
        assert x.stride(-1) == 1


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: None, cu_q: torch.Tensor,
    cu_k: torch.Tensor, max_q: int, max_k: int, dropout: float, mask_type: int, with_sums: bool, *,
    scale: float, window_size: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    check(cu_q, max_q, (query, key, value), mask_type)
    assert torch.equal(cu_q, cu_k) and max_q == max_k and with_sums
    seed = torch.randint(1 << 20, ())
    out = query.new_empty(1, query.shape[1], query.shape[2], value.shape[3])
    sums = torch.full((len(cu_q) - 1, query.shape[2], -(-max_q // 32) * 32), float("inf"))
    for at, (a, b) in enumerate(pairwise(cu_q.tolist())):
        if a == b:
            continue
        s = weights_of(query[0, a:b].float(), key[0, a:b].float(), scale, window_size)
        p = s.softmax(-1) * (kept(s.shape, dropout, seed, at) if dropout else 1)
        out[0, a:b] = (p @ value[0, a:b].float().transpose(0, 1)).transpose(0, 1)
        sums[at, :, : b - a] = s.logsumexp(-1)
    return out, sums, seed, torch.zeros((), dtype=torch.int64), max_q, max_k


def backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: None,
    out: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int, sums: torch.Tensor,
    dropout: float, seed: torch.Tensor, offset: torch.Tensor, mask_type: int, bias_grad: bool, *,
    scale: float, window_size: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    check(cu_q, max_q, (query, key, value, out), mask_type)
    assert sums.shape == (len(cu_q) - 1, query.shape[2], -(-max_q // 32) * 32)
    assert sums.stride(0) % 8 == sums.stride(1) % 8 == 0
    found = [torch.zeros_like(x) for x in (query, key, value)]
    for at, (a, b) in enumerate(pairwise(cu_q.tolist())):
        q, k, v, o, g = (x[0, a:b].float() for x in (query, key, value, out, grad))
        p = weights_of(q, k, scale, window_size).sub(sums[at, :, : b - a, None]).exp()
        mask = kept(p.shape, dropout, seed, at) if dropout else torch.ones(())
        dp = g.transpose(0, 1) @ v.permute(1, 2, 0) * mask
        ds = p * (dp - (g * o).sum(-1).transpose(0, 1)[..., None]) * scale
        for total, part in zip(
            found,
            (ds @ k.transpose(0, 1), ds.transpose(1, 2) @ q.transpose(0, 1),
             (p * mask).transpose(1, 2) @ g.transpose(0, 1)),
            strict=True,
        ):  # fmt: skip
            total[0, a:b] = part.transpose(0, 1)
    return *found, query.new_zeros(())


@contextmanager
def standing_in() -> Iterator[None]:
    """torch's operators have kernels for the CPU while the block runs."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_efficient_attention_forward", forward, "CPU")
    library.impl("_efficient_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with standing_in():
        yield


def bounds_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def heads(number: int, length: int, width: int) -> torch.Tensor:
    return torch.randn(1, number, length, width, requires_grad=True)


@pytest.mark.parametrize("shared", [(), (0, 5, 3, 0, 2)], ids=["", "shared prefixes"])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "value_width"), [(4, 4, 8, 8), (4, 2, 12, 12), (6, 1, 24, 16)]
)
def test_one_call_gives_what_the_loop_over_documents_gives(
    queries: int, keys: int, width: int, value_width: int, window: int | None, shared: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    bounds, count = bounds_of(LENGTHS), sum(LENGTHS)
    prefix = attention.SharedPrefix(shared, bounds, count, max(LENGTHS)) if shared else None
    q, k, v = heads(queries, count, width), heads(keys, count, width), heads(keys, count, value_width)
    scores = attention.Scores(None)
    ours = attention._efficient(q, k, v, bounds, max(LENGTHS), scores, window, prefix)
    loop = attention._by_document(q, k, v, LENGTHS, scores, window, prefix)
    grad = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad(out, (q, k, v), grad) for out in (ours, loop))
    for one, other in zip((ours, *found), (loop, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


def test_empty_documents_at_the_end_change_nothing() -> None:
    torch.manual_seed(0)
    q, k, v = heads(2, 6, 8), heads(2, 6, 8), heads(2, 6, 8)

    def run(lengths: list[int]) -> list[torch.Tensor]:
        out = attention._efficient(q, k, v, bounds_of(lengths), 4, attention.Scores(None), None, None)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    for one, other in zip(run([4, 2]), run([4, 2, 0, 0]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("window", [None, 5])
def test_dropout_leaves_out_the_same_weights_in_both_passes(window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = heads(2, 9, 8), heads(2, 9, 8), heads(2, 9, 8)
    scores = attention.Scores(0.5, dropout=0.4)
    out = attention._efficient(q, k, v, bounds_of([9]), 9, scores, window, None)
    torch.manual_seed(0)
    for _ in range(3):
        torch.randn(1, 2, 9, 8)
    mask = kept(torch.Size([2, 9, 9]), 0.4, torch.randint(1 << 20, ()), 0)
    weights = weights_of(q[0].transpose(0, 1), k[0].transpose(0, 1), 0.5, window).softmax(-1) * mask
    plain = (weights @ v[0]).transpose(0, 1)[None]
    grad = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, plain))
    for one, other in zip((out, *found), (plain, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(out, attention._efficient(
        q, k, v, bounds_of([9]), 9, attention.Scores(0.5), window, None))  # fmt: skip


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [0, 3])
def test_kernels_are_as_many_for_any_number_of_documents_and_the_host_waits_for_none(window: int) -> None:
    def asked(lengths: list[int]) -> list[str]:
        q, k, v = (torch.randn(sum(lengths), n, 8) for n in (4, 2, 2))
        bounds, more = bounds_of(lengths), (max(lengths), 0.3, window, 0.0)
        with Counting() as counting:
            out, *kept = operator.efficient_attention._init_fn(q, k, v, bounds, *more)
            operator._backward._init_fn(torch.ones_like(out), q, k, v, bounds, out, *kept, *more)
        return counting.names

    assert asked([4] * 30) == asked([60, 60])
    assert not {"_local_scalar_dense", "nonzero"} & set(asked([4, 4]))
    assert {"_efficient_attention_forward", "_efficient_attention_backward"} < set(asked([4, 4]))


def test_torch_finds_no_fault_in_the_operator() -> None:
    """Its schema, its derived shapes and its derivative, as torch.compile relies on them."""
    q, k, v = (torch.randn(13, n, 8, requires_grad=True) for n in (4, 2, 2))
    for window in (0, 3):
        given = (q, k, v, bounds_of([9, 4]), 9, 0.3, window, 0.0)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operator.efficient_attention, given, test_utils=tests)


def test_a_device_is_asked_once_a_pass_for_the_lengths_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: asked.append(self) or real(self))
    bounds, other = bounds_of([2, 1]), bounds_of([1, 2])
    assert [attention._lengths_of(x) for x in (bounds, bounds, other)] == [[2, 1], [2, 1], [1, 2]]
    assert len(asked) == 2


def test_a_gpu_that_goes_document_by_document_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(notices.log, "handlers", [notices.Listener(said.append)])
    attention._say_one_by_one.cache_clear()
    for _ in range(2):
        attention._say_one_by_one("gemma2")
    (line,) = said
    assert line.startswith("attention goes document by document") and "model_type=gemma2" in line
