"""Truncated importance weights: responses were sampled by another forward pass than the one that is trained.

With the log-probabilities log q that came with a response's tokens and the actor's own log π_old of them, a
token's weight is w = min(π_old / q, cap), as in truncated importance sampling (Ionides 2008) and V-trace
(arXiv 1802.01561). It multiplies the part of the loss that PPO clips. Pure: numbers in, numbers out.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from common.errors import UserError
from step3_ppo.config import RolloutConfig
from step3_ppo.rollout import Experience

LARGEST_DRIFT = 0.3
"""Nats per token, on average. In bf16 rounding makes some hundredths; other weights make whole nats."""


def sampled_logprobs(experience: Experience) -> np.ndarray:
    """fp32 [R]: the log-probabilities that came with the responses."""
    return np.concatenate([response.logprobs for response in experience.responses])


def drift(experience: Experience) -> np.ndarray:
    """fp32 [R]: by how much these and the actor's own differ, in nats."""
    assert experience.old_logprobs is not None
    return np.abs(sampled_logprobs(experience) - experience.old_logprobs)


def with_importance(experience: Experience, rollout: RolloutConfig) -> Experience:
    """The experience with a weight for each token, where vLLM sampled it and drifted beyond the bound.

    UserError for a drift that no rounding explains: vLLM has other weights than those that are trained.
    """
    if not rollout.uses_vllm or (off := float(drift(experience).mean())) <= rollout.vllm.drift_bound:
        return experience
    if off > LARGEST_DRIFT:
        raise UserError(
            "vLLM samples from another policy than the one that is trained: their log-probabilities differ "
            f"by {off:.2g} nats per token, and {LARGEST_DRIFT:g} are too many for rounding",
            hint="ppo.rollout.engine=builtin; or model.dtype=fp32, where rounding is small",
        )
    log_ratio = experience.old_logprobs - sampled_logprobs(experience)
    weights = np.minimum(np.exp(np.minimum(log_ratio, 20.0)), rollout.vllm.importance_cap)  # e^20 is finite
    return replace(experience, importance=weights.astype(np.float32))


def importance_metrics(experience: Experience, rollout: RolloutConfig) -> dict[str, float]:
    """Mean weight, and the share of tokens whose weight was cut off; nothing without weights."""
    if experience.importance is None:
        return {}
    cap = np.float32(rollout.vllm.importance_cap)
    return {
        "rollout/importance_mean": float(experience.importance.mean()),
        "rollout/importance_capped_share": float((experience.importance >= cap).mean()),
    }
