"""What is DPO's own about its data: prompts of pairs, to sample from.

How pairs come to disk and into batches is in `common/training/step_data.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.data.stored import PairDataset
from common.data.types import TokenizedExample


@dataclass(frozen=True)
class ChosenAnswers:
    """The chosen sides of pairs, as documents."""

    pairs: PairDataset

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.pairs[index].chosen
