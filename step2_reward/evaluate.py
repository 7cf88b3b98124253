"""What the reward model is measured by on held-out pairs.

`score_pairs` runs the model; the rest are pure functions of all scores together, so that nothing depends on
the evaluation batch size or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from common.data.types import PairBatch
from common.evidence import share_interval
from common.training.engine import Engine
from step2_reward.loss import ScoredPairs, correlation, in_order, pair_losses, score, step_metrics

CALIBRATION_BINS = 10


@torch.no_grad()
def score_pairs(engine: Engine, batches: Iterable[PairBatch], device: torch.device) -> ScoredPairs:
    """The scores of all pairs of all ranks, on every rank. All ranks call it, with equally many batches."""
    engine.eval()
    parts = [ScoredPairs.of(batch, score(engine, batch, device)) for batch in batches]
    engine.train()
    return ScoredPairs.all_gathered(parts)


def held_out_metrics(pairs: ScoredPairs, sources: Sequence[str], centering: float) -> dict[str, float]:
    """The `eval/` metrics. Accuracy by length, and by source, is there where there are such pairs."""
    scores = pairs.scores.double()
    found = step_metrics(pairs, centering)
    metrics = {
        "eval/loss": found["loss"],
        "eval/accuracy": found["accuracy"],
        "eval/margin": found["margin"],
        "eval/mean_reward": found["mean_reward"],
        "eval/std_reward": float(scores.std(correction=0)),
        "eval/expected_calibration_error": expected_calibration_error(scores),
        "eval/reward_length_correlation": found["reward_length_correlation"],
    }
    correct = in_order(scores)
    for name, members in {**by_length(pairs.lengths), **by_source(pairs.source_ids, sources)}.items():
        if members.any():
            metrics[f"eval/{name}"] = float(correct[members].mean())
    return metrics


def expected_calibration_error(scores: torch.Tensor) -> float:
    """How far confidence and accuracy are apart, averaged over the pairs.

    The confidence in a pair is σ(|r_c − r_r|), from 1/2 to 1, in ten bins of equal width; the share of pairs
    of a bin that are in order (ties count half) is compared with their mean confidence (arXiv 1706.04599).
    scores: [P, 2], chosen and rejected.
    """
    gaps, bins = _gaps(scores)
    # of each bin: its share of the pairs times |accuracy − confidence|, whose common divisor cancels
    return float(_by_bin(gaps, bins).abs().sum() / len(scores))


def by_pair(pairs: ScoredPairs, centering: float = 0.0) -> dict[str, torch.Tensor]:
    """Metrics of `held_out_metrics` as a float64 number of each pair [P] whose mean the metric is.

    For intervals. The calibration error and the correlation are sums of pairs only about where they are: each
    pair gets its influence on them (of the correlation: z_a z_b − r (z_a² + z_b²) / 2, averaged over both
    answers).
    """
    scores = pairs.scores.double()
    gaps, bins = _gaps(scores)
    rewards, lengths = scores.flatten(), pairs.lengths.flatten().double()
    r = correlation(rewards, lengths)
    a, b = _standardised(rewards), _standardised(lengths)
    return {
        "loss": pair_losses(scores, pairs.margins.double(), centering),
        "accuracy": in_order(scores),
        "margin": scores[:, 0] - scores[:, 1],
        "expected_calibration_error": _by_bin(gaps, bins).sign()[bins] * gaps,
        "reward_length_correlation": (a * b - r * (a * a + b * b) / 2 + r).view(-1, 2).mean(1),
    }


def _gaps(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each pair what it was right by less its confidence, float64 [P], and its bin, int64 [P]."""
    chosen, rejected = scores.double().unbind(1)
    confidence = torch.sigmoid((chosen - rejected).abs())
    bins = ((confidence - 0.5) * 2 * CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)
    return in_order(scores) - confidence, bins


def _by_bin(gaps: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    return torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bins, gaps)


def _standardised(values: torch.Tensor) -> torch.Tensor:
    """Less their mean, in standard deviations; zeros where they do not vary."""
    spread = values.std(correction=0)
    return (values - values.mean()) / spread if spread > 0 else torch.zeros_like(values)


def by_length(lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name of an accuracy -> bool [P], the pairs it is of. lengths: [P, 2], chosen and rejected."""
    chosen, rejected = lengths.unbind(1)
    return {
        "accuracy_chosen_longer": chosen > rejected,
        "accuracy_chosen_shorter": chosen < rejected,
        "accuracy_same_length": chosen == rejected,
    }


def by_source(source_ids: torch.Tensor, sources: Sequence[str]) -> dict[str, torch.Tensor]:
    """The same by source; empty unless there are pairs of several."""
    if len(source_ids.unique()) < 2:
        return {}
    return {f"{name}/accuracy": source_ids == index for index, name in enumerate(sources)}


def calibration(metrics: Mapping[str, float], pairs: int) -> dict[str, Any]:
    """What a manifest says of a reward model's scores, from the metrics of an evaluation on `pairs` pairs.

    mean and std are over all rewards, of both answers: by these PPO makes a reward a number of usual size.
    accuracy_interval: between what the accuracy lies with 95 % confidence.
    """
    return {
        "mean": metrics["eval/mean_reward"],
        "std": metrics["eval/std_reward"],
        "accuracy": metrics["eval/accuracy"],
        "expected_calibration_error": metrics["eval/expected_calibration_error"],
        "accuracy_interval": list(share_interval(metrics["eval/accuracy"], pairs)),
        "pairs": pairs,
    }
