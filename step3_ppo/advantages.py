"""Rewards of responses -> an advantage for each of their tokens. Plain numpy, in float64.

Takes flat arrays over all response tokens of an iteration, of all ranks, and `offsets`, as `Experience` has
them (`with_advantages` takes them out of it): every rank holds all responses, so every rank computes the
same, and a mean over tokens is one over those of all ranks by construction. Nothing is padded, so there is no
mask to forget. Knows nothing of models, and draws nothing.

    gae           generalised advantage estimation (arXiv 1506.02438), with a critic
    grpo          against the other responses to the prompt, in units of their spread (arXiv 2402.03300)
    rloo          against the mean of the other responses to the prompt (arXiv 2402.14740)
    reinforce_pp  REINFORCE++ (arXiv 2501.03262): the reward to go, whitened over all tokens

Where rewards are all equal (of a group with grpo, of the iteration with reinforce_pp) there is nothing to be
in units of: the KL penalty, the only thing left that differs, would be blown up to signal. Advantages are 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from step3_ppo.config import Estimator, KLPlacement, PPOConfig
from step3_ppo.experience import Experience
from step3_ppo.kl import response_sums, token_kl

SMALLEST_VARIANCE = 1e-8
"""What whitening divides by at the least: below it there is only rounding, which must not become signal."""

SPREAD_FLOOR = 1e-6
"""Added to the standard deviation of a group's rewards (grpo)."""


@dataclass(frozen=True)
class Advantages:
    """B responses with R tokens altogether.

    advantages: fp32 [R]. returns: fp32 [R], what the critic learns (gae), else None. non_score_reward:
    float64 [B], the KL penalty in each response's reward.
    """

    advantages: np.ndarray
    returns: np.ndarray | None
    non_score_reward: np.ndarray


def with_advantages(experience: Experience, ppo: PPOConfig, kl_coef: float) -> Experience:
    """The experience with advantages and returns, from its rewards, KLs and values."""
    assert experience.rewards is not None
    found = estimate(
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


def kl_penalty_coef(ppo: PPOConfig, kl_coef: float) -> float:
    """The coefficient of the KL penalty in the reward; 0 where the penalty is in the loss."""
    return kl_coef if ppo.kl.placement is KLPlacement.reward else 0.0


def estimate(
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
    (grpo, rloo). kl: k1 of each token [R]; kl_coef: what a nat of it takes from the reward, 0 when it is in
    the loss instead. values [R]: the critic's (gae). gamma: gae, reinforce_pp. lam, whiten: gae.

    grpo and rloo have one reward per response, so the KL penalty of all its tokens is taken from it: by
    rloo before responses are compared; by grpo (whose paper has it in the loss instead) against the group's
    mean of it, and not in units of the rewards' spread. Raises ValueError where something that the estimator
    needs is missing.
    """
    if kl is None and kl_coef:
        raise ValueError(f"a coefficient of {kl_coef} and no KL to multiply")
    kl = np.zeros(offsets[-1]) if kl is None or not kl_coef else kl
    non_score = -kl_coef * response_sums(kl, offsets)
    if estimator in (Estimator.grpo, Estimator.rloo):
        if groups is None:
            raise ValueError(f"{estimator.value} without groups")
        if estimator is Estimator.grpo:
            of_responses = _with_penalty(group_relative(rewards, groups), rewards, non_score, groups)
        else:
            of_responses = leave_one_out(np.asarray(rewards, np.float64) + non_score, groups)
        return Advantages(_fp32(np.repeat(of_responses, np.diff(offsets))), None, non_score)
    of_tokens = token_rewards(rewards, offsets, kl=kl, coef=kl_coef)
    if estimator is Estimator.reinforce_pp:
        to_go = reward_to_go(of_tokens, offsets, gamma=gamma)
        white = _whiten(to_go) if np.ptp(rewards) else np.zeros_like(to_go)
        return Advantages(_fp32(white), None, non_score)
    if values is None:
        raise ValueError("gae without values")
    found, returns = _gae(of_tokens, values, offsets, gamma=gamma, lam=lam)
    return Advantages(_fp32(_whiten(found) if whiten else found), _fp32(returns), non_score)


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
    """Advantages and returns (advantages + values), fp32 [R] each, of rewards [R] and values [R].

    A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} − V_t. After a response's last token both V and A are 0:
    the end of a response is the end of an episode, also where it was cut short.
    """
    advantages, returns = _gae(rewards, values, offsets, gamma=gamma, lam=lam)
    return _fp32(advantages), _fp32(returns)


def reward_to_go(rewards: np.ndarray, offsets: np.ndarray, *, gamma: float) -> np.ndarray:
    """float64 [R]: the discounted sum of a response's rewards [R] from each token on, itself included."""
    return _gae(rewards, np.zeros(len(rewards)), offsets, gamma=gamma, lam=1.0)[0]


def whiten(values: np.ndarray) -> np.ndarray:
    """fp32 [R]: to mean 0 and (population) standard deviation 1 over all of values; all equal gives zeros."""
    return _fp32(_whiten(values))


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
    """Advantages [B] and what the KL penalty adds to rewards [B], against the group's mean of that; 0 in a
    group whose rewards are all equal."""
    relative = _within_groups(penalties, groups)[0]
    deviations, of_response, sizes = _within_groups(rewards, groups)
    differs = np.bincount(of_response, deviations != 0, len(sizes)) > 0
    return np.where(differs[of_response], advantages + relative, 0.0)


def _gae(
    rewards: np.ndarray, values: np.ndarray, offsets: np.ndarray, *, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """One step for each distance from the end, over all responses that are that long."""
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


def _whiten(values: np.ndarray) -> np.ndarray:
    if not len(values):
        return np.zeros(0)
    # relative to one of them, so that rounding makes no difference between equal numbers
    relative = np.asarray(values, np.float64) - np.float64(values[0])
    centred = relative - relative.mean()
    return centred / np.sqrt(max((centred**2).mean(), SMALLEST_VARIANCE))


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
