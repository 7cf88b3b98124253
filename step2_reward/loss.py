"""What the reward model minimises, and the numbers read off its scores.

The loss of an optimizer step is the mean over its pairs, of all micro-batches and ranks, of

    −log σ(r_c − r_r − margin) + c (r_c + r_r)²

where r_c and r_r are the scores of the chosen and the rejected answer (InstructGPT, arXiv 2203.02155; margin:
Llama 2, arXiv 2307.09288; c draws rewards towards 0: arXiv 2312.09244). Everything here is a pure function of
scores, but for `score`, which runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.data.types import PairBatch
from common.model.packed import document_arguments
from common.model.sequence import reads_of_group
from common.runtime.distributed import all_gather_arrays
from common.training.engine import Engine


def score(engine: Engine, batch: PairBatch, device: torch.device) -> torch.Tensor:
    """fp32 [P, 2], the scores of the chosen and of the rejected answers; they carry the gradient."""
    batch = batch.to(device)
    arguments = document_arguments(batch.documents)
    ends = batch.score_positions
    scores: torch.Tensor = engine(**arguments, score_positions=ends, computed_positions=ends)
    return reads_of_group(scores, batch.score_reads).view(-1, 2)


def pair_losses(scores: torch.Tensor, margins: torch.Tensor, centering: float) -> torch.Tensor:
    """[P], the loss of each pair. scores: [P, 2], chosen and rejected; margins: [P], in units of reward."""
    chosen, rejected = scores.unbind(1)
    losses = -F.logsigmoid(chosen - rejected - margins)
    if centering:
        losses = losses + centering * (chosen + rejected) ** 2
    return losses


@dataclass(frozen=True)
class ScoredPairs:
    """P pairs and what the model said of them. Detached."""

    scores: torch.Tensor  # fp32 [P, 2], chosen and rejected
    margins: torch.Tensor  # fp32 [P]
    lengths: torch.Tensor  # int64 [P, 2], tokens of each answer with its prompt
    source_ids: torch.Tensor  # int64 [P]
    pair_ids: torch.Tensor  # int64 [P]

    @classmethod
    def of(cls, batch: PairBatch, scores: torch.Tensor) -> ScoredPairs:
        """One micro-batch. The scores stay where they are: nothing waits for the device here."""
        lengths, pair_ids = batch.lengths.view(-1, 2), torch.tensor(batch.pair_ids, dtype=torch.int64)
        return cls(scores.detach(), batch.margins, lengths, batch.source_ids, pair_ids)

    @classmethod
    def joined(cls, parts: Sequence[ScoredPairs]) -> ScoredPairs:
        """All of them on the host, in the order of their ids: sums do not depend on who computed what."""
        scores = torch.cat([part.scores for part in parts]).cpu()
        pair_ids = torch.cat([part.pair_ids for part in parts])
        order = pair_ids.argsort(stable=True)
        return cls(
            scores[order],
            torch.cat([part.margins for part in parts])[order],
            torch.cat([part.lengths for part in parts])[order],
            torch.cat([part.source_ids for part in parts])[order],
            pair_ids[order],
        )

    @classmethod
    def all_gathered(cls, parts: Sequence[ScoredPairs]) -> ScoredPairs:
        """What all ranks have scored, on every rank; all ranks call it."""
        own = [tensor.numpy() for tensor in vars(cls.joined(parts)).values()]
        return cls.joined([cls(*map(torch.from_numpy, share)) for share in all_gather_arrays(own)])


def step_metrics(pairs: ScoredPairs, centering: float) -> dict[str, float]:
    """The metrics of a training step of at least one pair, in float64."""
    scores = pairs.scores.double()
    chosen, rejected = scores.unbind(1)
    return {
        "loss": float(pair_losses(scores, pairs.margins.double(), centering).mean()),
        "accuracy": float(in_order(scores).mean()),
        "margin": float((chosen - rejected).mean()),
        "mean_reward": float(scores.mean()),
        "min_reward": float(scores.min()),
        "max_reward": float(scores.max()),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
        "reward_length_correlation": correlation(scores.flatten(), pairs.lengths.flatten().double()),
    }


def in_order(scores: torch.Tensor) -> torch.Tensor:
    """float64 [P]: 1 where the chosen answer has the higher score, 1/2 for a tie, else 0 (NaN: 0)."""
    chosen, rejected = scores.unbind(1)
    return (chosen > rejected).double() + 0.5 * (chosen == rejected).double()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's, of two series of equal length; 0 where it is undefined because one does not vary."""
    left, right = a.double() - a.double().mean(), b.double() - b.double().mean()
    spread = float(left.norm() * right.norm())
    return float(left @ right) / spread if spread > 0 else 0.0
