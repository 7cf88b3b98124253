"""The same PPO, however it is spread over micro-batches, ranks, ZeRO stages, rows and slots."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.step3_ppo.runs import (
    Artifacts,
    lines_of,
    make_job,
    run_job,
    series,
    watched,
)

pytestmark = pytest.mark.slow  # nine or so whole runs; one gradient at a time is compared in the suite

# of the change of the weights: fp32 sums in another order, grown by four Adam steps that divide small numbers
# by small ones
TOLERANCE = 1e-5
# of what is logged: a critic's gradient of norm 27 is clipped to 1, and its direction amplifies what differs
LOGGED_TOLERANCE = 1e-4
METRICS = (
    "objective/scores", "objective/kl", "objective/entropy", "loss/policy_avg", "loss/value_avg", "grad_norm",
    "critic/grad_norm", "policy/approxkl_avg", "policy/entropy_avg", "val/ratio_off",
    "val/explained_variance",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One way to run the same training."""

    ranks: int
    micro_batch_size: int
    packing: bool
    stage: int
    slots: int
    sequence_parallel: int = 1

    @property
    def name(self) -> str:
        rows = "packed" if self.packing else "single"
        rows += f"-slices{self.sequence_parallel}" * (self.sequence_parallel > 1)
        return f"ranks{self.ranks}-micro{self.micro_batch_size}-{rows}-zero{self.stage}-slots{self.slots}"


ONE = Point(1, 1, True, 2, 3)
OTHERS = [
    Point(1, 4, False, 2, 1),
    Point(1, 2, True, 3, 8),
    Point(2, 2, True, 1, 3),
    Point(2, 1, False, 2, 8),
    Point(2, 4, True, 3, 1),
    Point(2, 2, True, 1, 3, sequence_parallel=2),
    Point(4, 1, True, 3, 3, sequence_parallel=2),
    Point(4, 2, False, 2, 8, sequence_parallel=4),
]


@pytest.fixture(scope="module")
def run_of(artifacts: Artifacts) -> Callable[[Point], Path]:
    """The finished run of a point; each is made once."""

    @functools.cache
    def run(point: Point) -> Path:
        folder = artifacts.policy.parent
        job = make_job(folder, artifacts, max_steps=2, micro_batch_size=point.micro_batch_size)
        job.ppo.data.packing, job.deepspeed.stage = point.packing, point.stage
        job.ppo.rollout.slots = point.slots
        job.launch.sequence_parallel = point.sequence_parallel
        run_job(job, folder / "runs" / point.name, point.ranks)
        return folder / "runs" / point.name

    return run


@pytest.mark.parametrize("point", OTHERS, ids=lambda point: point.name)
def test_the_responses_are_the_same_whatever_the_ranks_and_slots(run_of: Any, point: Point) -> None:
    ours, theirs = (watched(run_of(p))["experiences"] for p in (point, ONE))
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert len(one.responses) == len(other.responses) == 8
        for response, expected in zip(one.responses, other.responses, strict=True):
            assert np.array_equal(response.tokens, expected.tokens)
            assert (response.prompt_id, response.group) == (expected.prompt_id, expected.group)
    # before anything is learned also their probabilities, to the last bit
    logprobs = [np.concatenate([r.logprobs for r in found[0].responses]) for found in (ours, theirs)]
    assert np.array_equal(*logprobs)


def change_of(run_dir: Path, artifacts: Artifacts) -> torch.Tensor:
    """What the run did to the policy's weights."""
    from safetensors.torch import load_file

    before = load_file(artifacts.policy / "model.safetensors")
    after = load_file(run_dir / "ppo" / "export" / "model.safetensors")
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in sorted(before)])


@pytest.mark.parametrize("point", OTHERS, ids=lambda point: point.name)
def test_the_whole_run_does_not_depend_on_how_it_is_spread(
    run_of: Any, artifacts: Artifacts, point: Point
) -> None:
    expected, found = (change_of(run_of(p), artifacts) for p in (ONE, point))
    assert expected.norm() > 1e-2
    assert float((found - expected).norm() / expected.norm()) < TOLERANCE
    for name in METRICS:
        assert len(series(run_of(ONE), name)) == 2
        assert series(run_of(point), name) == pytest.approx(
            series(run_of(ONE), name), rel=LOGGED_TOLERANCE, abs=1e-6
        )
    for line, other in zip(*(lines_of(run_of(p), "eval/reward") for p in (ONE, point)), strict=True):
        assert other == pytest.approx(line, rel=LOGGED_TOLERANCE, abs=1e-5)


def test_samples_do_not_depend_on_ranks_or_slots(run_of: Any) -> None:
    texts = [
        [
            line.partition('"reward"')[0]
            for line in (run_of(p) / "ppo" / "samples.jsonl").read_text().splitlines()
        ]
        for p in (ONE, *OTHERS)
    ]
    assert all(text == texts[0] for text in texts) and len(texts[0]) == 12
