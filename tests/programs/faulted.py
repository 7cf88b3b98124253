"""A step on ranks that have more in their environment than others: injected faults, short limits."""

from __future__ import annotations

import os
from collections.abc import Mapping


def sft_faulted(config: str, environment: Mapping[str, str]) -> int:
    """`python -m step1_sft --config CONFIG` with `environment`."""
    from tests.forked import sft

    os.environ.update(environment)
    return sft(config)


def ppo_faulted(config: str, environment: Mapping[str, str]) -> int:
    """`python -m step3_ppo --config CONFIG` with `environment`."""
    from tests.step3_ppo.runs import ppo

    os.environ.update(environment)
    return ppo(config)
