"""An iteration's responses, its speed, and an evaluation, as numbers by name. Decides nothing.

Takes an `Experience` that is filled in; returns metrics under the names that users know from TRL. Every mean
is over responses or over response tokens, never over padding: there is none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from common.runtime.distributed import World
from common.runtime.performance import performance
from step3_ppo.advantages import kl_penalty_coef, response_kl, response_sums
from step3_ppo.config import MEASURED, PPOConfig
from step3_ppo.importance import drift, importance_metrics
from step3_ppo.loss import UpdateSums, explained_variance
from step3_ppo.rollout import Experience, Sampler
from step3_ppo.state import PPOCounters


def of_iteration(
    experience: Experience, ppo: PPOConfig, counters: PPOCounters, learned: UpdateSums
) -> dict[str, float]:
    """Metrics of an iteration's responses and of its updates.

    counters: after all updates, before the coefficient moves. learned: sums of all updates, over all ranks.
    """
    metrics = {
        **describe(experience, kl_penalty_coef(ppo, counters.kl_coef)),
        **learned.means(),
        **importance_metrics(experience, ppo.rollout),
        "kl_coef": counters.kl_coef,
    }
    if counters.first_ratio_error is not None:  # where the actor learned
        metrics["val/first_ratio_error"] = counters.first_ratio_error
    return metrics


def describe(experience: Experience, kl_coef: float) -> dict[str, float]:
    """Metrics of an iteration's responses, before anything is learned from them.

    kl_coef: of the KL penalty in the rewards; 0 when it is in the loss. `objective/kl` is the mean over
    responses of k1 summed over their tokens, in nats, and absent without a reference; `objective/entropy` the
    mean of minus their log-probability.
    """
    assert experience.rewards is not None and experience.old_logprobs is not None
    assert experience.advantages is not None
    lengths = np.diff(experience.offsets)
    stopped = np.array([response.stopped for response in experience.responses])
    off = drift(experience)
    kl = response_kl(experience)
    cost = 0.0 if kl is None else float(-kl_coef * kl.mean())
    metrics = {
        **{f"reward/{name}": float(scores.mean()) for name, scores in experience.scores.items()},
        "objective/scores": float(experience.rewards.mean()),
        "objective/scores_std": float(experience.rewards.std()),
        "objective/non_score_reward": cost,
        "objective/rlhf_reward": float(experience.rewards.mean()) + cost,
        "objective/entropy": float(-response_sums(experience.old_logprobs, experience.offsets).mean()),
        "objective/advantages_abs_mean": float(np.abs(experience.advantages).mean()),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/truncated_share": float(1 - stopped.mean()),
        "val/num_eos_tokens": float(stopped.sum()),
        "rollout/logprob_drift": float(off.mean()),
        "rollout/logprob_drift_max": float(off.max()),
    }
    if kl is not None:
        metrics["objective/kl"] = float(kl.mean())
    if experience.values is not None and experience.returns is not None:
        metrics["val/explained_variance"] = explained_variance(experience.values, experience.returns)
    return metrics


class Stopwatch:
    """Seconds of the parts of an iteration; it runs from the start.

    is_whole: whether it sees all parts, not only those after an interruption.
    """

    def __init__(self, *, is_whole: bool = True) -> None:
        self._is_whole = is_whole
        self._laps: dict[str, float] = {}
        self._last = self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the part `name`, which began with the last lap."""
        now = time.perf_counter()
        self._laps[name], self._last = now - self._last, now

    def seconds(self, name: str) -> float | None:
        """Of a part; None when it did not run."""
        return self._laps.get(name)

    @property
    def total(self) -> float | None:
        """Seconds from the start to the last lap; None unless `is_whole`."""
        return self._last - self._start if self._is_whole else None

    def metrics(self) -> dict[str, float]:
        """`time/<part>`; a part that ran before an interruption is absent."""
        return {f"time/{name}": seconds for name, seconds in self._laps.items()}


def speed(
    experience: Experience,
    sampler: Sampler,
    clock: Stopwatch,
    *,
    flops_per_token: float,
    dtype: str,
    world: World,
) -> dict[str, float]:
    """`time/` and `perf/` of an iteration, over all ranks, which all call it.

    Sampling has no speed where its responses were sampled before an interruption.
    """
    tokens = sum(len(response.prompt) + len(response.tokens) for response in experience.responses)
    metrics = clock.metrics()
    if (seconds := clock.seconds("rollout")) is not None:
        metrics["perf/rollout_tokens_per_second"] = experience.num_tokens / seconds
        metrics["perf/slot_utilisation"] = sampler.counts().slot_utilisation
        metrics["perf/rollout_balance"] = sampler.balance()
    return metrics | performance(flops_per_token, tokens, clock.total, dtype, world)


def mean_with_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    count = len(values)
    error = float(values.std(ddof=1)) / count**0.5 if count > 1 else 0.0
    return float(values.mean()), error


def held_out_line(step: int, metrics: Mapping[str, float]) -> str:
    """An evaluation in one line."""
    shown = [f"reward {metrics['eval/reward']:z.3f}"]
    if "eval/kl" in metrics:
        shown.append(f"KL {metrics['eval/kl']:z.2f} nats")
    usual = {f"eval/{name}" for name in MEASURED}
    named = [name for name in metrics if name.startswith("eval/") and name.count("/") == 1]
    shown += [
        f"{name.removeprefix('eval/')} {metrics[name]:.3f}"
        for name in named
        if name not in usual and not name.endswith("_se")
    ]
    return f"held out, step {step}: {', '.join(shown)}, {metrics['eval/stop_rate']:.0%} stop"
