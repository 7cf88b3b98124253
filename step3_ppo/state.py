"""What a checkpoint holds besides the engines: the counters of a run, and an unfinished iteration.

An iteration can be interrupted between two updates. Its responses, scores and advantages are then part of the
checkpoint, and the run continues with the next update. Generators have no state: draws depend only on the
seed, the iteration, the prompt and the sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.training import loop
from common.training.engine import StepOutcome
from common.training.snapshot import Open
from step3_ppo.rollout import Experience, Response

FILE = "experience.npz"
TOKEN_FIELDS = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns", "importance")


@dataclass(frozen=True)
class PPOCounters:
    """Where the run is; part of every checkpoint."""

    step: int = 0  # iterations whose updates are all done
    update: int = 0  # updates done of the iteration after these
    updates: int = 0  # of all iterations
    applied: int = 0  # of these, the ones that changed the actor
    critic_applied: int = 0  # and those that changed the critic
    skipped: int = 0  # and those that were to change the actor, had its gradient been finite
    critic_skipped: int = 0  # the same of the critic
    skipped_in_a_row: int = 0
    critic_skipped_in_a_row: int = 0
    num_tokens: int = 0  # of prompts and responses that were learned from
    num_trained_tokens: int = 0  # of responses
    num_responses: int = 0
    kl_coef: float = 0.0
    watchdogs: Mapping[str, Any] = field(default_factory=dict)  # what they remember
    first_ratio_error: float | None = None  # mean |ratio − 1| in the first update of this iteration
    sums: Mapping[str, float] = field(default_factory=dict)  # of the updates done in the unfinished iteration
    watched: loop.EarlyStopping = field(default_factory=loop.EarlyStopping)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> PPOCounters:
        """As a checkpoint has them; one of an earlier version watches nothing."""
        return cls(**{**stored, "watched": loop.EarlyStopping(**stored.get("watched", {}))})

    @property
    def is_fresh(self) -> bool:
        """Whether no update was done yet."""
        return self.step == 0 and self.update == 0

    @property
    def place(self) -> str:
        """In words; checkpoints are numbered by updates."""
        if self.update:
            return f"in iteration {self.step + 1} after {self.update} of its updates"
        return f"after iteration {self.step}" if self.step else "before iteration 1"

    def after_update(self, actor: StepOutcome | None, critic: StepOutcome | None) -> PPOCounters:
        """One update further; None for a network that was not to learn."""
        counters = replace(self, update=self.update + 1, updates=self.updates + 1)
        if actor is not None:
            counters = replace(
                counters,
                applied=self.applied + actor.applied,
                skipped=self.skipped + (not actor.applied),
                skipped_in_a_row=0 if actor.applied else self.skipped_in_a_row + 1,
            )
        if critic is not None:
            counters = replace(
                counters,
                critic_applied=self.critic_applied + critic.applied,
                critic_skipped=self.critic_skipped + (not critic.applied),
                critic_skipped_in_a_row=0 if critic.applied else self.critic_skipped_in_a_row + 1,
            )
        return counters

    def of_actor(self) -> loop.Counters:
        """The actor's own updates, as the other recipes count theirs; it has none in the warm-up."""
        return loop.Counters(self.applied + self.skipped, self.applied, self.skipped_in_a_row)

    def of_critic(self) -> loop.Counters:
        """The same for the critic."""
        updates = self.critic_applied + self.critic_skipped
        return loop.Counters(updates, self.critic_applied, self.critic_skipped_in_a_row)

    def totals(self) -> dict[str, float]:
        """Tokens and responses learned from since the beginning, as metrics."""
        return {
            "num_tokens": self.num_tokens,
            "num_trained_tokens": self.num_trained_tokens,
            "num_responses": self.num_responses,
        }

    def after_iteration(self, experience: Experience, kl_coef: float) -> PPOCounters:
        """One iteration further."""
        prompts = sum(len(response.prompt) for response in experience.responses)
        return replace(
            self,
            step=self.step + 1,
            update=0,
            num_tokens=self.num_tokens + prompts + experience.num_tokens,
            num_trained_tokens=self.num_trained_tokens + experience.num_tokens,
            num_responses=self.num_responses + len(experience.responses),
            kl_coef=kl_coef,
            sums={},
        )


class Unfinished:
    """The `Experience` of an unfinished iteration; a `Stateful` of checkpoints.

    All ranks hold the same one, so only rank 0 writes it.
    """

    def __init__(self, *, writes: bool) -> None:
        self.experience: Experience | None = None
        self._writes = writes

    def save(self, folder: Path, open_file: Open) -> None:
        """Write the experience, if there is one."""
        if self.experience is None or not self._writes:
            return
        with open_file(folder / FILE) as file:
            np.savez(file, allow_pickle=False, **to_arrays(self.experience))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, bit for bit; None where it wrote nothing."""
        self.experience = None
        if (folder / FILE).exists():
            with np.load(folder / FILE, allow_pickle=False) as stored:
                self.experience = from_arrays(dict(stored))


def to_arrays(experience: Experience) -> dict[str, np.ndarray]:
    """All fields as arrays by name."""
    responses = experience.responses
    arrays = {
        "prompt_ids": np.array([r.prompt_id for r in responses], np.int64),
        "groups": experience.groups,
        "stopped": np.array([r.stopped for r in responses]),
        "prompt_lengths": np.array([len(r.prompt) for r in responses], np.int64),
        "lengths": np.diff(experience.offsets),
        "prompts": np.concatenate([r.prompt for r in responses]),
        "tokens": np.concatenate([r.tokens for r in responses]),
        "logprobs": np.concatenate([r.logprobs for r in responses]),
        **{f"score {name}": scores for name, scores in experience.scores.items()},
    }
    for name in ("rewards", *TOKEN_FIELDS):
        if (values := getattr(experience, name)) is not None:
            arrays[name] = values
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Experience:
    """The inverse of `to_arrays`."""
    ends = np.cumsum(arrays["lengths"])[:-1]
    responses = [
        Response(int(prompt_id), int(group), prompt, tokens, logprobs, bool(stopped))
        for prompt_id, group, prompt, tokens, logprobs, stopped in zip(
            arrays["prompt_ids"],
            arrays["groups"],
            np.split(arrays["prompts"], np.cumsum(arrays["prompt_lengths"])[:-1]),
            np.split(arrays["tokens"], ends),
            np.split(arrays["logprobs"], ends),
            arrays["stopped"],
            strict=True,
        )
    ]
    scores = {name.removeprefix("score "): a for name, a in arrays.items() if name.startswith("score ")}
    rest = {name: arrays.get(name) for name in ("rewards", *TOKEN_FIELDS)}
    return Experience(responses, scores, **rest)
