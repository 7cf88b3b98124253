"""Warnings about a run that goes wrong, from the metrics of its iterations and evaluations.

Takes the flat metrics of each iteration and of each evaluation, in their order; returns lines with the number
that looks wrong and the key to change. Each kind of warning comes at most once in `REPEAT_AFTER` iterations.
A reward that is not finite is a UserError. Its memory (the first iterations, the evaluation before training,
the warnings given) is plain data for the checkpoint, so that a resumed run warns like an uninterrupted one.
An absent metric is not checked. Prints and measures nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common.config import Dtype
from common.errors import UserError
from step3_ppo.config import KLController, PPOConfig

REPEAT_AFTER = 20
"""Iterations before a warning of the same kind is repeated."""
FIRST_ITERATIONS = 3
"""Number of first iterations with a number, whose mean later ones are compared with."""
COMPARED = ("response/length_mean", "response/truncated_share", "policy/entropy_avg")
"""Metrics whose first values are remembered."""

TOLERANCES = {Dtype.fp32: 1e-4, Dtype.bf16: 2e-2, Dtype.fp16: 5e-3}
"""Largest mean difference, in nats, of a token's log-probabilities by one policy, computed in two ways. Half
precision rounds hidden states to 8 (bf16) or 11 (fp16) bits, and another order of sums rounds otherwise."""
MOST_UNFINISHED = 0.5
"""Largest share of responses that do not stop."""
UNFINISHED_DRIFT = 0.25
"""Largest rise of that share above the first iterations'."""
ENTROPY_LEFT = 0.1
"""Smallest share of the first iterations' entropy."""
LARGEST_KL = 50.0
"""Largest KL with a fixed coefficient, in nats per response."""
TARGETS = 4.0
"""Largest KL with an adaptive coefficient, in multiples of ppo.kl.target."""
NO_DIFFERENCE = 1e-12
"""Largest standard deviation of equal rewards, by rounding."""
SIGMAS = 2.0
"""Standard errors beyond which a difference between evaluations is more than noise."""

Metrics = Mapping[str, float]


class Watchdogs:
    """Checks a run's metrics as they come.

    dtype: the actor's. state: the result of `state()`, where a run is resumed.
    """

    def __init__(self, ppo: PPOConfig, dtype: Dtype, state: Mapping[str, Any] | None = None) -> None:
        is_adaptive = ppo.kl.controller is KLController.adaptive
        self._largest_kl = TARGETS * ppo.kl.target if is_adaptive else LARGEST_KL
        self._tolerance = TOLERANCES[dtype]
        self._functions = tuple(ppo.evaluation.functions)
        remembered = copy.deepcopy(dict(state or {}))
        self._looks: int = remembered.get("looks", 0)
        self._first: dict[str, float] = remembered.get("first", {})
        self._counted: dict[str, int] = remembered.get("counted", dict.fromkeys(self._first, self._looks))
        self._before: dict[str, float] = remembered.get("before", {})
        self._said: dict[str, int] = remembered.get("said", {})

    def state(self) -> dict[str, Any]:
        """All that it remembers, as plain data for JSON."""
        return copy.deepcopy(
            {
                "looks": self._looks,
                "first": self._first,
                "counted": self._counted,
                "before": self._before,
                "said": self._said,
            }  # fmt: skip
        )

    def look(self, iteration: int, metrics: Metrics) -> list[str]:
        """Warnings about an iteration; call it once for each. UserError for rewards that are not finite."""
        _check_finite(iteration, metrics)
        warnings = []
        for kind, check in _CHECKS.items():
            text = check(self, metrics)
            if text is not None and self._is_due(kind, iteration):
                warnings.append(f"iteration {iteration}: {text}")
        self._remember(metrics)
        return warnings

    def look_at_evaluation(self, iteration: int, metrics: Metrics) -> list[str]:
        """Warnings about an evaluation, repeated every time; the first one is before training."""
        if not self._before:
            self._before = {name: value for name, value in metrics.items() if name.startswith("eval/")}
            return []
        texts = (self._exploited(metrics, "eval/"), self._exploited(metrics, "eval/greedy/", " (greedy)"))
        return [f"evaluation at iteration {iteration}: {text}" for text in texts if text is not None][:1]

    def _exploited(self, metrics: Metrics, prefix: str, how: str = "") -> str | None:
        """Reward hacking: the reward rose since before training while other scores fell, all beyond noise."""
        rise = _change(self._before, metrics, prefix + "reward")
        changes = {name: _change(self._before, metrics, prefix + name) for name in self._functions}
        falls = {name: change for name, change in changes.items() if change is not None and change.is_down}
        if rise is None or not rise.is_up or not falls:
            return None
        fell = ", ".join(f"{name} fell {fall}" for name, fall in falls.items())
        return (
            f"reward hacking: the reward rose {rise} while {fell}{how}: mend ppo.rewards, raise ppo.kl.coef, "
            "or stop earlier with ppo.train.max_steps"
        )

    def _is_due(self, kind: str, iteration: int) -> bool:
        last = self._said.get(kind)
        if last is not None and iteration - last < REPEAT_AFTER:
            return False
        self._said[kind] = iteration
        return True

    def _remember(self, metrics: Metrics) -> None:
        """Add to the means of the first iterations: of each number, of those that have it."""
        for name in COMPARED:
            counted = self._counted.get(name, 0)
            if counted < FIRST_ITERATIONS and math.isfinite(metrics.get(name, math.nan)):
                self._first[name] = self._first.get(name, 0.0) + metrics[name] / FIRST_ITERATIONS
                self._counted[name] = counted + 1
        self._looks += 1

    def _since_the_first(self, name: str, metrics: Metrics) -> tuple[float, float] | None:
        """Mean of the first iterations, and now; None while these are not over."""
        if self._counted.get(name, 0) < FIRST_ITERATIONS or name not in self._first or name not in metrics:
            return None
        return self._first[name], metrics[name]

    # One check per kind of trouble: a text without the iteration, or None ---------------------------

    def _ratio(self, metrics: Metrics) -> str | None:
        error = metrics.get("val/first_ratio_error", 0.0)
        if error <= self._tolerance:
            return None
        return (
            f"the first update began {error:.2g} away from ratio 1 on average (val/first_ratio_error), where "
            f"up to {self._tolerance:.2g} is rounding: it did not learn from the policy that was "
            "scored; adapters with model.lora.dropout above 0 do that, and model.dtype=fp32 tells whether "
            "rounding is to blame"
        )

    def _kl_at_the_start(self, metrics: Metrics) -> str | None:
        per_token = abs(metrics.get("objective/kl", 0.0)) / max(metrics.get("response/length_mean", 1.0), 1.0)
        if self._looks > 0 or per_token <= self._tolerance:
            return None
        return (
            f"before anything was learned the actor is {metrics['objective/kl']:.3g} nats per response away "
            "from the reference (objective/kl), which is itself; model.dtype=fp32 tells whether rounding is "
            "to blame"
        )

    def _drift(self, metrics: Metrics) -> str | None:
        drift = metrics.get("rollout/logprob_drift", 0.0)
        if drift <= self._tolerance:
            return None
        return (
            f"sampler and training forward pass differ by {drift:.2g} nats per token "
            f"(rollout/logprob_drift), where up to {self._tolerance:.2g} is rounding: responses come "
            "from another distribution than the one that is trained; try model.dtype=fp32"
        )

    def _advantages(self, metrics: Metrics) -> str | None:
        if metrics.get("objective/scores_std", 1.0) < NO_DIFFERENCE:
            what = "all rewards are alike (objective/scores_std is 0)"
        elif metrics.get("objective/advantages_abs_mean", 1.0) == 0:
            what = "the rewards of the samples of each prompt are alike (objective/advantages_abs_mean is 0)"
        else:
            return None
        return (
            f"{what}, so there is nothing to learn: look at ppo.rewards and ppo.reward_clip, raise "
            "ppo.rollout.temperature or ppo.rollout.samples_per_prompt, or take other prompts"
        )

    def _unfinished(self, metrics: Metrics) -> str | None:
        share = metrics.get("response/truncated_share", 0.0)
        if share > MOST_UNFINISHED:
            what = f"{share:.0%} of the responses do not stop (response/truncated_share)"
        else:
            change = self._since_the_first("response/truncated_share", metrics)
            if change is None or change[1] - change[0] <= UNFINISHED_DRIFT:
                return None
            what = f"{share:.0%} of the responses do not stop, {change[0]:.0%} at first"
        return f"{what}: raise ppo.rollout.max_new_tokens or ppo.missing_eos_penalty"

    def _length(self, metrics: Metrics) -> str | None:
        change = self._since_the_first("response/length_mean", metrics)
        if change is None or change[0] / 2 <= change[1] <= change[0] * 2:
            return None
        return (
            f"responses have {change[1]:.1f} tokens on average, {change[0]:.1f} at first "
            "(response/length_mean): the reward may pay for length; raise ppo.kl.coef, or look at ppo.rewards"
        )

    def _entropy(self, metrics: Metrics) -> str | None:
        change = self._since_the_first("policy/entropy_avg", metrics)
        if change is None or change[0] <= 0 or change[1] >= ENTROPY_LEFT * change[0]:
            return None
        return (
            f"the policy's entropy is {change[1]:.2g} nats per token, {change[0]:.2g} at first "
            "(policy/entropy_avg): it hardly tries anything else; raise ppo.kl.coef or ppo.entropy_coef, or "
            "lower ppo.optim.lr"
        )

    def _kl(self, metrics: Metrics) -> str | None:
        kl = metrics.get("objective/kl", 0.0)
        if kl <= self._largest_kl:
            return None
        return (
            f"the actor is {kl:.1f} nats per response away from the reference (objective/kl), more than "
            f"{self._largest_kl:g}: raise ppo.kl.coef or lower ppo.optim.lr"
        )


_CHECKS: dict[str, Callable[[Watchdogs, Metrics], str | None]] = {
    "ratio": Watchdogs._ratio,
    "kl_at_the_start": Watchdogs._kl_at_the_start,
    "drift": Watchdogs._drift,
    "advantages": Watchdogs._advantages,
    "unfinished": Watchdogs._unfinished,
    "length": Watchdogs._length,
    "entropy": Watchdogs._entropy,
    "kl": Watchdogs._kl,
}


@dataclass(frozen=True)
class _Change:
    """A number in two evaluations, and the largest difference that is noise."""

    before: float
    after: float
    noise: float

    def __str__(self) -> str:
        return f"from {self.before:.3g} to {self.after:.3g}"

    @property
    def is_up(self) -> bool:
        return self.after - self.before > self.noise

    @property
    def is_down(self) -> bool:
        return self.before - self.after > self.noise


def _change(before: Metrics, after: Metrics, name: str) -> _Change | None:
    """None where an evaluation lacks the number. Without standard errors every difference counts."""
    if name not in before or name not in after:
        return None
    errors = (before.get(f"{name}_se", 0.0), after.get(f"{name}_se", 0.0))
    return _Change(before[name], after[name], SIGMAS * math.hypot(*errors))


def _check_finite(iteration: int, metrics: Metrics) -> None:
    """UserError for rewards that are not finite: nothing can be learned from them."""
    for name, value in metrics.items():
        if name.startswith(("objective/", "reward/")) and not math.isfinite(value):
            raise UserError(
                f"iteration {iteration}: {name} is {value}, and nothing can be learned from it",
                hint="half precision may have overflowed: model.dtype=bf16 or fp32; if the actor itself "
                "broke earlier, lower ppo.optim.lr",
            )
