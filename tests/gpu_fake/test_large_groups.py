"""A step of 8B on 512 ranks and of 70B on 64: what a rank sends and holds, as recorded and within bounds.

The recorded table (`python -m benchmarks.large_groups`) is of three depths; the shallowest is run again here.
"""

from __future__ import annotations

import json

import pytest

from benchmarks import large_groups
from benchmarks.measure import RESULTS
from pipeline.planning.network import from_fields
from tests.gpu_fake.jobs import Fake
from tests.gpu_fake.large import SIZES, fields_of
from tests.gpu_fake.test_memory import PLAIN

pytestmark = pytest.mark.gpu_fake

RECORDED = json.loads((RESULTS / "large_groups.json").read_text())["runs"]
H100 = 80e9
BF16 = 2
"""Bytes."""


@pytest.mark.parametrize("name", large_groups.CASES)
def test_a_step_sends_what_was_recorded_and_a_rank_holds_what_is_planned(fake: Fake, name: str) -> None:
    depth = large_groups.DEPTHS[name][0]
    case = {**PLAIN, **large_groups.of_depth(large_groups.CASES[name], depth)}
    outcome = fake.run_large(case)
    assert outcome.status == 0, outcome.printed[-3000:]
    sent = large_groups.sent({"collectives": outcome.collectives})
    assert dict(sent) == {kind: values[0] for kind, values in RECORDED[name]["measured"].items()}
    assert outcome.peak < H100


@pytest.mark.parametrize("name", large_groups.CASES)
def test_at_its_whole_depth_it_fits_and_sends_each_weight_as_often_as_zero_3_has_to(name: str) -> None:
    """Weights are gathered for the forward and for the backward pass, gradients reduced once, in bf16."""
    case, whole = large_groups.CASES[name], RECORDED[name]["whole_depth"]
    network = from_fields(fields_of(case["names"][0]))
    assert network is not None and RECORDED[name]["layers"] == SIZES[case["names"][0]]["num_hidden_layers"]
    weights = BF16 * network.parameters
    assert weights < whole["allgather_base bytes"] < 2.05 * weights
    assert weights < whole["reduce_scatter_base bytes"] < 1.05 * weights
    assert whole["broadcast bytes"] + whole["allreduce bytes"] < 1e5
    assert large_groups.planned(network, case) < 0.6 * H100
    for kind, values in RECORDED[name]["measured"].items():
        first = RECORDED[name]["measured_depths"][0]
        assert whole[kind] == large_groups.extended(values, first, RECORDED[name]["layers"]), kind
