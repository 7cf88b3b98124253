"""The losses of PPO, and the means that its metrics report.

For each response token, with the ratio ρ = π / π_old (log ρ clamped to ±20) and the advantage A,

    policy  −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)                     PPO (arXiv 1707.06347)
            times the token's importance weight, − entropy_coef · H(π) + kl_coef · k3(π ‖ π_ref)
                                                                   where the settings ask for them
    value   ½ max((V − G)², (clip(V, V_old ± ε) − G)²)             as in InstructGPT's line (arXiv 2403.17031)

with G the token's return. The loss of an update is the mean over its response tokens, of all micro-batches
and ranks: functions here return sums, which are divided once, by a count known beforehand. Advantages and
returns come from advantages.py. Nothing is padded, or knows which response a token belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from common.model.fused_loss import TokenLoss
from common.runtime.distributed import all_reduce_sum, on_host

LARGEST_LOG_RATIO = 20.0
"""Bound of log ρ: a larger ratio is an error already; e^20 is finite in fp32, with room for sums."""


class PolicySums(NamedTuple):
    """Sums over the M tokens of a micro-batch; `loss` carries the gradient, the others are float64 scalars.

    surrogate: the part of the loss that PPO clips. ratio: ρ. ratio_abs_error: |ρ − 1|. clipped: tokens
    whose clipped term is the larger one; it is constant, so they have no gradient. approxkl: KL of the old
    policy to this one, by (ρ − 1) − log ρ, never below 0 (k3 on tokens of the old policy). entropy: of the
    predicted distributions, None when not given. kl: k3 to the reference, 0 when not given. tokens: M.
    """

    loss: torch.Tensor
    surrogate: torch.Tensor
    ratio: torch.Tensor
    ratio_abs_error: torch.Tensor
    clipped: torch.Tensor
    approxkl: torch.Tensor
    entropy: torch.Tensor | None
    kl: torch.Tensor
    tokens: int


class ValueSums(NamedTuple):
    """Sums over the M tokens of a micro-batch; `loss` carries the gradient, `clipped` is a float64 scalar.

    clipped: tokens whose clipped term is the larger one; it is constant, so they have no gradient.
    """

    loss: torch.Tensor
    clipped: torch.Tensor
    tokens: int


def policy_loss(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip: float,
    entropies: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    ref: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    importance: torch.Tensor | None = None,
) -> PolicySums:
    """The actor's loss, summed over M tokens (0 give a zero that still carries a zero gradient).

    logprobs: [M], of the live policy, with gradient. old: [M], of the policy that sampled them. advantages:
    [M]. entropies: [M], of the live policy, with gradient where entropy_coef is not 0. ref: [M], log π_ref.
    importance: [M], weights of the clipped part (`importance.py`); None: all are 1.
    Raises ValueError for a coefficient without its tensor.
    """
    if (entropy_coef and entropies is None) or (kl_coef and ref is None):
        raise ValueError("a coefficient with nothing to multiply")
    log_ratio = _clamped(logprobs - old)
    ratio = log_ratio.exp()
    unclipped, clipped_loss = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    of_tokens = torch.maximum(unclipped, clipped_loss)
    loss = surrogate = (of_tokens if importance is None else of_tokens * importance).sum()
    entropy = None if entropies is None else entropies.sum()
    kl = loss.new_zeros(()) if ref is None else _k3(_clamped(logprobs - ref)).sum()
    if entropy is not None and entropy_coef:
        loss = loss - entropy_coef * entropy
    if kl_coef:
        loss = loss + kl_coef * kl
    with torch.no_grad():
        return PolicySums(
            loss=loss,
            surrogate=_detached(surrogate),
            ratio=ratio.double().sum(),
            ratio_abs_error=(ratio - 1).abs().double().sum(),
            clipped=(clipped_loss > unclipped).double().sum(),
            approxkl=_k3(-log_ratio.double()).sum(),
            entropy=None if entropy is None else _detached(entropy),
            kl=_detached(kl),
            tokens=len(logprobs),
        )


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip: float
) -> ValueSums:
    """The critic's loss, summed over M tokens (0 give a zero that still carries a zero gradient).

    values: [M], of the live critic, with gradient. old_values: [M], as the iteration began. returns: [M].
    clip: how far a value may move from the old one; 0: any way.
    """
    values = values.float()
    unclipped = (values - returns) ** 2
    if not clip:
        return ValueSums(unclipped.sum() / 2, unclipped.new_zeros((), dtype=torch.float64), len(values))
    clipped_loss = (values.clamp(old_values - clip, old_values + clip) - returns) ** 2
    return ValueSums(
        torch.maximum(unclipped, clipped_loss).sum() / 2,
        (clipped_loss > unclipped).double().sum(),
        len(values),
    )


@dataclass
class UpdateSums:
    """Sums over the tokens of one rank, of one update or of all updates of an iteration.

    A token counts in each update that it takes part in.
    """

    policy_tokens: torch.Tensor | float = 0.0
    surrogate: torch.Tensor | float = 0.0
    ratio: torch.Tensor | float = 0.0
    ratio_abs_error: torch.Tensor | float = 0.0
    clipped: torch.Tensor | float = 0.0
    approxkl: torch.Tensor | float = 0.0
    entropy_tokens: torch.Tensor | float = 0.0
    entropy: torch.Tensor | float = 0.0
    kl: torch.Tensor | float = 0.0
    value_tokens: torch.Tensor | float = 0.0
    value_loss: torch.Tensor | float = 0.0
    value_clipped: torch.Tensor | float = 0.0
    demonstration_tokens: torch.Tensor | float = 0.0
    demonstration_loss: torch.Tensor | float = 0.0

    @classmethod
    def of(cls, stored: Mapping[str, float]) -> UpdateSums:
        """What `state` wrote; an earlier version asked for the entropy of every token of the policy."""
        return cls(**{"entropy_tokens": stored.get("policy_tokens", 0.0), **stored})

    def add_policy(self, sums: PolicySums) -> None:
        """Add one micro-batch of the actor; nothing waits for the device here."""
        self.policy_tokens += sums.tokens
        self.surrogate += sums.surrogate
        self.ratio += sums.ratio
        self.ratio_abs_error += sums.ratio_abs_error
        self.clipped += sums.clipped
        self.approxkl += sums.approxkl
        if sums.entropy is not None:
            self.entropy_tokens += sums.tokens
            self.entropy += sums.entropy
        self.kl += sums.kl

    def add_value(self, sums: ValueSums) -> None:
        """Add one micro-batch of the critic; nothing waits for the device here."""
        self.value_tokens += sums.tokens
        self.value_loss += _detached(sums.loss)
        self.value_clipped += sums.clipped

    def add_demonstrations(self, result: TokenLoss) -> None:
        """Add one micro-batch of demonstrations; nothing waits for the device here."""
        self.demonstration_tokens += len(result.token_losses)
        self.demonstration_loss += _detached(result.loss_sum)

    def add(self, other: UpdateSums) -> None:
        """Add other sums: those of an update to those of its iteration."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def state(self) -> dict[str, float]:
        """What `UpdateSums.of` continues from, exactly; JSON keeps float64 as it is."""
        return dict(zip(vars(self), on_host(list(vars(self).values())), strict=True))

    def all_reduced(self) -> UpdateSums:
        """The sums over all ranks, which all call it."""
        return UpdateSums(*all_reduce_sum(list(self.state().values())))

    def means(self) -> dict[str, float]:
        """Means over the tokens of these sums; absent without tokens (no critic, no entropies, no
        demonstrations).

        `val/ratio_off` is the mean of |ρ − 1|, in which deviations to both sides do not cancel out as in
        `val/ratio`. `policy/ref_kl_avg` is 0 where the loss has no reference.
        """
        of_policy = {
            "loss/policy_avg": self.surrogate,
            "policy/approxkl_avg": self.approxkl,
            "policy/clipfrac_avg": self.clipped,
            "policy/ref_kl_avg": self.kl,
            "val/ratio": self.ratio,
            "val/ratio_off": self.ratio_abs_error,
        }
        of_critic = {"loss/value_avg": self.value_loss, "val/clipfrac_avg": self.value_clipped}
        return {
            **_means(of_policy, self.policy_tokens),
            **_means({"policy/entropy_avg": self.entropy}, self.entropy_tokens),
            **_means(of_critic, self.value_tokens),
            **_means({"loss/ptx_avg": self.demonstration_loss}, self.demonstration_tokens),
        }


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 − Var(returns − values) / Var(returns) over tokens: 1 of a perfect critic, 0 of a constant one.

    nan when all returns are equal: there is nothing to explain.
    """
    values, returns = np.asarray(values, np.float64), np.asarray(returns, np.float64)
    if not len(returns) or returns.min() == returns.max():
        return float("nan")
    return float(1 - (returns - values).var() / returns.var())


def _clamped(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.float().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def _k3(difference: torch.Tensor) -> torch.Tensor:
    """exp(−d) − 1 + d, with d = log p − log q of tokens that p sampled."""
    return torch.expm1(-difference) + difference


def _detached(value: torch.Tensor) -> torch.Tensor:
    return value.detach().double()


def _means(sums: Mapping[str, torch.Tensor | float], tokens: torch.Tensor | float) -> dict[str, float]:
    return {name: float(value) / float(tokens) for name, value in sums.items()} if tokens else {}
