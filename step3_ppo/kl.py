"""KL to the reference: its estimator k1, and the controller of the KL coefficient.

The KL is estimated from the tokens that the actor sampled: with d = log π − log π_ref of a token,
averages over such tokens of

    k1 = d                 without bias; of a single response it may be below 0
    k3 = exp(−d) − 1 + d   without bias, never below 0

both estimate KL(π ‖ π_ref) (Schulman, "Approximating KL divergence", 2020). Here k1 is computed, for the KL
penalty in the reward and for the metrics; `loss.py` computes k3, for the penalty in the loss. Takes flat
arrays over all response tokens and `offsets`, as `Experience` has them.
"""

from __future__ import annotations

import math

import numpy as np

from step3_ppo.config import KLController
from step3_ppo.experience import Experience

LARGEST_STEP = 0.2
"""The relative error of the KL to its target is clipped to this, before the coefficient is adapted."""


def k1(logprobs: np.ndarray, ref_logprobs: np.ndarray) -> np.ndarray:
    """float64 [R], of the actor's and the reference's log-probabilities [R] of the tokens."""
    return np.asarray(logprobs, np.float64) - np.asarray(ref_logprobs, np.float64)


def response_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """float64 [B]: sums of values [R] over the tokens of each response; offsets int64 [B + 1].

    Raises ValueError where a response has no token.
    """
    if not np.all(np.diff(offsets) > 0) or offsets[-1] != len(values):
        raise ValueError(f"offsets do not divide {len(values)} tokens into responses of one token or more")
    return np.add.reduceat(np.asarray(values, np.float64), offsets[:-1]) if len(values) else np.zeros(0)


def token_kl(experience: Experience) -> np.ndarray | None:
    """float64 [R], k1 = log π_old − log π_ref of each response token; None without a reference."""
    if experience.old_logprobs is None or experience.ref_logprobs is None:
        return None
    return k1(experience.old_logprobs, experience.ref_logprobs)


def response_kl(experience: Experience) -> np.ndarray | None:
    """float64 [B], the sums of `token_kl` over each response."""
    kl = token_kl(experience)
    return None if kl is None else response_sums(kl, experience.offsets)


def next_coef(
    controller: KLController, coef: float, kl: float, *, target: float, horizon: float, responses: int
) -> float:
    """The coefficient after an iteration of so many responses, over all ranks.

    kl: their mean KL, in nats per response (the sum of k1 over its tokens). adaptive multiplies by
    1 + clip(kl / target − 1, −0.2, 0.2) · responses / horizon (arXiv 1909.08593, 2.2); an iteration longer
    than the horizon counts as one. Raises ValueError for a kl that is not finite.
    """
    if controller is KLController.fixed:
        return coef
    if not math.isfinite(kl):
        raise ValueError(f"the KL of an iteration is {kl}")
    missed = min(max(kl / target - 1, -LARGEST_STEP), LARGEST_STEP)
    return coef * (1 + missed * min(responses / horizon, 1.0))
