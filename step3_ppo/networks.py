"""The four networks of PPO behind the calls that an iteration makes.

Takes a `PPOJob` and the artifacts that it starts from; holds the actor and the critic under ZeRO, each with
an optimizer of its own, and the frozen reference and reward model. Every call takes a packed `Batch` of
prompts with their responses and answers for response tokens, or documents, only. Decides neither what is
sampled nor what is learned. How weights come from artifacts is in models.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from common.artifacts import Artifact
from common.config import OptimConfig
from common.data.types import Batch
from common.model.losses import PackedCausalLM, TokenLoss, batch_arguments
from common.model.models import adapters_off
from common.runtime.distributed import World
from common.training.frozen import Frozen
from common.training.learner import Learner, build_learner
from step3_ppo.config import PPOJob
from step3_ppo.experience import Experience
from step3_ppo.minibatches import last_positions, per_token
from step3_ppo.models import load_actor, load_critic, load_frozen_reward_model, load_reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass
class Networks:
    """The four networks; those that the settings have no use for are None."""

    actor: Learner
    critic: Learner | None
    reference: Frozen | None
    reward_model: Frozen | None
    model: PreTrainedModel  # the actor's transformers model, perhaps under peft
    temperature: float
    device: torch.device
    has_reference: bool  # also where it is the actor without its adapter

    @property
    def share_prefix(self) -> bool:
        """Whether each of them can compute once what several documents begin with."""
        trained = [network.engine.module for network in (self.actor, self.critic) if network is not None]
        frozen = [network.module for network in (self.reference, self.reward_model) if network is not None]
        return all(cast(Any, module).shares_prefix for module in [*trained, *frozen])

    @property
    def module(self) -> PackedCausalLM:
        """The actor, without the engine around it."""
        module = self.actor.engine.module
        assert isinstance(module, PackedCausalLM)
        return module

    def score_tokens(self, batch: Batch, *, with_entropy: bool = False) -> TokenLoss:
        """The actor's losses per response token at the sampling temperature; they carry the gradient."""
        return self._token_losses(self.actor.engine, batch, with_entropy)

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """fp32 [M], the actor's log-probabilities of a batch's response tokens."""
        return -self.score_tokens(batch).token_losses

    def reference_logprobs(self, batch: Batch) -> torch.Tensor:
        """The same of the policy that the actor started from."""
        if self.reference is not None:
            return -self._token_losses(self.reference, batch, False).token_losses
        with adapters_off(self.actor.engine.module):
            return self.logprobs(batch)

    def values(self, batch: Batch) -> torch.Tensor:
        """fp32 [M], the critic's value of each response token, read at the position that predicts it."""
        assert self.critic is not None
        batch = batch.to(self.device)
        return self.critic.engine(**_packed(batch), score_positions=batch.trained_positions)

    def document_scores(self, batch: Batch) -> torch.Tensor:
        """fp32 [D], the reward model's raw score of each document, read at its last token."""
        assert self.reward_model is not None
        batch = batch.to(self.device)
        return self.reward_model(**_packed(batch), score_positions=last_positions(batch))

    def with_token_numbers(
        self, experience: Experience, batches: Sequence[Batch], *, values: bool = True
    ) -> Experience:
        """The experience with what the networks now say of its response tokens: log-probabilities of the
        actor and of the reference, and (if asked for) the critic's values. batches: this rank's, of all."""
        found = replace(experience, old_logprobs=per_token(experience, batches, self.logprobs))
        if self.has_reference:
            with nullcontext() if self.reference is None else self.reference.present():
                ref_logprobs = per_token(experience, batches, self.reference_logprobs)
            found = replace(found, ref_logprobs=ref_logprobs)
        if values and self.critic is not None:
            found = replace(found, values=per_token(experience, batches, self.values))
        return found

    def train(self) -> None:
        """Adapters' dropout on; the models' own is off for good."""
        for trained in filter(None, [self.actor, self.critic]):
            trained.engine.train()

    def eval(self) -> None:
        """Nothing random in a forward pass."""
        for trained in filter(None, [self.actor, self.critic]):
            trained.engine.eval()

    def _token_losses(self, run: Callable[..., TokenLoss], batch: Batch, with_entropy: bool) -> TokenLoss:
        arguments = batch_arguments(batch.to(self.device))
        return run(**arguments, temperature=self.temperature, with_entropy=with_entropy, per_token=True)


def build_networks(
    job: PPOJob,
    policy: Artifact,
    reward_model: Artifact | None,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    *,
    actor_updates: int,
    critic_updates: int,
) -> Networks:
    """All four, ready. actor_updates, critic_updates: in the whole run; their schedules end there."""
    ppo, lora = job.ppo, job.model.lora.enabled
    model = load_actor(job, policy, tokenizer, world.device)
    actor_lr = ppo.peak_lr(lora=lora)
    actor = _learner(PackedCausalLM(model), ppo.optim, actor_lr, actor_updates, job, world)
    critic = None
    if ppo.has_critic:
        module = load_critic(job, policy, reward_model, tokenizer, world.device)
        critic_lr = ppo.critic.peak_lr(lora=lora)
        critic = _learner(module, ppo.critic.optim, critic_lr, critic_updates, job, world)
    has_reference = ppo.kl.coef > 0
    scores_with_model = any(source.model for source in ppo.rewards)
    return Networks(
        actor=actor,
        critic=critic,
        reference=load_reference(job, policy, tokenizer, world) if has_reference and not lora else None,
        reward_model=load_frozen_reward_model(job, reward_model, tokenizer, world)
        if reward_model is not None and scores_with_model
        else None,
        model=model,
        temperature=ppo.rollout.temperature,
        device=world.device,
        has_reference=has_reference,
    )


def _learner(
    module: torch.nn.Module, optim: OptimConfig, peak_lr: float, updates: int, job: PPOJob, world: World
) -> Learner:
    return build_learner(module, job, job.ppo.train, optim, world, peak_lr=peak_lr, steps=max(updates, 1))


def _packed(batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "shared_prefix": batch.shared_prefix,
    }
