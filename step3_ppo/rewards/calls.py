"""How a rank calls what scores: with whole groups, in one call or in several at once.

Takes the responses of a rank and which of them answer the same prompt; returns their scores. What a function
or a server says of a response may depend on its group, and on nothing else that happens to be in the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from step3_ppo.rewards.functions import Columns, Prompts

Scorer = Callable[[Prompts, Sequence[str], Columns], np.ndarray]


def in_whole_groups(
    scorer: Scorer,
    prompts: Prompts,
    completions: Sequence[str],
    columns: Columns,
    groups: np.ndarray,
    concurrency: int = 1,
) -> np.ndarray:
    """float64 [B] of at most `concurrency` calls, all at once, each with about as many groups.

    groups: int64 [B]. Without responses nothing is called. A single call is made in this thread, where a
    function may use signals. Of calls that fail the first one's error is raised, when none is in flight.
    """
    if not len(groups):
        return np.empty(0, np.float64)

    def score(part: np.ndarray) -> np.ndarray:
        def of(values: Sequence[Any]) -> list[Any]:
            return [values[index] for index in part]

        return scorer(of(prompts), of(completions), {name: of(values) for name, values in columns.items()})

    numbers = np.unique(groups)
    shares = np.array_split(numbers, min(concurrency, len(numbers)))
    parts = [np.flatnonzero(np.isin(groups, share)) for share in shares]
    if len(parts) == 1:
        return score(parts[0])
    found = np.empty(len(groups), np.float64)
    with ThreadPoolExecutor(len(parts)) as calls:
        for part, scores in zip(parts, calls.map(score, parts), strict=True):
            found[part] = scores
    return found
