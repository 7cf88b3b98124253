"""The reward model and DPO on a GPU that is not there."""

from __future__ import annotations

import pytest

from common.config import Dtype
from tests.gpu_fake.jobs import STEPS, Fake, Shape
from tests.gpu_fake.waits import assert_waits, expected

pytestmark = pytest.mark.gpu_fake

SHAPES = {
    "zero1": Shape(),
    "fp16, zero2": Shape(stage=2, dtype=Dtype.fp16),
    "lora, zero2 offload": Shape(stage=2, lora=True, offload_optimizer=True),
    "8 ranks, zero3": Shape(size=8, stage=3),
    "8 ranks that share rows by 4": Shape(size=8, stage=2, shared=4),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("step", ["reward", "dpo"])
def test_it_trains_and_exports(fake: Fake, step: str, name: str) -> None:
    outcome = fake.run(step, SHAPES[name])
    assert outcome.status == 0, outcome.printed[-3000:]
    assert "skipped" not in outcome.printed


@pytest.mark.parametrize("name", [name for name in SHAPES if "offload" not in name])
@pytest.mark.parametrize("step", ["reward", "dpo"])
def test_an_optimizer_step_waits_for_the_device_where_the_table_says(
    fake: Fake, step: str, name: str
) -> None:
    assert_waits(fake.run(step, SHAPES[name]), expected(step, SHAPES[name]))


PREFIXES = "common/model/attention.py keys"  # two numbers of each document
REFERENCE = "step2_dpo/loss.py pair_losses"  # two numbers of each pair


@pytest.mark.parametrize(("step", "sites"), [("reward", {PREFIXES}), ("dpo", {PREFIXES, REFERENCE})])
def test_batches_are_copied_from_pinned_memory(fake: Fake, step: str, sites: set[str]) -> None:
    assert fake.run(step, SHAPES["zero1"]).pageable_of(STEPS) == sites
