"""What is the reward model's own about its data: pairs to calibrate on, answers to compare an export with.

How pairs come to disk and into batches is in `common/training/step_data.py`.
"""

from __future__ import annotations

import numpy as np
import torch

from common.data.batches import PairSource
from common.data.types import TokenizedPair

PROBE_PAIRS, PROBE_LENGTH = 4, 256


class PairSubset:
    """A seeded choice of at most `count` pairs of a data set, in their order."""

    def __init__(self, pairs: PairSource, count: int, seed: int) -> None:
        self._pairs = pairs
        self._chosen = np.sort(np.random.default_rng([seed, 3]).permutation(len(pairs))[:count])
        self.lengths = pairs.lengths[self._chosen]
        self.source_ids = pairs.source_ids[self._chosen]
        self.sources = pairs.sources

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> TokenizedPair:
        return self._pairs[int(self._chosen[index])]


def probe_documents(pairs: PairSource, device: torch.device) -> list[torch.Tensor]:
    """The ends, with their terminators, of a few answers: int64 [T] each, for comparing an exported model."""
    sides = [side for index in range(min(PROBE_PAIRS, len(pairs))) for side in _sides(pairs[index])]
    return [torch.from_numpy(ids[-PROBE_LENGTH:].astype(np.int64)).to(device) for ids in sides]


def _sides(pair: TokenizedPair) -> tuple[np.ndarray, np.ndarray]:
    return pair.chosen.input_ids, pair.rejected.input_ids
