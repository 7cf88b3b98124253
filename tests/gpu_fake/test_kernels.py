"""Kernels, bytes and operations of an optimizer step against what can be counted by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pipeline.planning.network import from_fields
from tests.gpu_fake.jobs import Fake
from tests.gpu_fake.large import DOCUMENT, OF_DEPTH, SIZES
from tests.gpu_fake.test_memory import PLAIN

pytestmark = pytest.mark.gpu_fake

SIZE, TOKENS = "1B, 2 of 16 layers", 2048
CASE: dict[str, Any] = {
    **PLAIN, "names": [SIZE], "tokens": TOKENS, "micro_batches": 1, "kernels": True, "compile": False,
}  # fmt: skip
TRAINED = TOKENS - TOKENS // DOCUMENT  # the last token of a document has no target
PRODUCTS = ("mm", "head: mm")
NETWORK = from_fields(SIZES[SIZE])
assert NETWORK is not None
ATTENTION, FEED_FORWARD = (
    sum(size_in * size_out for size_in, size_out in part)
    for part in (NETWORK.linear_sizes[:4], NETWORK.linear_sizes[4:])
)
HEAD = NETWORK.vocabulary * NETWORK.hidden


def counted(fake: Fake, **changes: Any) -> dict[str, Counter[str]]:
    """Of the second step, by kernel: bytes and operations."""
    outcome = fake.run_large({**CASE, **changes})
    assert outcome.status == 0, outcome.printed[-3000:]
    found = {"bytes": Counter[str](), "operations": Counter[str]()}
    for _, step, kernel, _, size, operations, _ in outcome.kernels:
        if step == 2:
            found["bytes"][kernel] += size
            found["operations"][kernel.removeprefix("head: ")] += operations
    return found


def products(rows_of_last_layer: int) -> int:
    """Operations of the matrix products: two for each weight and row, forward, and twice that backward."""
    rows = 2 * TOKENS * ATTENTION + (TOKENS + rows_of_last_layer) * FEED_FORWARD + TRAINED * HEAD
    return 3 * 2 * rows


def multiplied(found: dict[str, Counter[str]]) -> float:
    """Operations of all matrix products."""
    return found["operations"]["mm"] + found["operations"]["addmm"]


@pytest.fixture(scope="module")
def plain(fake: Fake) -> dict[str, Counter[str]]:
    return counted(fake)


@pytest.fixture(scope="module")
def compiled(fake: Fake) -> dict[str, Counter[str]]:
    return counted(fake, compile=True)


def test_products_take_six_operations_for_each_weight_and_row(plain: dict[str, Counter[str]]) -> None:
    assert multiplied(plain) == products(rows_of_last_layer=TRAINED)
    # a third of the head's: the weight's gradient is added to where it is summed
    assert plain["operations"]["addmm"] == 2 * TRAINED * HEAD


def test_attention_counts_pairs_of_tokens_that_see_each_other(plain: dict[str, Counter[str]]) -> None:
    assert NETWORK is not None
    pairs = TOKENS // DOCUMENT * DOCUMENT * (DOCUMENT + 1) // 2 * NETWORK.query_width * NETWORK.layers
    assert plain["operations"]["_varlen_attn"] == 4 * pairs
    assert plain["operations"]["_varlen_attn_backward"] == 10 * pairs


def test_adamw_reads_four_fp32_numbers_of_a_weight_and_writes_three(plain: dict[str, Counter[str]]) -> None:
    assert NETWORK is not None
    numbers = 7 * 4 * NETWORK.parameters  # and the count of steps
    assert plain["bytes"]["_fused_adamw_"] == pytest.approx(numbers, rel=1e-6)


def test_without_the_entropy_the_heads_kernel_writes_a_number_a_token_less_and_nothing_sums_them(
    fake: Fake, plain: dict[str, Counter[str]]
) -> None:
    without = counted(fake, entropy=False)
    saved = {name: size - without["bytes"][name] for name, size in plain["bytes"].items()}
    # what the kernel is given to write into counts as read, too
    written, summed = 2 * 4 * TRAINED, 4 * TRAINED + 4
    assert {name: size for name, size in saved.items() if size} == {
        "score_rows": written, "head: sum": summed,
    }  # fmt: skip
    assert without["operations"] == plain["operations"]


def test_compiled_layers_multiply_the_same_and_move_less(
    plain: dict[str, Counter[str]], compiled: dict[str, Counter[str]]
) -> None:
    """In the layers; a compiled last layer is computed at all positions."""
    assert multiplied(compiled) == products(rows_of_last_layer=TOKENS)
    assert compiled["operations"]["_varlen_attn"] == plain["operations"]["_varlen_attn"]
    assert {"silu", "sigmoid", "neg"} <= set(plain["bytes"])
    assert not {"silu", "sigmoid", "neg"} & set(compiled["bytes"])
    not_products = [
        sum(size for kernel, size in found["bytes"].items() if kernel not in PRODUCTS)
        for found in (plain, compiled)
    ]
    saved = not_products[0] - not_products[1]
    fused = sum(size for kernel, size in compiled["bytes"].items() if kernel.startswith("fused_"))
    assert fused < saved  # the layers' small operations move less than half of what they moved


def test_a_layer_has_as_many_kernels_however_many_experts_it_has(fake: Fake) -> None:
    """Of the size of 30B-A3B's: experts are grouped products, not a loop over them."""
    found = []
    for name in ("30B-A3B", "30B-A3B of 16 experts"):
        outcome = fake.run_large({**CASE, "names": [f"1{OF_DEPTH}{name}"], "tokens": DOCUMENT})
        assert outcome.status == 0, outcome.printed[-3000:]
        calls = Counter[str]()
        for _, step, kernel, count, *_ in outcome.kernels:
            if step == 2:
                calls[kernel] += count
        found.append(calls)
    assert found[0] == found[1]
    assert found[0]["_grouped_mm"] == 6  # both halves as one and what they give; two of each backward
