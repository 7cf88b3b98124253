"""PPO's four networks as they are loaded: from which artifact, in which shape, with what trained in them.

Takes a `PPOJob` and verified artifacts; returns modules on the device, without dropout of their own, so that
two passes over the same weights agree. The actor and the critic have adapters where the job says so; with
them the reference is the actor with its adapter off (`models.adapters_off`), and only without them a model of
its own. Frozen networks have neither adapters nor recomputed activations, and their weights are not
quantized: they answer as they were measured. Knows no optimizer.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from common.artifacts import Artifact
from common.config import LoraConfig, ModelConfig, Quantize
from common.handoff import model_of
from common.model.losses import PackedCausalLM
from common.model.models import disable_dropout, load_model
from common.model.scalar_head import PackedScalarModel, head_weights, load_reward_model, load_scalar_model
from common.runtime.distributed import World
from common.stage import Role
from common.training.frozen import Frozen
from step3_ppo.config import PPOConfig, PPOJob
from step3_ppo.rewards.sources import Calibration

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Critic(PackedScalarModel):
    """A value for each asked position: what the head says, plus a constant that is not trained."""

    def __init__(self, model: torch.nn.Module, shift: float = 0.0) -> None:
        super().__init__(model)
        self.shift = shift

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        """fp32 [S], the values at score_positions. Arguments as in `PackedScalarModel`."""
        return super().forward(*args, **kwargs) + self.shift  # type: ignore[arg-type]


def load_actor(
    job: PPOJob, policy: Artifact, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> PreTrainedModel:
    """The policy, to be trained; with adapters a PeftModel around it, which begins as the policy itself."""
    network = load_model(
        model_of(job.model, policy.path),
        tokenizer,
        seed=job.seed,
        device=device,
        max_length=job.ppo.data.max_length,
    )
    disable_dropout(network)
    return network


def load_critic(
    job: PPOJob,
    policy: Artifact,
    reward_model: Artifact | None,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
) -> Critic:
    """The value network, to be trained; with adapters these and the head are.

    From the reward model it begins by expecting, at every position, the calibrated reward that a response
    would get if it ended there: (r - mean) / std, in the units of what it has to learn. From the policy its
    head begins with zeros, which is the mean of calibrated rewards: a random one would put noise of their own
    size into the first advantages.
    """
    from_reward_model = job.ppo.critic_starts_from is Role.reward_model
    if from_reward_model and reward_model is None:
        raise ValueError("a critic that begins as the reward model needs one")
    start = reward_model if from_reward_model and reward_model is not None else policy
    load = load_reward_model if from_reward_model else load_scalar_model
    network = load(
        model_of(job.model, start.path),
        tokenizer,
        seed=job.seed,
        device=device,
        max_length=job.ppo.data.max_length,
    )
    if not from_reward_model:
        _scale_head(network, 0.0)
        return Critic(network)
    scale, shift = _units(job.ppo, Calibration.of(start.manifest.details, start.path))
    _scale_head(network, scale)
    return Critic(network, shift)


def load_reference(job: PPOJob, policy: Artifact, tokenizer: PreTrainedTokenizerFast, world: World) -> Frozen:
    """The policy as the run found it: a frozen `PackedCausalLM`."""
    settings = _frozen(model_of(job.model, policy.path))
    network = load_model(settings, tokenizer, seed=job.seed, device=world.device)
    return _hold(PackedCausalLM(network), job, world)


def load_frozen_reward_model(
    job: PPOJob, reward_model: Artifact, tokenizer: PreTrainedTokenizerFast, world: World
) -> Frozen:
    """The reward model: a frozen `PackedScalarModel`, whose scores are not calibrated."""
    settings = _frozen(model_of(job.model, reward_model.path))
    network = load_reward_model(settings, tokenizer, seed=job.seed, device=world.device)
    return _hold(PackedScalarModel(network), job, world)


def _hold(module: torch.nn.Module, job: PPOJob, world: World) -> Frozen:
    return Frozen(module, job.deepspeed, dtype=job.model.dtype, world=world, offload=job.ppo.offload_frozen)


def _frozen(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        model, lora=LoraConfig(enabled=False), quantize=Quantize.none, gradient_checkpointing=False
    )


def _units(ppo: PPOConfig, calibration: Calibration) -> tuple[float, float]:
    """(scale, shift) from the reward model's score to what it counts in the reward, but for the clipping."""
    weights = [source.weight for source in ppo.rewards if source.model]
    weight = weights[0] if weights else 1.0
    return weight / calibration.std, -weight * calibration.mean / calibration.std


@torch.no_grad()
def _scale_head(network: PreTrainedModel, factor: float) -> None:
    """Into the weight and not beside it: a step of the optimizer then moves a value as much, whatever size
    the reward model's scores have."""
    for weight in head_weights(network):
        weight.mul_(factor)
