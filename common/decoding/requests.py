"""What is asked of a decoder and what it returns: requests, a sampling rule, completions, counts.

Token ids in, token ids out. Says nothing of how tokens are computed or drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Request:
    """A prompt to go on from.

    prompt: int32 [T], T >= 1. key: what this response's draws are derived from; requests with the same key
    and prompt get the same response. max_new_tokens: this response's own bound, below the rule's.
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


@dataclass(frozen=True)
class SamplingRule:
    """How tokens are chosen. temperature 0: the likeliest. top_p 1 and top_k 0: out of all tokens."""

    temperature: float
    max_new_tokens: int
    terminators: tuple[int, ...]
    top_p: float = 1.0
    top_k: int = 0


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
