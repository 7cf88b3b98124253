"""PPO's arithmetic once more, written differently: loops over padded rows with masks, one number at a time.

Shares nothing with the package. Rows are lists of floats; where the mask is false lies a number that must not
count. Gradients are written down, not differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Rows = list[list[float]]
Mask = list[list[bool]]

GARBAGE = 1e3
"""What padding holds."""


def pad(flat: Sequence[float], lengths: Sequence[int]) -> tuple[Rows, Mask]:
    width, rows, mask, taken = max(lengths), [], [], 0
    for length in lengths:
        rows.append([float(x) for x in flat[taken : taken + length]] + [GARBAGE] * (width - length))
        mask.append([True] * length + [False] * (width - length))
        taken += length
    assert taken == len(flat)
    return rows, mask


def flatten(rows: Rows, mask: Mask) -> list[float]:
    return [
        x for row, kept in zip(rows, mask, strict=True) for x, keep in zip(row, kept, strict=True) if keep
    ]


def token_rewards(scores: Sequence[float], kl: Rows, mask: Mask, coef: float) -> Rows:
    rewards = []
    for b in range(len(scores)):
        row = [-coef * kl[b][t] for t in range(len(kl[b]))]
        end = max(t for t in range(len(row)) if mask[b][t])
        row[end] = row[end] + scores[b]
        rewards.append(row)
    return rewards


def gae(rewards: Rows, values: Rows, mask: Mask, gamma: float, lam: float) -> tuple[Rows, Rows]:
    """By the definition, a sum over all later tokens, instead of the recursion."""
    advantages, returns = [], []
    for b in range(len(rewards)):
        length = sum(mask[b])
        deltas = []
        for t in range(length):
            following = values[b][t + 1] if t + 1 < length else 0.0
            deltas.append(rewards[b][t] + gamma * following - values[b][t])
        row = [GARBAGE] * len(rewards[b])
        for t in range(length):
            row[t] = sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length))
        advantages.append(row)
        returns.append([a + v for a, v in zip(row, values[b], strict=True)])
    return advantages, returns


def whiten(rows: Rows, mask: Mask) -> Rows:
    count = total = squares = 0.0
    for b in range(len(rows)):
        for t in range(len(rows[b])):
            count += mask[b][t]
            total += mask[b][t] * rows[b][t]
    for b in range(len(rows)):
        for t in range(len(rows[b])):
            squares += mask[b][t] * (rows[b][t] - total / count) ** 2
    deviation = math.sqrt(max(squares / count, 1e-8))
    return [[(x - total / count) / deviation for x in row] for row in rows]


def grpo(rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
    found = []
    for reward, group in zip(rewards, groups, strict=True):
        all_of_it = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = sum(all_of_it) / len(all_of_it)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in all_of_it) / (len(all_of_it) - 1))
        found.append((reward - mean) / (deviation + 1e-6))
    return found


def rloo(rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
    found = []
    for i, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if groups[j] == groups[i] and j != i]
        found.append(reward - sum(others) / len(others))
    return found


def compute_advantages(
    estimator: str,
    scores: Sequence[float],
    groups: Sequence[int],
    kl: Rows,
    values: Rows,
    mask: Mask,
    coef: float,
    gamma: float,
    lam: float,
) -> tuple[Rows, Rows | None]:
    """Advantages and returns; gae whitened."""
    if estimator == "gae":
        advantages, returns = gae(token_rewards(scores, kl, mask, coef), values, mask, gamma, lam)
        return whiten(advantages, mask), returns
    if estimator == "reinforce_pp":
        rewards, to_go = token_rewards(scores, kl, mask, coef), []
        for b in range(len(rewards)):
            row = []
            for t in range(len(rewards[b])):
                later = [gamma ** (u - t) * rewards[b][u] for u in range(t, len(mask[b])) if mask[b][u]]
                row.append(sum(later))
            to_go.append(row)
        return whiten(to_go, mask), None
    charges = [-coef * sum(k for k, keep in zip(kl[b], mask[b], strict=True) if keep) for b in range(len(kl))]
    if estimator == "rloo":
        of_response = rloo([score + charge for score, charge in zip(scores, charges, strict=True)], groups)
    else:
        of_response = grpo(scores, groups)
        for b, group in enumerate(groups):
            all_of_it = [c for c, g in zip(charges, groups, strict=True) if g == group]
            of_response[b] += charges[b] - sum(all_of_it) / len(all_of_it)
    return [[a] * len(mask[b]) for b, a in enumerate(of_response)], None


def policy(
    logprob: float, old: float, advantage: float, ref: float, clip: float, kl_coef: float
) -> tuple[float, float, float]:
    """One token's loss, its derivative by the log-probability, and whether the clipped term counted."""
    log_ratio = min(max(logprob - old, -20.0), 20.0)
    moves = abs(logprob - old) <= 20
    ratio = math.exp(log_ratio)
    if advantage >= 0:
        clipped = ratio > 1 + clip
        surrogate = -advantage * min(ratio, 1 + clip)
    else:
        clipped = ratio < 1 - clip
        surrogate = -advantage * max(ratio, 1 - clip)
    slope = 0.0 if clipped or not moves else -advantage * ratio
    distance = min(max(ref - logprob, -20.0), 20.0)
    k3 = math.exp(distance) - 1 - distance
    k3_slope = 1 - math.exp(distance) if abs(ref - logprob) <= 20 else 0.0
    return surrogate + kl_coef * k3, slope + kl_coef * k3_slope, float(clipped and advantage != 0)


def value(new: float, old: float, target: float, clip: float) -> tuple[float, float, float]:
    """One token's loss, its derivative by the value, and whether the clipped term counted."""
    free = (new - target) ** 2
    near = old + clip if new > old + clip else old - clip if new < old - clip else new
    bound = (near - target) ** 2
    if bound > free:
        return bound / 2, 0.0, 1.0
    return free / 2, new - target, 0.0
