"""The SFT step on which one rank computes a loss that is not a number, in chosen steps."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any


def sft_not_finite(config: str, steps: Sequence[int], rank: int) -> int:
    """`python -m step1_sft --config CONFIG`; the loss of `steps` (from 1) is NaN on `rank`."""
    from common.data.batches import Batches
    from step1_sft import train
    from tests.forked import sft

    compute_loss, micro_batches, current = train.compute_loss, Batches.micro_batches, 0

    def remember(self: Batches, step: int) -> Any:
        nonlocal current
        current = step + 1
        return micro_batches(self, step)

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        result = compute_loss(*args, **kwargs)
        if current in steps and int(os.environ["RANK"]) == rank:
            result = result._replace(loss_sum=result.loss_sum * math.nan)
        return result

    Batches.micro_batches = remember  # type: ignore[method-assign]
    train.compute_loss = spoilt
    return sft(config)
