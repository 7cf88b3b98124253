"""Parts 4, 5 and 7 of an iteration: rewards of tokens with the KL penalty, advantages, the KL coefficient.

Takes flat arrays over all response tokens of an iteration, of all ranks, and `offsets`, as in `Experience`
(`with_advantages` reads them from it). Every rank holds all responses, so all compute the same, and a mean
over tokens is over the tokens of all ranks. Nothing is padded, so no mask can be forgotten. Plain numpy, in
float64; knows no model and draws nothing.

    gae           generalised advantage estimation (arXiv 1506.02438), with a critic
    grpo          against the other responses to the prompt, in units of their spread (arXiv 2402.03300)
    rloo          against the mean of the other responses to the prompt (arXiv 2402.14740)
    reinforce_pp  REINFORCE++ (arXiv 2501.03262): the reward to go, whitened over all tokens

Where all rewards are equal (of a group with grpo, of the iteration with reinforce_pp) advantages are 0: the
spread is 0, and dividing by it would turn the KL penalty, which still differs, into signal.

The KL to the reference is estimated from the tokens that the actor sampled. With d = log π − log π_ref of a
token, averages over such tokens of

    k1 = d                 without bias; of a single response it may be below 0
    k3 = exp(−d) − 1 + d   without bias, never below 0

both estimate KL(π ‖ π_ref) (Schulman, "Approximating KL divergence", 2020). k1 is computed here, for the KL
penalty in the reward and for the metrics; `loss.py` computes k3, for the penalty in the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import assert_never

import numpy as np

from step3_ppo.config import Estimator, KLController, KLPlacement, PPOConfig
from step3_ppo.rollout import Experience

SMALLEST_VARIANCE = 1e-8
"""Smallest divisor of whitening: below it there is only rounding, which must not become signal."""

SPREAD_FLOOR = 1e-6
"""Added to the standard deviation of a group's rewards (grpo)."""

LARGEST_STEP = 0.2
"""The relative error of the KL to its target is clipped to this, before the coefficient is adapted."""


@dataclass(frozen=True)
class Advantages:
    """Of R response tokens. advantages: fp32 [R]. returns: fp32 [R], of the critic (gae), or None."""

    advantages: np.ndarray
    returns: np.ndarray | None = None


def with_advantages(experience: Experience, ppo: PPOConfig, kl_coef: float) -> Experience:
    """The experience with advantages and returns, from its rewards, KLs and values."""
    assert experience.rewards is not None
    found = compute_advantages(
        ppo.estimator,
        rewards=experience.rewards,
        offsets=experience.offsets,
        groups=experience.groups,
        kl=token_kl(experience),
        kl_coef=kl_penalty_coef(ppo, kl_coef),
        values=experience.values,
        gamma=ppo.gamma,
        lam=ppo.lam,
        whiten=ppo.whiten_advantages,
    )
    return replace(experience, advantages=found.advantages, returns=found.returns)


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


def kl_penalty_coef(ppo: PPOConfig, kl_coef: float) -> float:
    """The coefficient of the KL penalty in the reward; 0 where the penalty is in the loss."""
    return kl_coef if ppo.kl.placement is KLPlacement.reward else 0.0


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


def compute_advantages(
    estimator: Estimator,
    *,
    rewards: np.ndarray,
    offsets: np.ndarray,
    groups: np.ndarray | None = None,
    kl: np.ndarray | None = None,
    kl_coef: float = 0.0,
    values: np.ndarray | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
) -> Advantages:
    """Advantages by one of the estimators.

    rewards [B]: of whole responses. offsets: int64 [B + 1]. groups: int64 [B], which responses share a prompt
    (grpo, rloo). kl: k1 of each token [R]; kl_coef: KL penalty per nat in the reward, 0 when it is in the
    loss. values [R]: the critic's (gae). gamma: gae, reinforce_pp. lam, whiten: gae.

    grpo and rloo have one reward per response, and subtract the KL penalty of all its tokens from it. rloo
    does so before it compares responses; grpo (whose paper has the penalty in the loss) subtracts the
    difference to the group's mean penalty, and does not divide it by the rewards' spread. Raises ValueError
    where something that the estimator needs is missing.
    """
    if kl is None and kl_coef:
        raise ValueError(f"a coefficient of {kl_coef} and no KL to multiply")
    kl = np.zeros(offsets[-1]) if kl is None or not kl_coef else kl
    penalties = -kl_coef * response_sums(kl, offsets)
    if estimator in (Estimator.grpo, Estimator.rloo):
        if groups is None:
            raise ValueError(f"{estimator.value} without groups")
        if estimator is Estimator.grpo:
            of_responses = _with_penalty(group_relative(rewards, groups), rewards, penalties, groups)
        else:
            of_responses = leave_one_out(np.asarray(rewards, np.float64) + penalties, groups)
        return Advantages(_fp32(np.repeat(of_responses, np.diff(offsets))))
    of_tokens = token_rewards(rewards, offsets, kl=kl, coef=kl_coef)
    if estimator is Estimator.reinforce_pp:
        to_go = reward_to_go(of_tokens, offsets, gamma=gamma)
        white = whitened(to_go) if np.ptp(rewards) else np.zeros_like(to_go)
        return Advantages(_fp32(white))
    if estimator is Estimator.gae:
        if values is None:
            raise ValueError("gae without values")
        found, returns = gae(of_tokens, values, offsets, gamma=gamma, lam=lam)
        return Advantages(_fp32(whitened(found) if whiten else found), _fp32(returns))
    assert_never(estimator)


def token_rewards(
    rewards: np.ndarray, offsets: np.ndarray, *, kl: np.ndarray | None = None, coef: float = 0.0
) -> np.ndarray:
    """float64 [R]: −coef · kl of each token, and the response's reward on its last, the terminator."""
    of_tokens = np.zeros(offsets[-1]) if kl is None else -coef * np.asarray(kl, np.float64)
    _check(offsets, of_tokens)
    of_tokens[offsets[1:] - 1] += rewards
    return of_tokens


def gae(
    rewards: np.ndarray, values: np.ndarray, offsets: np.ndarray, *, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns (advantages + values), float64 [R] each, of rewards [R] and values [R].

    A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} − V_t. After a response's last token both V and A are 0:
    the end of a response is the end of an episode, also where it was cut short. Computed in one vector step
    for each distance from the end, over all responses of that length or more.
    """
    _check(offsets, rewards, values)
    rewards, values = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    lengths = np.diff(offsets)
    longest_first = np.argsort(-lengths, kind="stable")
    shrinking, last = -lengths[longest_first], offsets[1:][longest_first] - 1
    advantages = np.empty(len(rewards))
    next_value = next_advantage = np.zeros(len(lengths))
    for distance in range(max(lengths, default=0)):
        reaching = int(np.searchsorted(shrinking, -distance))  # responses of more tokens than `distance`
        at = last[:reaching] - distance
        delta = rewards[at] + gamma * next_value[:reaching] - values[at]
        next_advantage = delta + gamma * lam * next_advantage[:reaching]
        next_value = values[at]
        advantages[at] = next_advantage
    return advantages, advantages + values


def reward_to_go(rewards: np.ndarray, offsets: np.ndarray, *, gamma: float) -> np.ndarray:
    """float64 [R]: the discounted sum of a response's rewards [R], from each token on."""
    return gae(rewards, np.zeros(len(rewards)), offsets, gamma=gamma, lam=1.0)[0]


def whitened(values: np.ndarray) -> np.ndarray:
    """float64 [R]: to mean 0 and (population) standard deviation 1 over all values; all equal gives zeros."""
    if not len(values):
        return np.zeros(0)
    # relative to one of them, so that rounding makes no difference between equal numbers
    relative = np.asarray(values, np.float64) - np.float64(values[0])
    centred = relative - relative.mean()
    return centred / np.sqrt(max((centred**2).mean(), SMALLEST_VARIANCE))


def group_relative(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """float64 [B]: (R − mean) / (std + 1e-6) among the responses to a prompt; rewards [B], groups int64 [B].

    The standard deviation is the sample's (n − 1), as the common implementations have it. A group whose
    rewards are all equal gives zeros. Raises ValueError for a group of one.
    """
    deviations, of_response, sizes = _within_groups(rewards, groups)
    squares = np.bincount(of_response, deviations**2, len(sizes))
    return deviations / (np.sqrt(squares / (sizes - 1)) + SPREAD_FLOOR)[of_response]


def leave_one_out(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """float64 [B]: R − the mean of the other responses to the prompt; rewards [B], groups int64 [B].

    Raises ValueError for a group of one.
    """
    deviations, of_response, sizes = _within_groups(rewards, groups)
    # R_i − (Σ R − R_i) / (n − 1) = (R_i − mean) · n / (n − 1)
    return deviations * (sizes / (sizes - 1))[of_response]


def _with_penalty(
    advantages: np.ndarray, rewards: np.ndarray, penalties: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Advantages [B] plus the (negative) penalties [B] less their group's mean; 0 where all rewards of the
    group are equal."""
    relative = _within_groups(penalties, groups)[0]
    deviations, of_response, sizes = _within_groups(rewards, groups)
    differs = np.bincount(of_response, deviations != 0, len(sizes)) > 0
    return np.where(differs[of_response], advantages + relative, 0.0)


def _within_groups(rewards: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards relative to the mean of their group [B], the group of each response [B], sizes of groups."""
    if len(rewards) != len(groups):
        raise ValueError(f"{len(rewards)} rewards and {len(groups)} groups")
    names, first, of_response, sizes = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    if (sizes == 1).any():
        raise ValueError(f"group {names[sizes == 1][0]} has one response and nothing to compare it with")
    rewards = np.asarray(rewards, np.float64)
    # relative to one of them, so that rounding makes no difference between equal numbers
    relative = rewards - rewards[first][of_response]
    means = np.bincount(of_response, relative, len(sizes)) / np.maximum(sizes, 1)
    return relative - means[of_response], of_response, sizes


def _check(offsets: np.ndarray, *of_tokens: np.ndarray) -> None:
    lengths = [len(values) for values in of_tokens]
    if any(length != offsets[-1] for length in lengths) or not np.all(np.diff(offsets) > 0):
        raise ValueError(f"arrays of {lengths} tokens, and responses of {np.diff(offsets).tolist()}")


def _fp32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)
