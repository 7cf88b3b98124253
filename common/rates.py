"""How a learning rate goes over a run, in numbers and in words. Pure, and without torch.

Takes OptimConfig, the peak and the run's optimizer steps. What the peak is multiplied by at each step is said
by `common/training/optim.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.training_config import OptimConfig, SchedulerName, TrainConfig

FEW = 10
"""Optimizer steps; fewer are hardly a training."""
INVERSE_SQRT_STEPS = 10_000
"""Of transformers' inverse_sqrt without a warm-up: the step by which the rate has fallen to 1/√2."""


@dataclass(frozen=True)
class Rates:
    """A learning rate over a run: from 0 to `peak` in the first `warmup` optimizer steps, and then, by the
    named shape, to `floor` after the last of `steps`."""

    peak: float
    warmup: int
    floor: float
    steps: int
    shape: SchedulerName

    @classmethod
    def of(cls, optim: OptimConfig, peak: float, steps: int) -> Rates:
        shape = optim.scheduler
        warmup = 0 if shape is SchedulerName.constant else warmup_of(optim, steps)
        floor = {
            SchedulerName.linear: 0.0,
            SchedulerName.cosine: optim.min_lr_ratio,
            SchedulerName.wsd: optim.min_lr_ratio,
            SchedulerName.inverse_sqrt: 1 / math.sqrt(1 + (steps - warmup) / (warmup or INVERSE_SQRT_STEPS)),
        }.get(shape, 1.0)
        return cls(peak, warmup, peak * floor, steps, shape)

    def in_words(self) -> str:
        rise = f"{self.peak:.3g}"
        if self.warmup:
            rise = f"up to {rise} over {self.warmup} warm-up step(s)"
        if self.floor == self.peak:
            return f"{rise}, constant"
        shape = "constant and in the last fifth" if self.shape is SchedulerName.wsd else self.shape.value
        return f"{rise}, then {shape} down to {self.floor:.3g} at step {self.steps:,}"


def few_steps(train: TrainConfig, steps: int, step: str) -> str | None:
    """What to say of a run with few optimizer steps that nobody asked for; None for any other."""
    if train.max_steps is not None or steps >= FEW:
        return None
    size = train.global_batch_size
    return f"{steps} optimizer step(s) in all: a lower {step}.train.global_batch_size ({size}) makes more"


def warmup_of(optim: OptimConfig, total_steps: int) -> int:
    """Optimizer steps with rising learning rate: `warmup_steps` where it is set, else by `warmup_ratio`."""
    if optim.warmup_steps is None:
        return warmup_steps(optim.warmup_ratio, total_steps)
    return min(optim.warmup_steps, total_steps - 1)


def warmup_steps(ratio: float, total_steps: int) -> int:
    """Optimizer steps with rising learning rate, never all of them: the first one has rate 0."""
    warmup = math.ceil(ratio * total_steps - 1e-9)  # 0.07 * 100 is a little over 7 in binary
    return min(warmup, total_steps - 1)


def same_until(optim: OptimConfig, before: int, after: int) -> int | None:
    """The first step, from 0, at which a run of `before` optimizer steps has another learning rate than one
    of `after`; None where all that both have are the same."""
    shape, warmups = optim.scheduler, [warmup_of(optim, steps) for steps in (before, after)]
    if before == after or shape is SchedulerName.constant:
        return None
    if warmups[0] != warmups[1]:
        return 1 if all(warmups) else 0
    if shape in (SchedulerName.constant_with_warmup, SchedulerName.inverse_sqrt):
        return None
    if shape is SchedulerName.wsd:
        return 1 + min(steps - decay_steps(steps, warmups[0]) for steps in (before, after))
    return 1 + warmups[0]


def decay_steps(total_steps: int, warmup: int) -> int:
    """Optimizer steps of wsd with falling learning rate: the last fifth."""
    return max(1, (total_steps - warmup) // 5)
