"""What is known of a step's rows and schedule before it starts: for the controller, which imports no torch.

Made by `common/training/forecast.py`, in a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataCounts:
    """Counts of a step. scale: 1, or by how much those of a sample were multiplied.

    ledger: what became of the rows, as lines of text. rows: of an epoch, packed where the step packs (PPO:
    prompts). total_steps: of the run (PPO: iterations). longest: tokens of its longest document. fill: share
    of the rows' room that is filled. seen: documents of an epoch, by the weights of their sources; 0: not
    known. notices: what the step will do in another way than one would expect, as far as its
    tokenizer and its architecture tell.
    """

    ledger: list[str]
    documents: int
    held_out: int
    tokens: int
    trained_tokens: int
    rows: int
    total_steps: int
    longest: int
    fill: float
    vocabulary: int
    scale: float = 1.0
    seen: int = 0
    notices: tuple[str, ...] = ()

    @property
    def mean_length(self) -> float | None:
        """Tokens of a document; None where there is none."""
        return self.tokens / self.documents if self.tokens and self.documents else None

    @property
    def trained_share(self) -> float:
        """Of the tokens; 1 where nothing says which are trained."""
        return self.trained_tokens / self.tokens if self.trained_tokens and self.tokens else 1.0
