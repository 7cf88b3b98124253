"""SFT on a GPU that is not there: it runs, and waits for the device where it has to and nowhere else."""

from __future__ import annotations

import pytest

from common.config import Dtype
from tests.gpu_fake.jobs import MOE, STEPS, Fake, Shape
from tests.gpu_fake.waits import assert_waits, expected

pytestmark = pytest.mark.gpu_fake

SHAPES = {
    "zero1": Shape(),
    "fp16": Shape(dtype=Dtype.fp16),
    "fp32": Shape(dtype=Dtype.fp32),
    "zero2": Shape(stage=2),
    "zero3": Shape(stage=3),
    "zero2 offload": Shape(stage=2, offload_optimizer=True),
    "zero3 offload": Shape(stage=3, offload_optimizer=True, offload_param=True),
    "checkpointing": Shape(checkpointing=True),
    "lora": Shape(stage=2, lora=True),
    "compiled, checkpointing, lora": Shape(compile=True, checkpointing=True, lora=True, stage=2),
    "selective": Shape(checkpointing=True, selective=True),
    "selective, compiled, lora": Shape(compile=True, checkpointing=True, selective=True, lora=True, stage=2),
    "selective, zero3": Shape(checkpointing=True, selective=True, stage=3),
    "moe": Shape(model=tuple(MOE.items())),
    "8 ranks": Shape(size=8),
    "8 ranks, zero2": Shape(size=8, stage=2),
    "8 ranks, zero3": Shape(size=8, stage=3),
    "8 ranks, hpz": Shape(size=8, stage=3, hpz=4),
    "8 ranks that share rows by 4": Shape(size=8, stage=3, shared=4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_it_trains_and_exports(fake: Fake, name: str) -> None:
    outcome = fake.run("sft", SHAPES[name])
    assert outcome.status == 0, outcome.printed[-3000:]
    assert "skipped" not in outcome.printed


@pytest.mark.parametrize("name", [name for name in SHAPES if "offload" not in name])
def test_an_optimizer_step_waits_for_the_device_where_the_table_says(fake: Fake, name: str) -> None:
    """With offload DeepSpeed waits at every parameter."""
    assert_waits(fake.run("sft", SHAPES[name]), expected("sft", SHAPES[name]))


def test_batches_are_copied_from_pinned_memory(fake: Fake) -> None:
    assert not fake.run("sft", SHAPES["zero1"]).pageable_of(STEPS)


def test_more_micro_batches_wait_no_more_often(fake: Fake) -> None:
    job = fake.job("sft", Shape())
    job.sft.train.micro_batch_size = 1
    assert_waits(fake.run("sft", job=job), expected("sft", Shape()))


@pytest.mark.parametrize("dtype", [Dtype.bf16, Dtype.fp16], ids=lambda dtype: dtype.value)
def test_a_mixture_is_balanced(fake: Fake, dtype: Dtype) -> None:
    """Counting tells the host once a step which experts were taken: a wait that the loss is worth."""
    job = fake.job("sft", Shape(model=tuple(MOE.items()), dtype=dtype))
    job.model.router_aux_loss_coef = 0.01
    outcome = fake.run("sft", job=job)
    assert outcome.status == 0, outcome.printed[-3000:]
    counting = [at for at in outcome.syncs_of(STEPS) if "router_balance" in at]
    assert len(counting) == 1, counting
