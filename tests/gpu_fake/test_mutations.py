"""The fake device tells faults: each of these, put into the product, makes the run or its numbers fail."""

from __future__ import annotations

import pytest

from tests.gpu_fake.jobs import STEPS, Fake, Shape
from tests.gpu_fake.waits import assert_waits, expected

pytestmark = pytest.mark.gpu_fake

REFUSED = {
    "a_host_tensor_among_device_tensors": ("sft", "a host tensor meets a device tensor"),
    "a_prefix_made_on_the_host": ("reward", "a host tensor meets a device tensor"),
    "boundaries_of_documents_in_int64": ("sft", "int32"),
    "keys_of_another_dtype": ("sft", "expected one half-precision dtype"),
    "an_argument_that_the_kernel_does_not_have": ("sft", "unexpected keyword argument 'is_causal'"),
    "grouped_heads_without_saying_so": ("sft", "enable_gqa"),
    "a_target_too_few": ("sft", "side by side, got"),
    "a_weight_in_another_dtype": ("sft", "expected one dtype"),
}
WAITING = {
    "an_item_in_every_micro_batch": "item at step1_sft/train.py:",
    "positions_that_differ_asked_of_the_device": "_unique2, sized by values at common/model/packed.py",
    "a_blocking_copy_of_the_batch": "copy from host at ",
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_gpu_would_refuse_it(fake: Fake, change: str) -> None:
    step, words = REFUSED[change]
    outcome = fake.run(step, change=change)
    assert outcome.status == 1 and words in outcome.printed, outcome.printed[-3000:]


@pytest.mark.parametrize("change", WAITING)
def test_it_makes_the_host_wait_and_the_line_is_named(fake: Fake, change: str) -> None:
    outcome = fake.run("sft", change=change)
    assert outcome.status == 0, outcome.printed[-3000:]
    with pytest.raises(AssertionError) as caught:
        assert_waits(outcome, expected("sft", Shape()))
    assert WAITING[change] in str(caught.value)


def test_a_copy_from_memory_that_is_not_pinned_is_seen(fake: Fake) -> None:
    found = fake.run("sft", change="a_batch_that_is_not_pinned").pageable_of(STEPS)
    assert found == {"common/data/types.py <lambda>"}


@pytest.mark.parametrize("change", ["activations_that_are_kept", "whole_logits"])
def test_it_takes_memory(fake: Fake, change: str) -> None:
    assert fake.run("sft", change=change).peak > 1.05 * fake.run("sft").peak
