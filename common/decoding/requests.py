"""What is asked of a decoder and what it returns: requests, sampling parameters, completions, counts.

Token ids in, token ids out. Says nothing of how tokens are computed or drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Request:
    """A prompt to go on from.

    prompt: int32 [T], T >= 1. key: what this response's draws are derived from; requests with the same key
    and prompt get the same response. max_new_tokens: this response's own bound, below that of
    `SamplingParams`.
    """

    prompt: np.ndarray
    key: tuple[int, ...]
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Completion:
    """A response.

    tokens: int32 [R], R >= 1, with the terminator if `stopped`. logprobs: fp32 [R], log-softmax at the
    temperature over all tokens (greedily: at temperature 1), whatever top_p and top_k left out.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool


class SamplingSettings(Protocol):
    """Settings of a user that say how tokens are chosen."""

    @property
    def temperature(self) -> float: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. temperature 0: the likeliest. top_p 1 and top_k 0: out of all tokens."""

    temperature: float
    max_new_tokens: int
    terminators: tuple[int, ...]
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def of(
        cls, settings: SamplingSettings, terminators: Sequence[int], *, greedy: bool = False
    ) -> SamplingParams:
        """As the settings say; greedy: always the likeliest token."""
        if greedy:
            return cls(0.0, settings.max_new_tokens, tuple(terminators))
        return cls(
            settings.temperature, settings.max_new_tokens, tuple(terminators), settings.top_p, settings.top_k
        )


@dataclass(frozen=True)
class DecodingCounts:
    """What a call of `decode` did on this rank. steps: forward passes; rows: next tokens computed in them."""

    steps: int
    tokens: int
    rows: int

    @property
    def slot_utilisation(self) -> float:
        """Share of the computed next tokens that stand in a response."""
        return self.tokens / self.rows if self.rows else 0.0
