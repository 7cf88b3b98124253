"""PPO on a GPU that is not there."""

from __future__ import annotations

import pytest

from common.config import Dtype
from tests.gpu_fake.jobs import STEPS, Fake, Outcome, Shape, without_lines
from tests.gpu_fake.waits import RECORDING, SAMPLING, SCORING, assert_waits, expected

pytestmark = pytest.mark.gpu_fake

SHAPES = {
    "zero1": Shape(),
    "fp16, zero2": Shape(stage=2, dtype=Dtype.fp16),
    "lora, zero2 offload": Shape(stage=2, lora=True, offload_optimizer=True),
    "zero3": Shape(stage=3),
    "8 ranks, zero3": Shape(size=8, stage=3),
    "2 ranks that share rows": Shape(size=2, stage=2, shared=2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_it_trains_and_exports(fake: Fake, name: str) -> None:
    outcome = fake.run("ppo", SHAPES[name])
    assert outcome.status == 0, outcome.printed[-3000:]
    assert "skipped" not in outcome.printed


@pytest.mark.parametrize("name", ["zero1", "zero3", "8 ranks, zero3", "2 ranks that share rows"])
def test_an_update_waits_for_the_device_where_the_table_says(fake: Fake, name: str) -> None:
    assert_waits(fake.run("ppo", SHAPES[name]), expected("ppo", SHAPES[name]))


def assert_each_pass_waits_once(outcome: Outcome) -> None:
    """And once more one that is recorded as a CUDA graph, which takes in no prompt."""
    assert {waits for _, waits in outcome.passes} <= {1, 2}
    twice = [prompts for prompts, waits in outcome.passes if waits == 2]
    recorded = [sync[4] for sync in outcome.syncs if f"{sync[2]}: {without_lines(sync[3])}" == RECORDING]
    assert not any(twice) and len(twice) == sum(recorded) < len(outcome.passes) / 2


def test_a_pass_of_the_decoder_waits_once_whatever_the_layers_also_with_new_prompts(fake: Fake) -> None:
    outcome = fake.run("ppo", SHAPES["zero1"])  # of two layers
    admitted = [prompts for prompts, _ in outcome.passes]
    assert any(admitted) and not all(admitted)  # both kinds are looked at
    assert_each_pass_waits_once(outcome)
    assert outcome.syncs_of(STEPS, ("rollout",)).keys() - {RECORDING} == SAMPLING.keys()


def test_a_pass_that_leaves_out_unlikely_tokens_waits_once_too(fake: Fake) -> None:
    job = fake.job("ppo", Shape())
    job.ppo.rollout.top_p = 0.9
    outcome = fake.run("ppo", job=job)
    assert outcome.status == 0, outcome.printed[-3000:]
    assert_each_pass_waits_once(outcome)


@pytest.mark.parametrize("name", ["zero1", "2 ranks that share rows"])
def test_scoring_waits_once_for_each_network_and_micro_batch(fake: Fake, name: str) -> None:
    found = fake.run("ppo", SHAPES[name]).syncs_of(STEPS, ("score",))
    assert found.keys() == SCORING.keys() and found.total() == 4 * 2  # networks, micro-batches
