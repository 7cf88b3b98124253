"""How PPO's networks begin, and what of them is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.artifacts import Artifact
from common.config import Dtype
from common.model.adapters import adapters_off
from common.model.packed import PackedCausalLM
from common.model.scalar_head import PackedScalarModel
from common.model.tokenizer import load_tokenizer
from common.runtime.distributed import World
from common.stage import Role
from common.training.frozen import load_frozen_policy
from step3_ppo.config import CriticStart, PPOJob, RewardSourceConfig
from step3_ppo.networks import load_actor, load_critic, load_frozen_reward_model
from tests.packed import packed_lm
from tests.runs import Base
from tests.step3_ppo.runs import Artifacts, make_artifacts, make_job

CPU = torch.device("cpu")
WORLD = World(0, 1, 0, CPU)
IDS = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(0))
EVERYWHERE = torch.arange(24)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    folder = tmp_path_factory.mktemp("models")
    return make_artifacts(folder, Base.make(folder).tokenizer, attention_dropout=0.5)


@pytest.fixture
def job(tmp_path: Path, made: Artifacts) -> PPOJob:
    return make_job(tmp_path, made)


def policy_of(job: PPOJob) -> Artifact:
    return Artifact.load(str(job.ppo.policy), Role.policy)


def reward_model_of(job: PPOJob) -> Artifact:
    return Artifact.load(str(job.ppo.reward_model), Role.reward_model)


def tokenizer_of(job: PPOJob) -> Any:
    from common.config import ModelConfig

    return load_tokenizer(ModelConfig(path=job.ppo.policy))


def actor_of(job: PPOJob) -> PackedCausalLM:
    return packed_lm(load_actor(job, policy_of(job), tokenizer_of(job), WORLD))


def critic_of(job: PPOJob) -> PackedScalarModel:
    return load_critic(job, policy_of(job), reward_model_of(job), tokenizer_of(job), WORLD)


def scores(run: Any) -> torch.Tensor:
    """fp32 [24], at every position of IDS."""
    boundaries = torch.tensor([0, 24], dtype=torch.int32)
    arguments = (IDS, EVERYWHERE[None], boundaries, 24, EVERYWHERE)
    found = run(*arguments)
    assert found.dtype is torch.float32 and found.shape == (24,)
    return found.detach()


def log_likelihoods(run: Any) -> torch.Tensor:
    boundaries = torch.tensor([0, 24], dtype=torch.int32)
    where = EVERYWHERE[:-1]
    return run(IDS, EVERYWHERE[None], boundaries, 24, where, IDS[0, 1:]).token_losses.detach()


def test_the_critic_begins_as_the_calibrated_reward_model(job: PPOJob) -> None:
    artifact = reward_model_of(job)
    calibration = artifact.manifest.details["calibration"]
    raw = scores(load_frozen_reward_model(job, artifact, tokenizer_of(job), WORLD))
    assert calibration["mean"] != 0 and calibration["std"] != 1 and raw.std() > 0
    expected = (raw.double() - calibration["mean"]) / calibration["std"]
    torch.testing.assert_close(scores(critic_of(job)).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_weighed_reward_model_is_weighed_in_the_values_too(job: PPOJob) -> None:
    whole = scores(critic_of(job))
    job.ppo.rewards = [RewardSourceConfig(model=True, weight=0.25), RewardSourceConfig(function="a:b")]
    torch.testing.assert_close(scores(critic_of(job)), 0.25 * whole, rtol=1e-4, atol=1e-6)


def test_the_critic_may_begin_as_the_policy_with_values_of_zero(job: PPOJob) -> None:
    job.ppo.critic.start = CriticStart.policy
    critic = critic_of(job)
    assert torch.equal(scores(critic), torch.zeros(24))
    actor = actor_of(job)
    left, right = critic.base().get_decoder().state_dict(), actor.base().get_decoder().state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_critic_of_zeros_learns(job: PPOJob) -> None:
    job.ppo.critic.start = CriticStart.policy
    critic = critic_of(job)
    boundaries = torch.tensor([0, 24], dtype=torch.int32)
    values = critic(IDS, EVERYWHERE[None], boundaries, 24, EVERYWHERE)
    (values - 1).square().sum().backward()
    head: Any = critic.base()
    assert head.score.weight.grad.abs().max() > 0


def test_without_a_reward_model_a_critic_that_needs_one_is_a_programming_error(job: PPOJob) -> None:
    with pytest.raises(ValueError, match="reward model"):
        load_critic(job, policy_of(job), None, tokenizer_of(job), WORLD)


@pytest.mark.parametrize("lora", [False, True])
def test_actor_and_reference_say_the_same_at_the_start_also_in_training_mode(job: PPOJob, lora: bool) -> None:
    job.model.lora.enabled = lora
    actor = actor_of(job)
    assert actor.training
    reference = load_frozen_policy(job, policy_of(job), tokenizer_of(job), WORLD)
    assert torch.equal(log_likelihoods(actor), log_likelihoods(reference))
    assert torch.equal(log_likelihoods(actor), log_likelihoods(actor)), "dropout is on"


def test_with_adapters_the_actor_without_them_is_the_reference(job: PPOJob) -> None:
    job.model.lora.enabled = True
    actor = actor_of(job)
    reference = log_likelihoods(load_frozen_policy(job, policy_of(job), tokenizer_of(job), WORLD))
    trained = {name for name, value in actor.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in actor.named_parameters():
            if "lora_B" in name:
                value.fill_(0.05)
    assert not torch.equal(log_likelihoods(actor), reference)
    with adapters_off(actor):
        assert torch.equal(log_likelihoods(actor), reference)
    assert not torch.equal(log_likelihoods(actor), reference), "they stay off"
    assert {name for name, value in actor.named_parameters() if value.requires_grad} == trained
    assert trained and all("lora_" in name for name in trained)


def test_without_adapters_there_is_nothing_to_turn_off(job: PPOJob) -> None:
    actor = actor_of(job)
    before = log_likelihoods(actor)
    with adapters_off(actor):
        assert torch.equal(log_likelihoods(actor), before)


@pytest.mark.parametrize("start", [CriticStart.reward_model, CriticStart.policy])
def test_with_adapters_the_critic_trains_them_and_its_head(job: PPOJob, start: CriticStart) -> None:
    job.ppo.critic.start = start
    plainly = scores(critic_of(job))
    job.model.lora.enabled = True
    critic = critic_of(job)
    trained = [name for name, value in critic.named_parameters() if value.requires_grad]
    heads = [name for name in trained if "score" in name]
    assert len(heads) == 1 and len(trained) > 1
    assert all("lora_" in name for name in trained if name not in heads)
    torch.testing.assert_close(scores(critic), plainly)


def test_frozen_networks_have_neither_adapters_nor_recomputed_activations(job: PPOJob) -> None:
    job.model.lora.enabled = job.model.gradient_checkpointing = True
    tokenizer = tokenizer_of(job)
    for frozen in (
        load_frozen_policy(job, policy_of(job), tokenizer, WORLD),
        load_frozen_reward_model(job, reward_model_of(job), tokenizer, WORLD),
    ):
        parameters = dict(frozen.module.named_parameters())
        assert parameters and not any("lora" in name for name in parameters)
        assert not any(value.requires_grad for value in parameters.values())
        assert not any(getattr(m, "gradient_checkpointing", False) for m in frozen.module.modules())


def test_networks_are_loaded_in_the_jobs_dtype(job: PPOJob) -> None:
    job.model.dtype = Dtype.bf16
    for network in (actor_of(job), critic_of(job)):
        assert {value.dtype for value in network.parameters()} == {torch.bfloat16}
    assert scores(critic_of(job)).dtype is torch.float32
