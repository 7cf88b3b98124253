"""Part 6 of an iteration: one update of the actor and the critic from a minibatch of responses.

Takes a `Minibatch` of an `Experience` that is filled in; changes the networks, and adds its sums to
`UpdateSums`. Losses are sums over response tokens, divided by the minibatch's number of tokens on all ranks,
so the gradient depends neither on the micro-batch size nor on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.config import Dtype
from common.data.batches import Batches
from common.data.types import Batch
from common.model.fused_loss import TokenLoss
from common.model.packed import batch_arguments
from common.runtime.distributed import all_reduce_sum
from common.stage import Step
from common.training import loop
from common.training.engine import StepOutcome
from step3_ppo.config import KLPlacement, PPOConfig
from step3_ppo.loss import UpdateSums, policy_loss, value_loss
from step3_ppo.minibatches import Minibatch
from step3_ppo.networks import Networks
from step3_ppo.rollout import Experience
from step3_ppo.state import PPOCounters

ACTOR, CRITIC, CRITIC_KEY = "actor update", "critic update", "critic.optim.lr"


@dataclass(frozen=True)
class Outcome:
    """The outcome of an update for each network; None: it was not to learn. learning_rates: by metric."""

    actor: StepOutcome | None
    critic: StepOutcome | None
    learning_rates: Mapping[str, float]

    def metrics(self) -> dict[str, float]:
        """Gradient norms before clipping and learning rates, of the networks that were to learn."""
        both = {"grad_norm": self.actor, "critic/grad_norm": self.critic}
        norms = {name: outcome.grad_norm for name, outcome in both.items() if outcome is not None}
        return {**norms, **self.learning_rates}

    @property
    def is_skipped(self) -> bool:
        """Whether a network skipped the update."""
        return any(outcome is not None and not outcome.applied for outcome in (self.actor, self.critic))


def update(
    networks: Networks,
    minibatch: Minibatch,
    experience: Experience,
    ppo: PPOConfig,
    counters: PPOCounters,
    sums: UpdateSums,
    demonstrations: Batches | None,
) -> Outcome:
    """Learn from one minibatch. demonstrations: mixed into the actor's loss by `ppo.ptx_weight`."""
    actor = critic = None
    learning_rates = {}
    if counters.step >= ppo.critic.warmup_iterations:
        with_entropy = loop.is_due(counters.step + 1, ppo.train.entropy_every)
        _actor_gradient(networks, minibatch, experience, ppo, counters.kl_coef, sums, with_entropy)
        if demonstrations is not None:
            _add_demonstrations(networks, demonstrations, counters.of_actor().step, ppo.ptx_weight, sums)
        learning_rates["learning_rate"] = networks.actor.learning_rate(counters.applied)
        actor = networks.actor.step(counters.applied)
    if networks.critic is not None:
        _critic_gradient(networks, minibatch, experience, ppo.critic.clip, sums)
        learning_rates["critic/learning_rate"] = networks.critic.learning_rate(counters.critic_applied)
        critic = networks.critic.step(counters.critic_applied)
    return Outcome(actor, critic, learning_rates)


def report_skipped(
    outcome: Outcome,
    counters: PPOCounters,
    networks: Networks,
    means: Mapping[str, float],
    places: Sequence[str],
    dtype: Dtype,
    warn: Callable[[str], None],
) -> None:
    """Say which network skipped an update; UserError after too many of one network in a row.

    counters: after the update. means: its metrics. places: source and row of its prompts.
    """
    if outcome.actor is not None and not outcome.actor.applied:
        loss, scale = means.get("loss/policy_avg", 0.0), networks.actor.engine.loss_scale
        loop.report_skipped(counters.of_actor(), places, loss, scale, dtype, warn, unit=ACTOR)
    if outcome.critic is not None and not outcome.critic.applied:
        assert networks.critic is not None
        loss, scale = means.get("loss/value_avg", 0.0), networks.critic.engine.loss_scale
        loop.report_skipped(
            counters.of_critic(), places, loss, scale, dtype, warn, unit=CRITIC, key=f"ppo.{CRITIC_KEY}"
        )


def skipped_warnings(counters: PPOCounters, dtype: Dtype) -> list[str]:
    """Lines about skipped updates for the end of a run."""
    of_actor = loop.skipped_warning(counters.of_actor(), dtype, Step.ppo, unit=ACTOR)
    of_critic = loop.skipped_warning(counters.of_critic(), dtype, Step.ppo, unit=CRITIC, key=CRITIC_KEY)
    return [line for line in (of_actor, of_critic) if line is not None]


def _actor_gradient(
    networks: Networks,
    minibatch: Minibatch,
    experience: Experience,
    ppo: PPOConfig,
    kl_coef: float,
    sums: UpdateSums,
    with_entropy: bool,
) -> None:
    in_loss = ppo.kl.placement is KLPlacement.loss and experience.ref_logprobs is not None
    for batch in minibatch.micro_batches:
        scored = networks.score_tokens(batch, with_entropy=with_entropy)
        result = policy_loss(
            -scored.token_losses,
            _part(experience, experience.old_logprobs, batch, networks.device),
            _part(experience, experience.advantages, batch, networks.device),
            clip=ppo.clip,
            entropies=scored.token_entropies,
            entropy_coef=ppo.entropy_coef,
            ref=_part(experience, experience.ref_logprobs, batch, networks.device) if in_loss else None,
            kl_coef=kl_coef if in_loss else 0.0,
            importance=None
            if experience.importance is None
            else _part(experience, experience.importance, batch, networks.device),
        )
        networks.actor.engine.backward(result.loss, minibatch.tokens)
        sums.add_policy(result)


def _critic_gradient(
    networks: Networks, minibatch: Minibatch, experience: Experience, clip: float, sums: UpdateSums
) -> None:
    assert networks.critic is not None
    for batch in minibatch.micro_batches:
        result = value_loss(
            networks.values(batch),
            _part(experience, experience.values, batch, networks.device),
            _part(experience, experience.returns, batch, networks.device),
            clip=clip,
        )
        networks.critic.engine.backward(result.loss, minibatch.tokens)
        sums.add_value(result)


def _add_demonstrations(
    networks: Networks, batches: Batches, step: int, weight: float, sums: UpdateSums
) -> None:
    """The SFT loss of `ppo.ptx_batch_size` demonstrations, per trained token (PPO-ptx of InstructGPT).

    step: the actor's updates so far, skipped ones included: each takes new demonstrations.
    """
    micro_batches = batches.micro_batches(step)
    (tokens,) = all_reduce_sum([sum(len(batch.targets) for batch in micro_batches)])
    for batch in micro_batches:
        result: TokenLoss = networks.actor.engine(**batch_arguments(batch.to(networks.device)))
        networks.actor.engine.backward(weight * result.loss_sum, tokens)
        sums.add_demonstrations(result)


def _part(
    experience: Experience, values: np.ndarray | None, batch: Batch, device: torch.device
) -> torch.Tensor:
    """fp32 [M]: the values of a micro-batch's response tokens."""
    assert values is not None
    return torch.from_numpy(experience.of_targets(values, batch)).to(device, non_blocking=True)
