"""Which step a row belongs to when steps share one data set."""

from __future__ import annotations

from collections import Counter

import pytest

from common.data.stages import StageSplit
from common.errors import UserError

SHARES = {"sft": 2.0, "reward": 4.0, "ppo": 4.0}
QUESTIONS = [f"question {number}" for number in range(5000)]


def part(stage: str, seed: int = 0) -> set[str]:
    split = StageSplit(SHARES, stage, seed)
    return {question for question in QUESTIONS if split.has(question)}


def test_the_parts_are_disjoint_and_together_everything() -> None:
    times = Counter(question for stage in SHARES for question in part(stage))
    assert len(times) == 5000 and set(times.values()) == {1}


def test_the_parts_have_about_the_shares_asked_for() -> None:
    # 5,000 draws: three standard deviations are 2.1 percentage points at the most
    found = {stage: len(part(stage)) / 5000 for stage in SHARES}
    assert found == pytest.approx({"sft": 0.2, "reward": 0.4, "ppo": 0.4}, abs=0.021)


def test_another_seed_gives_other_parts() -> None:
    common = part("sft", 0) & part("sft", 1)
    assert len(common) / 5000 == pytest.approx(0.04, abs=0.01)  # as many as two draws share by chance


def test_the_order_in_which_shares_are_written_does_not_matter() -> None:
    swapped = StageSplit(dict(reversed(SHARES.items())), "sft", 0)
    assert {question for question in QUESTIONS if swapped.has(question)} == part("sft")


def test_white_space_around_a_question_does_not_matter() -> None:
    split = StageSplit(SHARES, "sft", 0)
    assert all(split.has(question) == split.has(f" {question}\n") for question in QUESTIONS[:100])


def test_without_shares_every_step_sees_everything() -> None:
    assert StageSplit({}, None, 0).has("anything")


def test_a_step_without_a_share_is_an_error_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"sft: 2, ppo: 4.*no share for this step, dpo\n.*stage_split.dpo=1"):
        StageSplit({"sft": 2.0, "ppo": 4.0}, "dpo", 0)
