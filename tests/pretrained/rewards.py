"""A reward for the tests' PPO that needs no reward model."""

from __future__ import annotations

from collections.abc import Sequence


def brief(completions: Sequence[str]) -> list[float]:
    """1 without a word, 0.5 with 20 of them."""
    return [1 / (1 + len(completion.split()) / 20) for completion in completions]
