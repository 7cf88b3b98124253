"""What passes of the decoder ask of a GPU: the same whatever lengths are, and nothing once it is recorded."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest

from common.decoding.graphs import WARM_UP_PASSES
from pipeline.planning.network import from_fields
from tests.gpu_fake.jobs import Fake, Outcome, Shape
from tests.gpu_fake.large import SIZES
from tests.gpu_fake.waits import RECORDING

pytestmark = pytest.mark.gpu_fake

SIZE, SLOTS = "1B, 2 of 16 layers", 64
NETWORK = from_fields(SIZES[SIZE])
assert NETWORK is not None
LENGTHS = [[256] * SLOTS, [768] * SLOTS, [0] * 32 + [100, 900] * 16, [5] + [0] * 63]
CASE: dict[str, Any] = {
    "decoded": SIZE, "slots": SLOTS, "capacity": 1024, "prompts": 8, "kernels": True, "graphs": False,
}  # fmt: skip


def decoded(fake: Fake, **changes: Any) -> Outcome:
    outcome = fake.run_large({**CASE, "lengths": LENGTHS, **changes})
    assert outcome.status == 0, outcome.printed[-3000:]
    return outcome


def by_pass(outcome: Outcome) -> dict[int, Counter[str]]:
    """Calls of each kernel."""
    found: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for phase, step, kernel, calls, *_ in outcome.kernels:
        if phase == "rollout":
            found[step][kernel] += calls
    return found


@pytest.fixture(scope="module")
def plain(fake: Fake) -> Outcome:
    return decoded(fake)


def test_a_pass_has_the_same_kernels_whatever_lengths_and_slots_are_filled(plain: Outcome) -> None:
    found = by_pass(plain)
    assert found[1] == found[2] == found[3] == found[4]
    assert found[1]["_varlen_attn"] == 2 and found[1]["index_put_"] == 2 * 2  # layers; keys and values
    assert not {"bmm", "_safe_softmax", "masked_fill_", "arange"} & set(found[1])
    assert not [sync for sync in plain.syncs if sync[0] == "rollout"]


def test_keys_are_read_as_far_as_each_slot_is_long(plain: Outcome) -> None:
    """Of a free slot, one."""
    assert NETWORK is not None
    sizes = {row[1]: row[4] for row in plain.kernels if row[:3:2] == ["rollout", "_varlen_attn"]}
    per_key = NETWORK.layers * 2 * 2 * 8 * 64  # keys and values, bytes, heads of width 64
    keys = [sum(length + 1 for length in lengths) for lengths in LENGTHS]
    rest = {sizes[step] - per_key * count for step, count in enumerate(keys, 1)}
    assert len(rest) == 1 and rest.pop() < per_key * SLOTS * 5  # queries, outputs and bounds


def test_a_prompt_more_asks_for_no_kernel_and_no_copy_more(fake: Fake, plain: Outcome) -> None:
    assert by_pass(decoded(fake, prompts=1))[0] == by_pass(plain)[0]


def test_a_recorded_pass_is_one_launch_and_waits_for_nothing(fake: Fake, plain: Outcome) -> None:
    outcome = decoded(fake, graphs=True)
    found, first = by_pass(outcome), WARM_UP_PASSES + 1
    assert found[1] == found[first] == by_pass(plain)[1]
    assert set(found) == set(range(first + 1))  # of the next pass no kernel is asked for one by one
    assert [sync[1] for sync in outcome.syncs if sync[0] == "rollout"] == [first]


def test_ppo_records_a_graph_for_each_number_of_rows_it_decodes(fake: Fake) -> None:
    job = fake.job("ppo", Shape())
    job.ppo.rollout.max_new_tokens = 8
    outcome = fake.run("ppo", job=job)
    assert outcome.status == 0, outcome.printed[-3000:]
    recorded = sum(outcome.syncs_of(step, ("rollout",))[RECORDING] for step in (1, 2, 3))
    assert recorded and Counter(waits for _, waits in outcome.passes)[2] == recorded
    assert {waits for _, waits in outcome.passes} == {1, 2} and "CUDA graphs" not in outcome.printed


def test_under_zero3_there_are_none_and_it_is_said(fake: Fake) -> None:
    outcome = fake.run("ppo", Shape(stage=3))
    assert "without CUDA graphs" in outcome.printed and "ZeRO-3 gathers" in outcome.printed
