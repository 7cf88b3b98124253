"""Ranks that share a sequence: attention over their slices beside that over the whole, with gradients."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from common.model.attention import SharedPrefix, packed_attention
from common.runtime.distributed import World, all_gather_objects, close_world, init_world

HEADS, TOKENS, WIDTH, VALUE_WIDTH = 8, 24, 4, 6
BOUNDARIES = (0, 9, 10, 24)  # 4 ranks have 6 tokens each: documents lie across slices


class Asked(NamedTuple):
    """What an architecture asks of attention."""

    name: str
    key_heads: int = 8
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    shared: tuple[int, ...] = ()


CASES = (
    Asked("plain"),
    Asked("fewer key heads than ranks", key_heads=2),
    Asked("one key head", key_heads=1, window=3),
    Asked("sinks and a window", key_heads=4, window=4, sinks=True),
    Asked("softcap and sinks", key_heads=2, softcap=2.0, sinks=True),
    Asked("shared prefix", key_heads=4, shared=(0, 5, 7)),
)


def tensors_of(asked: Asked) -> list[torch.Tensor]:
    """Query, key, value, sinks and the weights of the result in the loss; the same on every rank."""
    generator = torch.Generator().manual_seed(len(asked.name))
    shapes = [(HEADS, WIDTH), (asked.key_heads, WIDTH), (asked.key_heads, VALUE_WIDTH)]
    drawn = [torch.randn(1, heads, TOKENS, width, generator=generator) for heads, width in shapes]
    drawn.append(torch.randn(HEADS, generator=generator))
    return [*drawn, torch.randn(1, TOKENS, HEADS, VALUE_WIDTH, generator=generator)]


def attended(asked: Asked, given: list[torch.Tensor], ranks: int) -> list[torch.Tensor]:
    """The result, and the gradients of query, key, value and sinks."""
    *drawn, weights = given
    query, key, value, sinks = (x.clone().requires_grad_() for x in drawn)
    cu_seqlens = torch.tensor(BOUNDARIES, dtype=torch.int32)
    prefix = SharedPrefix(asked.shared, cu_seqlens, TOKENS, 14) if asked.shared else None
    out, _ = packed_attention(
        torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=cu_seqlens, max_length_q=14,
        sliding_window=asked.window, softcap=asked.softcap, s_aux=sinks if asked.sinks else None,
        shared_prefix=prefix, sequence_parallel=ranks,
    )  # fmt: skip
    (out * weights).sum().backward()
    leaves = (query, key, value, sinks)
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def largest_error(world: World, asked: Asked) -> float:
    """Of result and gradients, all slices together, against one rank's with everything."""
    whole = tensors_of(asked)
    expected = attended(asked, whole, 1)
    size = TOKENS // world.size
    here = slice(size * world.rank, size * (world.rank + 1))
    query, key, value, sinks, weights = whole
    given = [query[:, :, here], key[:, :, here], value[:, :, here], sinks, weights[:, here]]
    found = all_gather_objects(attended(asked, given, world.size))
    parts: Any = list(zip(*found, strict=True))
    joined = [torch.cat(parts[0], 1), *(torch.cat(part, 2) for part in parts[1:4]), sum(parts[4])]
    return max(float((a - b).abs().max()) for a, b in zip(joined, expected, strict=True))


def compiled_layers() -> int:
    """With compiled layers two ranks learn from their slices the same; nothing breaks a graph. Rows of any
    documents need as many graphs as whole ones: for the first, for other lengths, with shared prefixes."""
    from torch._dynamo.utils import counters

    from common.data.slices import slice_of
    from common.model import compiled
    from tests.common.model.test_compiled import batch, learned, model, take_cuda_branch

    world = init_world(sequence_parallel=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        take_cuda_branch(monkeypatch)
        torch.manual_seed(0)
        plain = model("llama")
        ours = copy.deepcopy(plain)
        compiled.compile_layers(ours.base())
        draws = np.random.default_rng(0)
        for number in range(6):
            given = slice_of(batch(draws, shared=number % 2 == 0), world.sequence_rank, 2)
            for one, other in zip(learned(ours, given), learned(plain, given), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # sums in another order
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    close_world()
    return 0


def main(out: str) -> int:
    world = init_world(sequence_parallel=4)
    errors = {asked.name: largest_error(world, asked) for asked in CASES}
    if world.is_rank0:
        torch.save(errors, out)
    close_world()
    return 0
