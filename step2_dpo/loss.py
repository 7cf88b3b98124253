"""What DPO minimises, and the numbers read off it.

Of each pair, Δ is how much further the policy has moved from the reference on the chosen answer than on the
rejected one, both measured by the answers' summed log-probabilities. The loss of an optimizer step is the
mean over its pairs of

    sigmoid  −(1−ε) log σ(βΔ) − ε log σ(−βΔ)    DPO (arXiv 2305.18290); ε > 0 is cDPO
    ipo      (Δ̄ − 1/(2β))²                      IPO (arXiv 2310.12036), Δ̄ of log-probabilities per token
    hinge    max(0, 1 − βΔ)                      SLiC (arXiv 2305.10425)

plus `sft_weight` times the mean over its chosen tokens of their negative log-likelihood. Both means are over
all micro-batches and ranks: sums travel through here and are divided by counts known beforehand. Computes
nothing of the reference; see reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, assert_never

import torch
import torch.nn.functional as F

from common.data.types import PairBatch
from common.model.fused_loss import TokenLoss
from common.model.packed import batch_arguments
from common.model.sequence import reads_of_group
from common.runtime.distributed import all_reduce_sum, on_host
from common.training.engine import Engine
from step2_dpo.config import DPOConfig, LossType


class ChosenRejected(NamedTuple):
    """One number for each pair's chosen answer and one for its rejected answer: float64 [P] each."""

    chosen: torch.Tensor
    rejected: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """What is minimised, of a pair. The fields are those of `DPOConfig`."""

    loss_type: LossType = LossType.sigmoid
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False
    sft_weight: float = 0.0

    @classmethod
    def of(cls, config: DPOConfig) -> Objective:
        return cls(
            config.loss_type,
            config.beta,
            config.label_smoothing,
            config.length_normalized,
            config.sft_weight,
        )

    def losses(self, ratios: ChosenRejected, lengths: ChosenRejected) -> torch.Tensor:
        """The preference part of each pair's loss, float64 [P].

        ratios: log π − log π_ref of each answer. lengths: its response tokens.
        """
        if self.length_normalized or self.loss_type is LossType.ipo:
            ratios = ChosenRejected(ratios.chosen / lengths.chosen, ratios.rejected / lengths.rejected)
        return self.of_difference(ratios.chosen - ratios.rejected)

    def of_difference(self, delta: torch.Tensor) -> torch.Tensor:
        """The loss as a function of Δ, element by element."""
        if self.loss_type is LossType.ipo:
            return (delta - 1 / (2 * self.beta)) ** 2
        if self.loss_type is LossType.hinge:
            return torch.relu(1 - self.beta * delta)
        if self.loss_type is LossType.sigmoid:
            smoothing = self.label_smoothing
            right, wrong = F.logsigmoid(self.beta * delta), F.logsigmoid(-self.beta * delta)
            return -(1 - smoothing) * right - smoothing * wrong
        assert_never(self.loss_type)

    def at_reference(self) -> float:
        """The loss of a policy that is its reference: log 2 for sigmoid."""
        return float(self.of_difference(torch.zeros((), dtype=torch.float64)))


class PairLosses(NamedTuple):
    """A micro-batch of P pairs. `losses` and `chosen_nll` carry the gradient.

    losses: float64 [P], the preference part. chosen_nll: float64 scalar, minus the log-likelihood of all
    chosen answers' tokens. logps, ratios: of each answer, log π and log π − log π_ref. tokens: what the
    projection says of all response tokens, chosen and rejected.
    """

    losses: torch.Tensor
    chosen_nll: torch.Tensor
    logps: ChosenRejected
    ratios: ChosenRejected
    tokens: TokenLoss


def answer_sums(values: torch.Tensor, document_of_target: torch.Tensor, pairs: int) -> ChosenRejected:
    """Sums over each answer's tokens, in float64. values: [M]; document_of_target: int64 [M], ascending.

    By segments, in order: adding by index would sum in another order each time on a GPU.
    """
    documents = torch.arange(2 * pairs + 1, device=document_of_target.device)
    lengths = torch.searchsorted(document_of_target, documents).diff()  # bincount would wait for the device
    # `unsafe` skips checks that fail for a batch without pairs
    sums = torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True, initial=0.0)
    return ChosenRejected(sums[0::2], sums[1::2])


def count_answers(batch: PairBatch) -> ChosenRejected:
    """Response tokens of each answer."""
    ones = torch.ones_like(batch.document_of_target, dtype=torch.float64)
    return answer_sums(ones, batch.document_of_target, len(batch.pair_ids))


def compute_loss(
    engine: Engine,
    batch: PairBatch,
    reference: ChosenRejected,
    objective: Objective,
    device: torch.device,
    *,
    with_entropy: bool,
) -> PairLosses:
    """The batch's losses under the live policy. reference: log π_ref of its pairs, in its order."""
    batch = batch.to(device)
    tokens = engine(**batch_arguments(batch.documents), with_entropy=with_entropy, per_token=True)
    return pair_losses(tokens, batch, reference, objective)


def pair_losses(
    tokens: TokenLoss, batch: PairBatch, reference: ChosenRejected, objective: Objective
) -> PairLosses:
    """From tokens to pairs; `tokens.token_losses` carry the gradient."""
    losses = reads_of_group(tokens.token_losses, batch.target_reads)
    nll = answer_sums(losses, batch.document_of_target, len(batch.pair_ids))
    logps = ChosenRejected(-nll.chosen, -nll.rejected)
    ratios = ChosenRejected(
        logps.chosen - reference.chosen.to(logps.chosen.device, non_blocking=True),
        logps.rejected - reference.rejected.to(logps.rejected.device, non_blocking=True),
    )
    preferences = objective.losses(ratios, count_answers(batch))
    return PairLosses(preferences, nll.chosen.sum(), logps, ratios, tokens)


@dataclass(frozen=True)
class StepCounts:
    """What a step, or an evaluation, has over all its micro-batches and ranks."""

    pairs: float
    response_tokens: float
    chosen_tokens: float  # of the response tokens, those of chosen answers

    @staticmethod
    def of(batches: Sequence[PairBatch]) -> tuple[int, int, int]:
        """The same of this rank's batches, to be summed over ranks."""
        targets = [batch.document_of_target % 2 for batch in batches]
        return (
            sum(len(batch.pair_ids) for batch in batches),
            sum(len(sides) for sides in targets),
            sum(int((sides == 0).sum()) for sides in targets),
        )


def step_loss(result: PairLosses, objective: Objective, counts: StepCounts) -> torch.Tensor:
    """This micro-batch's share of the step's loss; carries the gradient."""
    loss = result.losses.sum() / counts.pairs
    if objective.sft_weight:
        loss = loss + objective.sft_weight * result.chosen_nll / counts.chosen_tokens
    return loss


@dataclass
class PairSums:
    """Sums over the pairs that one rank saw in one step, or in an evaluation."""

    above_reference: torch.Tensor | float = 0.0  # preference losses less their value at the reference
    chosen_nll: torch.Tensor | float = 0.0
    correct_order: torch.Tensor | float = 0.0
    chosen_ratio: torch.Tensor | float = 0.0
    rejected_ratio: torch.Tensor | float = 0.0
    chosen_logp: torch.Tensor | float = 0.0
    rejected_logp: torch.Tensor | float = 0.0
    correct_tokens: torch.Tensor | float = 0.0
    entropy: torch.Tensor | float = 0.0

    def add(self, result: PairLosses, objective: Objective) -> None:
        """Add one micro-batch; nothing waits for the device here."""
        chosen, rejected = (ratio.detach() for ratio in result.ratios)
        # the mean of equal numbers is that number for any count of them only when the number is 0
        self.above_reference += (result.losses.detach() - objective.at_reference()).sum()
        self.chosen_nll += result.chosen_nll.detach()
        self.correct_order += ((chosen > rejected).double() + 0.5 * (chosen == rejected)).sum()
        self.chosen_ratio += chosen.sum()
        self.rejected_ratio += rejected.sum()
        self.chosen_logp += result.logps.chosen.detach().sum()
        self.rejected_logp += result.logps.rejected.detach().sum()
        self.correct_tokens += result.tokens.correct.double()
        self.entropy += result.tokens.entropy_sum.detach().double()

    def metrics(self, objective: Objective, counts: StepCounts, *, with_entropy: bool) -> dict[str, float]:
        """Means over all ranks. Ties count half in `rewards/accuracies`, so it is 1/2 at the reference.

        Rewards are implicit, β (log π − log π_ref), never divided by lengths. `entropy` and
        `mean_token_accuracy` are over the tokens of both answers. with_entropy: as the losses were asked for;
        without it there is no `entropy`.
        """
        total = PairSums(*all_reduce_sum(on_host(list(vars(self).values()))))
        preference = objective.at_reference() + total.above_reference / counts.pairs
        nll = total.chosen_nll / counts.chosen_tokens
        chosen, rejected = (
            objective.beta * ratio / counts.pairs for ratio in (total.chosen_ratio, total.rejected_ratio)
        )
        entropy = {"entropy": float(total.entropy / counts.response_tokens)} if with_entropy else {}
        return {
            "loss": float(preference + objective.sft_weight * nll),
            "rewards/chosen": float(chosen),
            "rewards/rejected": float(rejected),
            "rewards/accuracies": float(total.correct_order / counts.pairs),
            "rewards/margins": float(chosen - rejected),
            "logps/chosen": float(total.chosen_logp / counts.pairs),
            "logps/rejected": float(total.rejected_logp / counts.pairs),
            **entropy,
            "mean_token_accuracy": float(total.correct_tokens / counts.response_tokens),
        }
