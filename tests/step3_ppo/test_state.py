"""What a checkpoint holds of an iteration that was not finished comes back bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.training.engine import StepOutcome
from common.training.snapshot import Snapshot
from step3_ppo.rollout import Experience, Response
from step3_ppo.state import PPOCounters, Unfinished


def some_experience() -> Experience:
    generator = np.random.default_rng(3)
    responses = [
        Response(
            prompt_id=7 * index,
            group=index // 2,
            prompt=generator.integers(0, 50, 3 + index).astype(np.int32),
            tokens=generator.integers(0, 50, length).astype(np.int32),
            logprobs=generator.standard_normal(length).astype(np.float32),
            stopped=index != 1,
        )
        for index, length in enumerate([1, 4, 2, 6])
    ]
    tokens = 13
    return Experience(
        responses,
        {"reward_model": generator.standard_normal(4), "a b": generator.standard_normal(4)},
        rewards=generator.standard_normal(4),
        old_logprobs=generator.standard_normal(tokens).astype(np.float32),
        advantages=generator.standard_normal(tokens).astype(np.float32),
    )


def test_an_unfinished_iteration_comes_back_bit_for_bit(tmp_path: Path) -> None:
    before, after = Unfinished(writes=True), Unfinished(writes=True)
    before.experience = some_experience()
    before.save(tmp_path, Snapshot(tmp_path, None).open)
    after.load(tmp_path)
    found, expected = after.experience, before.experience
    assert found is not None
    assert len(found.responses) == 4
    for ours, theirs in zip(found.responses, expected.responses, strict=True):
        assert (ours.prompt_id, ours.group, ours.stopped) == (theirs.prompt_id, theirs.group, theirs.stopped)
        for name in ("prompt", "tokens", "logprobs"):
            left, right = getattr(ours, name), getattr(theirs, name)
            assert left.dtype == right.dtype
            assert left.tobytes() == right.tobytes()
    assert list(found.scores) == ["reward_model", "a b"]
    for name, scores in expected.scores.items():
        assert found.scores[name].tobytes() == scores.tobytes()
    for name in ("rewards", "old_logprobs", "advantages"):
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes()
    assert found.values is None
    assert found.returns is None


def test_only_one_rank_writes_and_a_finished_iteration_leaves_nothing(tmp_path: Path) -> None:
    other, finished = Unfinished(writes=False), Unfinished(writes=True)
    other.experience = some_experience()
    other.save(tmp_path, Snapshot(tmp_path, None).open)
    finished.save(tmp_path, Snapshot(tmp_path, None).open)
    assert list(tmp_path.iterdir()) == []
    other.load(tmp_path)
    assert other.experience is None


def test_counters_survive_json_exactly() -> None:
    counters = PPOCounters(
        step=3, update=1, kl_coef=0.1 + 0.2, sums={"loss": 1 / 3}, watchdogs={"a": [1.5, None]}
    )
    assert PPOCounters.of(json.loads(json.dumps(asdict(counters)))) == counters


def test_the_place_of_a_checkpoint_is_told_by_its_iteration() -> None:
    assert PPOCounters(step=5, update=2, updates=42).place == "in iteration 6 after 2 of its updates"
    assert PPOCounters(step=5, updates=40).place == "after iteration 5"
    assert PPOCounters().place == "before iteration 1"


def test_an_update_that_changed_only_the_critic_counts_as_skipped_for_nobody_in_warm_up() -> None:
    done, lost = StepOutcome(True, 1.0), StepOutcome(False, math.nan)
    warm = PPOCounters().after_update(None, done)
    assert (warm.update, warm.applied, warm.critic_applied, warm.skipped) == (1, 0, 1, 0)
    bad = warm.after_update(lost, done).after_update(done, lost)
    assert (bad.applied, bad.critic_applied, bad.skipped, bad.critic_skipped) == (1, 2, 1, 1)
    assert (bad.skipped_in_a_row, bad.critic_skipped_in_a_row) == (0, 1)
    assert bad.after_update(done, done).critic_skipped_in_a_row == 0


def test_an_update_that_only_one_network_skipped_has_its_own_number() -> None:
    done, lost = StepOutcome(True, 1.0), StepOutcome(False, math.nan)
    counters, seen = PPOCounters(), []
    for actor, critic in [(lost, done), (done, done), (done, lost), (lost, lost)]:
        counters = counters.after_update(actor, critic)
        both = counters.of_actor(), counters.of_critic()
        seen.append(tuple((own.step, own.applied, own.skipped_in_a_row) for own in both))
    assert seen == [
        ((1, 0, 1), (1, 1, 0)),
        ((2, 1, 0), (2, 2, 0)),
        ((3, 2, 0), (3, 2, 1)),
        ((4, 2, 1), (4, 2, 2)),
    ]
