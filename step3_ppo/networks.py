"""The four networks of PPO: loaded from artifacts, and behind the calls that an iteration makes.

Takes a `PPOJob` and verified artifacts. Holds the actor and the critic under ZeRO, each with its optimizer,
and the frozen reference and reward model. Every call takes a packed `Batch` of prompts with their responses
and returns numbers of response tokens, or of documents, only. The actor and the critic have adapters where
the job says so; then the reference is the actor without its adapter (`adapters.adapters_off`), else a network
of its own. Dropout of the models themselves is off, so that two passes over the same weights agree. Frozen
networks have no adapters, recompute no activations and are not quantized: they score as they were measured.
Decides neither what is sampled nor what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from common.artifacts import Artifact
from common.config import ModelConfig
from common.data.types import Batch
from common.handoff import model_of, scores_text
from common.model.adapters import adapters_off
from common.model.architecture import CAUSAL_LM, HeadSpec
from common.model.fused_loss import TokenLoss
from common.model.loading import disable_dropout, load_model
from common.model.packed import (
    PackedCausalLM,
    PackedModel,
    batch_arguments,
    document_arguments,
    refuse_unsliced,
)
from common.model.partition import node_reading, share_of
from common.model.probes import Shortcuts, find_shortcuts
from common.model.scalar_head import NEW_REWARD_MODEL, REWARD_MODEL, PackedScalarModel, head_weights
from common.model.tokenizer import load_tokenizer
from common.runtime.distributed import World
from common.stage import Input
from common.training.frozen import Frozen, frozen_settings, load_frozen_policy
from common.training.learner import Learner, build_learner
from common.training_config import OptimConfig
from step3_ppo.config import PPOConfig, PPOJob
from step3_ppo.minibatches import computed, ends_in, per_token
from step3_ppo.rewards.sources import Calibration
from step3_ppo.rollout import Experience

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Critic(PackedScalarModel):
    """A value for each asked position: the head's output plus a constant that is not trained."""

    def __init__(self, model: torch.nn.Module, shortcuts: Shortcuts, shift: float = 0.0) -> None:
        super().__init__(model, shortcuts)
        self.shift = shift

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        """fp32 [S], the values at score_positions. Arguments as in `PackedScalarModel`."""
        return super().forward(*args, **kwargs) + self.shift  # type: ignore[arg-type]


@dataclass
class Networks:
    """The four networks; None where the settings need none."""

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
        """Whether each of them can share the prefixes of documents."""
        trained = [network.engine.module for network in (self.actor, self.critic) if network is not None]
        frozen = [network.module for network in (self.reference, self.reward_model) if network is not None]
        return all(cast(PackedModel, module).shortcuts.shared_prefix for module in [*trained, *frozen])

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
        """fp32 [M], the log-probabilities of the reference, the policy that the actor started from."""
        if self.reference is not None:
            return -self._token_losses(self.reference, batch, False).token_losses
        with adapters_off(self.actor.engine.module):
            return self.logprobs(batch)

    def values(self, batch: Batch) -> torch.Tensor:
        """fp32 [M], the critic's value of each response token, read at the position that predicts it."""
        assert self.critic is not None
        batch = batch.to(self.device)
        return self.critic.engine(
            **document_arguments(batch),
            score_positions=batch.trained_positions,
            computed_positions=batch.computed_positions,
        )

    def document_scores(self, batch: Batch) -> torch.Tensor:
        """fp32 [D], the reward model's raw score of each response that ends in a batch, see `ends_in`."""
        assert self.reward_model is not None
        _, ends = ends_in(batch)
        batch, ends = batch.to(self.device), ends.to(self.device, non_blocking=True)
        return self.reward_model(**document_arguments(batch), score_positions=ends, computed_positions=ends)

    def with_token_numbers(
        self, experience: Experience, batches: Sequence[Batch], *, values: bool = True
    ) -> Experience:
        """The experience with log-probabilities of actor and reference and, if asked for, the critic's
        values. batches: this rank's; together the ranks' hold every response token once."""
        shares = {"old_logprobs": computed(batches, self.logprobs)}
        if self.has_reference:
            with nullcontext() if self.reference is None else self.reference.present():
                shares["ref_logprobs"] = computed(batches, self.reference_logprobs)
        if values and self.critic is not None:
            shares["values"] = computed(batches, self.values)
        found: dict[str, Any] = per_token(experience, batches, shares)
        return replace(experience, **found)

    def train(self) -> None:
        """Adapters' dropout on; the models' own stays off."""
        for trained in filter(None, [self.actor, self.critic]):
            trained.engine.train()

    def eval(self) -> None:
        """Nothing random in a forward pass."""
        for trained in filter(None, [self.actor, self.critic]):
            trained.engine.eval()

    def end_training(self) -> None:
        """Nothing learns any more: as `eval`, and the optimizers' states are freed."""
        self.eval()
        for trained in filter(None, [self.actor, self.critic]):
            trained.engine.forget_optimizer()

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
    model = load_actor(job, policy, tokenizer, world)
    actor_lr = ppo.peak_lr(lora=lora)
    actor = _learner(
        PackedCausalLM(model, find_shortcuts(model)), ppo.optim, actor_lr, actor_updates, job, world
    )
    critic = None
    if ppo.has_critic:
        module = load_critic(job, policy, reward_model, tokenizer, world)
        critic_lr = ppo.critic.peak_lr(lora=lora)
        critic = _learner(module, ppo.critic.optim, critic_lr, critic_updates, job, world)
    has_reference = ppo.kl.coef > 0
    scores_with_model = any(source.model for source in ppo.rewards)
    return Networks(
        actor=actor,
        critic=critic,
        reference=load_frozen_policy(job, policy, tokenizer, world, offload=ppo.offload_frozen)
        if has_reference and not lora
        else None,
        reward_model=load_frozen_reward_model(job, reward_model, tokenizer, world)
        if reward_model is not None and scores_with_model
        else None,
        model=model,
        temperature=ppo.rollout.temperature,
        device=world.device,
        has_reference=has_reference,
    )


def load_actor(
    job: PPOJob, policy: Artifact, tokenizer: PreTrainedTokenizerFast, world: World
) -> PreTrainedModel:
    """The policy, to be trained; with adapters a PeftModel around it, which begins as the policy itself."""
    settings = model_of(job.model, policy.path)
    network = _load(settings, tokenizer, CAUSAL_LM, job, world, job.ppo.data.max_length)
    disable_dropout(network)
    return network


def load_critic(
    job: PPOJob,
    policy: Artifact,
    reward_model: Artifact | None,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
) -> Critic:
    """The value network, to be trained; with adapters these and the head are.

    Started from the reward model, it predicts at every position the calibrated reward of a response that ends
    there: (r - mean) / std, in the units of the returns. Started from the policy, its head is zero, the mean
    of calibrated rewards: a random head would put noise as large as the rewards into the first advantages.
    """
    from_reward_model = job.ppo.critic_starts_from is Input.reward_model
    if from_reward_model and reward_model is None:
        raise ValueError("a critic that begins as the reward model needs one")
    start = reward_model if from_reward_model and reward_model is not None else policy
    head = REWARD_MODEL if from_reward_model else NEW_REWARD_MODEL
    settings = model_of(job.model, start.path)
    network = _load(settings, tokenizer, head, job, world, job.ppo.data.max_length)
    scale, shift = 0.0, 0.0
    if from_reward_model:
        scale, shift = _units(job.ppo, Calibration.of(start.manifest.details, start.path))
    _scale_head(network, scale)
    return Critic(network, find_shortcuts(network), shift)


def load_frozen_reward_model(
    job: PPOJob, reward_model: Artifact, tokenizer: PreTrainedTokenizerFast, world: World
) -> Frozen:
    """The reward model: a frozen `PackedScalarModel`, whose scores are not calibrated."""
    settings = frozen_settings(model_of(job.model, reward_model.path))
    if scores_text(reward_model):
        tokenizer = load_tokenizer(settings)
    network = _load(settings, tokenizer, REWARD_MODEL, job, world)
    module = PackedScalarModel(network, find_shortcuts(network))
    return Frozen(module, job.deepspeed, dtype=job.model.dtype, world=world, offload=job.ppo.offload_frozen)


def _load(
    settings: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    head: HeadSpec,
    job: PPOJob,
    world: World,
    max_length: int | None = None,
) -> PreTrainedModel:
    """As `load_model`; UserError for a network that cannot share rows where ranks do."""
    network = load_model(
        settings, tokenizer, head, seed=job.seed, device=world.device, max_length=max_length,
        share=share_of(job.deepspeed.stage), node=node_reading(job.launch),
    )  # fmt: skip
    refuse_unsliced(network, job.launch, world.size)
    return network


def _units(ppo: PPOConfig, calibration: Calibration) -> tuple[float, float]:
    """(scale, shift) from the reward model's raw score to its part of the reward, before clipping."""
    weights = [source.weight for source in ppo.rewards if source.model]
    weight = weights[0] if weights else 1.0
    return weight / calibration.std, -weight * calibration.mean / calibration.std


@torch.no_grad()
def _scale_head(network: PreTrainedModel, factor: float) -> None:
    """Folded into the weight: a step of the optimizer then moves a value equally far, whatever size
    the reward model's scores have."""
    for weight in head_weights(network):
        weight.mul_(factor)


def _learner(
    module: PackedModel, optim: OptimConfig, peak_lr: float, updates: int, job: PPOJob, world: World
) -> Learner:
    return build_learner(module, job, job.ppo.train, optim, world, peak_lr=peak_lr, steps=max(updates, 1))
