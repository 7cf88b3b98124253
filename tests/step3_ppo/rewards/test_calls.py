"""Calls with whole groups, one or several at once."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from step3_ppo.rewards.calls import in_whole_groups

GROUPS = np.array([4, 4, 7, 9, 9, 9, 11])
PROMPTS = [f"p{group}" for group in GROUPS]
COMPLETIONS = list("abcdefg")
COLUMNS = {"number": list(range(7))}


class Scorer:
    """Gives each response its column `number`, and remembers its calls."""

    def __init__(self, together: int = 1) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: list[threading.Thread] = []
        self._all_there = threading.Barrier(together)

    def __call__(self, prompts: Any, completions: Any, columns: Any) -> np.ndarray:
        self.calls.append((prompts, completions, columns))
        self.threads.append(threading.current_thread())
        self._all_there.wait(10)
        return np.array(columns["number"], np.float64)


def scored(scorer: Any, groups: np.ndarray = GROUPS, concurrency: int = 1) -> list[float]:
    return in_whole_groups(scorer, PROMPTS, COMPLETIONS, COLUMNS, groups, concurrency).tolist()


def test_a_single_call_has_everything_and_is_made_in_the_thread_of_the_caller() -> None:
    scorer = Scorer()
    assert scored(scorer) == list(range(7))
    assert scorer.calls == [(PROMPTS, COMPLETIONS, COLUMNS)]
    assert scorer.threads == [threading.current_thread()]


@pytest.mark.parametrize(
    ("concurrency", "parts"), [(2, ["abc", "defg"]), (3, ["abc", "def", "g"]), (64, ["ab", "c", "def", "g"])]
)
def test_several_calls_are_made_at_once_and_cut_no_group(concurrency: int, parts: list[str]) -> None:
    scorer = Scorer(together=len(parts))  # none returns before all have begun
    assert scored(scorer, concurrency=concurrency) == list(range(7))
    assert sorted("".join(completions) for _, completions, _ in scorer.calls) == parts
    for prompts, completions, columns in scorer.calls:
        places = [COMPLETIONS.index(completion) for completion in completions]
        assert columns == {"number": places} and prompts == [PROMPTS[place] for place in places]


def test_scores_come_back_to_their_responses_whatever_the_order_of_groups() -> None:
    groups = np.array([2, 0, 1, 0, 2, 1, 0])
    assert scored(Scorer(together=3), groups, 3) == list(range(7))


def test_without_responses_nothing_is_called() -> None:
    scorer = Scorer()
    found = in_whole_groups(scorer, [], [], {"number": []}, np.empty(0, np.int64), 4)
    assert found.dtype == np.float64 and not len(found) and not scorer.calls


def test_the_first_call_that_fails_says_why_after_all_have_ended() -> None:
    ended, all_there = [], threading.Barrier(4)

    def failing(prompts: Any, completions: Any, columns: Any) -> np.ndarray:
        all_there.wait(10)
        ended.append(completions)
        raise ValueError("".join(completions))

    with pytest.raises(ValueError, match="^ab$"):
        scored(failing, concurrency=4)
    assert len(ended) == 4
