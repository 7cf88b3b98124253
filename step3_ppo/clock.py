"""How long the parts of an iteration took, and how fast they were. Decides nothing."""

from __future__ import annotations

import time

from common.runtime.distributed import World
from common.runtime.performance import performance
from step3_ppo.experience import Experience
from step3_ppo.rollout import Sampler


class Stopwatch:
    """Seconds of the parts of an iteration; it runs from the start.

    is_whole: whether it sees all of them, and not only what an interruption left.
    """

    def __init__(self, *, is_whole: bool = True) -> None:
        self._is_whole = is_whole
        self._laps: dict[str, float] = {}
        self._last = self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        """What ran since the last lap was `name`."""
        now = time.perf_counter()
        self._laps[name], self._last = now - self._last, now

    def seconds(self, name: str) -> float | None:
        """Of a part; None when it did not run."""
        return self._laps.get(name)

    @property
    def total(self) -> float | None:
        """Seconds from the start to the end of the last lap; None where that is not the whole."""
        return self._last - self._start if self._is_whole else None

    def metrics(self) -> dict[str, float]:
        """`time/<part>`; a part that ran before an interruption is absent."""
        return {f"time/{name}": seconds for name, seconds in self._laps.items()}


def rollout_speed(experience: Experience, sampler: Sampler, clock: Stopwatch) -> dict[str, float]:
    """How fast the responses were sampled, over all ranks; nothing when that was before an interruption."""
    seconds = clock.seconds("rollout")
    if seconds is None:
        return {}
    return {
        "perf/rollout_tokens_per_second": experience.num_tokens / seconds,
        "perf/slot_utilisation": sampler.counts().slot_utilisation,
    }


def speed(
    experience: Experience,
    sampler: Sampler,
    clock: Stopwatch,
    *,
    flops_per_token: float,
    dtype: str,
    world: World,
) -> dict[str, float]:
    """`time/` and `perf/` of an iteration whose parts the clock has seen. All ranks call it."""
    tokens = sum(len(response.prompt) + len(response.tokens) for response in experience.responses)
    return {
        **clock.metrics(),
        **rollout_speed(experience, sampler, clock),
        **performance(flops_per_token, tokens, clock.total, dtype, world),
    }
