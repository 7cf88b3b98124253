"""The memory estimate of attention: where ranks share rows, and where flash attention does not apply."""

from __future__ import annotations

from dataclasses import replace

from pipeline.planning.activations import activations, attention_workspace
from pipeline.planning.work import MicroBatchShape, Sharding
from tests.pipeline.test_memory import work_of


def test_key_heads_are_repeated_until_each_rank_that_shares_rows_has_one() -> None:
    """Of 4 query heads and 2 key heads, 12 wide, 4 ranks have one each: keys and values twice as wide."""
    alone = work_of(half=True, gpu=True, sharding=Sharding(2, 4))
    (part,) = alone.networks
    more = activations(replace(alone, sharing=4), part) - activations(alone, part)
    assert more == 2 * (2 * 2 * 12) * 600 * 3  # bytes, keys and values of two more heads, tokens, layers
    assert activations(replace(alone, sharing=2), part) == activations(alone, part)


def test_attention_that_is_not_flash_takes_room_for_each_document_as_long_as_the_longest() -> None:
    batch = MicroBatchShape(600, 400, documents=10, longest=100)
    fp32 = work_of(gpu=True, batch=batch)
    net = fp32.networks[0].network
    padded, repeated = 4 * (16 + 1) * 10 * 4 * 128, 4 * 48 * 4 * 600  # heads of 12 are padded to 16
    assert attention_workspace(fp32, net) == padded + repeated
    assert attention_workspace(replace(fp32, sharing=4), net) == padded / 4  # and one key head each
    assert attention_workspace(replace(fp32, gpu=False), net) == 0
    in_steps_of_8 = replace(net, head_dim=16)
    assert attention_workspace(replace(fp32, half=True), in_steps_of_8) == 0
    assert attention_workspace(replace(fp32, half=True), net) == padded + repeated / 2
