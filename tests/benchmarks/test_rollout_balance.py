"""Passes that benchmarks/rollout_balance.py counts, beside the decoder's scheduler and by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.rollout_balance import CASES, drawn, measured, passes_of, stolen
from common.decoding.requests import Request, SamplingParams
from common.decoding.scheduler import Scheduler

SLOTS = 8


class NoPasses:
    """Logits that say nothing, of a scheduler whose responses end at lengths of their own."""

    chunk_slots = 1

    def padded(self, count: int) -> int:
        return count

    def logits(
        self, scheduler: Scheduler, rows: int, going_on: np.ndarray, prompts: Sequence[tuple[int, np.ndarray]]
    ) -> torch.Tensor:
        return torch.zeros(len(going_on) + len(prompts), 4)

    def copy(self, source: int, targets: Sequence[int], length: int) -> None: ...

    def rearrange(self, order: Sequence[int], length: int) -> None: ...


def test_passes_are_those_of_the_decoders_scheduler() -> None:
    lengths = np.random.default_rng(0).integers(1, 30, (12, 3))
    requests = [
        Request(np.array([1, group], np.int32), (group, sample), int(lengths[group, sample]))
        for group, sample in np.ndindex(*lengths.shape)
    ]
    scheduler = Scheduler(requests, SamplingParams(1.0, 30, ()), SLOTS, None)
    while scheduler.busy:
        scheduler.step(NoPasses())
    assert scheduler.made.tolist() == lengths.ravel().tolist()
    assert passes_of(lengths.ravel().tolist(), SLOTS) == scheduler.steps


def test_a_stolen_prompt_goes_to_the_rank_whose_slot_is_free_first() -> None:
    # one slot each: 5 to the first, 2 to the second, which is free first and takes 4, then the first takes 1
    assert stolen(np.array([[5], [2], [4], [1]]), ranks=2, slots=1) == 6


def test_no_way_is_below_the_bound_and_nothing_known_is_as_static() -> None:
    for case in list(CASES.values())[3:6:2]:
        found = measured(case, 0)
        assert min(found.values()) == found["bound"] and found["first epoch"] == found["static"]
        now, before = drawn(case, 0)
        assert now.shape == before.shape == (case.prompts, case.samples)
        assert now.max() <= case.longest and now.min() >= 1
