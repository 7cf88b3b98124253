"""The responses of one iteration and everything known about them; the same on every rank.

Ranks sample and score shares of it and exchange the results, so what follows (advantages, minibatches) is
computed alike everywhere and does not depend on the number of ranks. Nothing is padded: what belongs to
tokens lies in flat arrays over all response tokens, in the order of the responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from common.data.types import IGNORE, TokenizedExample


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response.

    prompt_id: index of its prompt in the data set. group: the prompt's place in the iteration; the samples of
    a prompt share it. prompt: int32 [T]. tokens: int32 [R], at least one, with the terminator if `stopped`.
    logprobs: fp32 [R], what the sampler said of them at the sampling temperature (all tokens allowed).
    """

    prompt_id: int
    group: int
    prompt: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool

    def document(self) -> TokenizedExample:
        """Prompt and response, with the response's tokens as targets of the positions that predict them."""
        ids = np.concatenate([self.prompt, self.tokens]).astype(np.int32)
        labels = np.full(len(ids), IGNORE, np.int32)
        labels[len(self.prompt) - 1 : -1] = self.tokens
        return TokenizedExample(ids, labels, "")


@dataclass(frozen=True)
class Experience:
    """B responses with R tokens altogether; fields are filled in as the iteration goes on.

    scores: of each reward source by name, float64 [B]. rewards: float64 [B], the weighted sum with penalties.
    old_logprobs, ref_logprobs, values: fp32 [R], the actor's, the reference's and the critic's, as they were
    when the iteration began. advantages, returns: fp32 [R]. Absent (None): not computed yet, or not needed.
    """

    responses: Sequence[Response]
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    rewards: np.ndarray | None = None
    old_logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None
    values: np.ndarray | None = None
    advantages: np.ndarray | None = None
    returns: np.ndarray | None = None

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [B + 1]: the tokens of response b are offsets[b] to offsets[b + 1]."""
        return np.cumsum([0, *(len(response.tokens) for response in self.responses)])

    @cached_property
    def groups(self) -> np.ndarray:
        """int64 [B]: which responses have a prompt in common."""
        return np.array([response.group for response in self.responses], np.int64)

    @property
    def num_tokens(self) -> int:
        """R, response tokens."""
        return int(self.offsets[-1])

    def of_tokens(self, values: np.ndarray, response_ids: Sequence[int]) -> np.ndarray:
        """Out of a flat array [R], the part of these responses, in their order."""
        parts = [values[self.offsets[i] : self.offsets[i + 1]] for i in response_ids]
        return np.concatenate(parts) if parts else values[:0]
