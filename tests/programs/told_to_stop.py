"""The SFT step on a rank that is told to stop just after a step it has logged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


def sft_told_to_stop(config: str, after_step: int, rank: int, signals: Sequence[int]) -> int:
    """`python -m step1_sft --config CONFIG`; `rank` receives the signals one after the other."""
    from common.runtime.tracking import Tracker
    from tests.forked import sft

    log = Tracker.log

    def log_and_tell(self: Tracker, metrics: Any, step: int) -> None:
        log(self, metrics, step)
        if step == after_step and "loss" in metrics and int(os.environ["RANK"]) == rank:
            for number in signals:
                os.kill(os.getpid(), number)

    Tracker.log = log_and_tell  # type: ignore[method-assign]
    return sft(config)
