"""Which rank samples which prompts: the longest expected responses first, and as much to each rank.

Expected is the mean length of the responses to the same prompt when it was last sampled; of a prompt that was
not, the mean of those that were. All ranks know all responses, so they share out alike without a word. In the
first pass over the prompts nothing is expected of any, and every R-th prompt goes to a rank. Part of every
checkpoint: a resumed run shares out as one that was not interrupted. Decides who samples and in which order,
never what is sampled.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.training.snapshot import Open

if TYPE_CHECKING:
    from step3_ppo.rollout import Response

FILE = "lengths.npy"


class ExpectedLengths:
    """Of each prompt of a data set the mean length of its newest responses; a `Stateful` of checkpoints.

    All ranks hold the same, so only rank 0 writes it.
    """

    def __init__(self, prompts: int, *, writes: bool) -> None:
        """prompts: of the data set."""
        self._means = np.full(prompts, np.nan, np.float32)
        self._writes = writes

    def of(self, prompt_ids: Sequence[int]) -> np.ndarray:
        """float64 [len(prompt_ids)]: expected tokens of a response; NaN: nothing is expected."""
        return self._means[list(prompt_ids)].astype(np.float64)

    def note(self, responses: Sequence[Response]) -> None:
        """Of these prompts, these are the newest responses. A prompt of several groups has all of them."""
        prompts = np.array([response.prompt_id for response in responses], np.int64)
        lengths = np.array([len(response.tokens) for response in responses], np.float64)
        seen, places = np.unique(prompts, return_inverse=True)
        self._means[seen] = np.bincount(places, lengths) / np.bincount(places)

    def save(self, folder: Path, open_file: Open) -> None:
        """Write what is expected."""
        if self._writes:
            with open_file(folder / FILE) as file:
                np.save(file, self._means, allow_pickle=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; a checkpoint of an earlier version expects nothing."""
        self._means = np.full_like(self._means, np.nan)
        if (folder / FILE).exists():
            self._means = np.load(folder / FILE, allow_pickle=False)


def shared_out(expected: np.ndarray, ranks: int) -> list[np.ndarray]:
    """The groups that each rank samples, int64, in the order in which it begins them.

    expected: [G], tokens of a response; NaN: unknown. The longest group that is left goes to the rank with
    the fewest tokens so far (Graham's rule of longest processing time first, 1969). No rank gets more groups
    than an even share has: what a rank's cache needs does not depend on lengths.
    """
    known = ~np.isnan(expected)
    filled = np.where(known, expected, expected[known].mean() if known.any() else 1.0)
    most = -(-len(expected) // ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    open_ranks = [(0.0, 0, rank) for rank in range(ranks)]  # expected tokens, groups, rank
    for group in np.argsort(-filled, kind="stable").tolist():
        tokens, groups, rank = heapq.heappop(open_ranks)
        shares[rank].append(group)
        if groups + 1 < most:
            heapq.heappush(open_ranks, (tokens + float(filled[group]), groups + 1, rank))
    return [np.array(share, np.int64) for share in shares]
