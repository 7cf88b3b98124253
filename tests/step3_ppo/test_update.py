"""Which networks learn from an update, and how that is told. The gradients are in test_gradients.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.config import Dtype
from common.data.batches import BatchPlan
from common.errors import UserError
from common.model.fused_loss import TokenLoss
from common.training.engine import StepOutcome
from common.training_config import TrainConfig
from step3_ppo.config import CriticConfig, PPOConfig
from step3_ppo.loss import UpdateSums
from step3_ppo.minibatches import minibatches_of
from step3_ppo.state import PPOCounters
from step3_ppo.update import Outcome, report_skipped, skipped_warnings, update
from tests.step3_ppo.gradients import MAX_LENGTH, some_experience


class Engine:
    """Notes what it is told to do."""

    def __init__(self) -> None:
        self.denominators: list[float] = []
        self.steps: list[int] = []

    def backward(self, loss: torch.Tensor, denominator: float) -> None:
        loss.backward()
        self.denominators.append(denominator)


class Trained:
    def __init__(self) -> None:
        self.engine = Engine()

    def learning_rate(self, applied: int) -> float:
        return 0.1 * applied

    def step(self, applied: int) -> StepOutcome:
        self.engine.steps.append(applied)
        return StepOutcome(True, 2.0)


class Networks:
    """One number each for all log-probabilities and all values."""

    device = torch.device("cpu")

    def __init__(self, has_critic: bool) -> None:
        self.actor, self.critic = Trained(), Trained() if has_critic else None
        self.logprob, self.value = (torch.zeros((), requires_grad=True) for _ in range(2))

    def score_tokens(self, batch: Any, *, with_entropy: bool) -> TokenLoss:
        losses, zero = -self.logprob.expand(len(batch.targets)), torch.zeros(())
        entropies = torch.ones(len(batch.targets)) if with_entropy else None
        return TokenLoss(losses.sum(), zero, zero, losses, entropies)

    def values(self, batch: Any) -> torch.Tensor:
        return self.value.expand(len(batch.targets))


def updated(step: int, has_critic: bool = True, **settings: Any) -> tuple[Outcome, Networks, UpdateSums]:
    """A first minibatch of four responses in iteration `step`, with two iterations of warm-up."""
    plan, networks, sums = BatchPlan(MAX_LENGTH, False, 4, 1, 0), Networks(has_critic), UpdateSums()
    minibatch = minibatches_of(some_experience(), plan, iteration=step, epoch=0)[0]
    ppo, counters = (
        PPOConfig(critic=CriticConfig(warmup_iterations=2), **settings),
        PPOCounters(step=step, applied=5, critic_applied=6),
    )
    outcome = update(networks, minibatch, some_experience(), ppo, counters, sums, None)  # type: ignore[arg-type]
    for trained in filter(None, [networks.actor, networks.critic]):
        assert trained.engine.denominators in ([], [minibatch.tokens] * 4)
    return outcome, networks, sums


@pytest.mark.parametrize(("step", "learns"), [(0, False), (1, False), (2, True)])
def test_in_the_warm_up_only_the_critic_learns(step: int, learns: bool) -> None:
    outcome, networks, sums = updated(step)
    assert (outcome.actor is not None) is (networks.logprob.grad is not None) is learns
    assert outcome.critic is not None and networks.value.grad is not None
    # each network's learning rate is that of its own updates
    assert networks.actor.engine.steps == ([5] if learns else [])
    assert networks.critic is not None and networks.critic.engine.steps == [6]
    of_actor = {"grad_norm": 2.0, "learning_rate": 0.5} if learns else {}
    of_critic = {"critic/grad_norm": 2.0, "critic/learning_rate": pytest.approx(0.6)}
    assert outcome.metrics() == {**of_actor, **of_critic}
    assert ("loss/policy_avg" in sums.means()) is learns and "loss/value_avg" in sums.means()


@pytest.mark.parametrize(("every", "due"), [(1, [2, 3, 4, 5, 6, 7]), (3, [2, 5]), (0, [])])
def test_the_entropy_is_computed_in_every_nth_iteration(every: int, due: list[int]) -> None:
    train = TrainConfig(entropy_every=every)
    found = {step: updated(step, train=train)[2].means() for step in range(2, 8)}
    # iterations are counted from 1 in the metrics
    assert [step for step, means in found.items() if "policy/entropy_avg" in means] == due
    assert all(means.get("policy/entropy_avg", 1.0) == 1.0 for means in found.values())
    assert all("policy/approxkl_avg" in means for means in found.values())


def test_an_entropy_bonus_is_never_left_out_in_silence() -> None:
    updated(2, entropy_coef=0.1, train=TrainConfig(entropy_every=3))  # due
    with pytest.raises(ValueError, match="nothing to multiply"):  # which the settings refuse before
        updated(3, entropy_coef=0.1, train=TrainConfig(entropy_every=3))


LOST, DONE = StepOutcome(False, math.nan), StepOutcome(True, 1.0)


def told(counters: PPOCounters, *both: StepOutcome, dtype: Dtype = Dtype.bf16) -> list[str]:
    """What is said of an update whose policy loss is fine, and whose value loss is not."""
    networks, said = Networks(has_critic=True), list[str]()
    networks.actor.engine.loss_scale, networks.critic.engine.loss_scale = 1024.0, 1.0  # type: ignore
    means = {"loss/policy_avg": 0.25, "loss/value_avg": math.inf}
    report_skipped(Outcome(*both, {}), counters, networks, means, ["rows:3"], dtype, said.append)  # type: ignore
    return said


def test_the_network_that_skipped_is_named_with_its_own_loss(caplog: pytest.LogCaptureFixture) -> None:
    counters = PPOCounters(applied=6, skipped=1, critic_applied=8, critic_skipped=1)
    assert told(counters, DONE, DONE) == []
    (line,) = told(counters, LOST, DONE)
    assert line.startswith("actor update 7: loss 0.25, its gradient is not finite")
    (line,) = told(counters, DONE, LOST)
    assert line.startswith("critic update 9: loss inf, its gradient is not finite")
    assert "critic update 9 skipped, loss inf, rows rows:3" in caplog.text
    # the actor is looking for its loss scale; the critic has found none
    (line,) = told(counters, LOST, LOST, dtype=Dtype.fp16)
    assert line.startswith("critic update 9")


def test_a_network_that_skips_five_times_in_a_row_ends_the_run_with_its_own_learning_rate() -> None:
    counters = PPOCounters(applied=2, skipped=5, skipped_in_a_row=5, critic_applied=3, critic_skipped=4)
    with pytest.raises(UserError, match="5 actor updates in a row .* up to actor update 7") as error:
        told(counters, LOST, DONE)
    assert "none of them changed the weights: lower ppo.optim.lr, use" in str(error.value.in_step("ppo"))
    assert len(told(counters, DONE, LOST)) == 1  # four of the critic's are not too many
    counters = replace(counters, critic_skipped=5, critic_skipped_in_a_row=5)
    with pytest.raises(UserError, match="5 critic updates in a row .* up to critic update 8") as error:
        told(counters, DONE, LOST)
    assert "lower ppo.critic.optim.lr, use" in str(error.value.in_step("ppo"))


def test_at_the_end_each_network_has_a_line_of_its_own() -> None:
    assert skipped_warnings(PPOCounters(applied=4, critic_applied=4), Dtype.bf16) == []
    found = skipped_warnings(PPOCounters(applied=4, critic_applied=3, critic_skipped=1), Dtype.bf16)
    assert len(found) == 1 and "1 of 4 critic updates were skipped" in found[0]
    assert found[0].endswith("lower ppo.critic.optim.lr")
    (line,) = skipped_warnings(PPOCounters(applied=4, skipped=2, critic_applied=9), Dtype.bf16)
    assert "2 of 6 actor updates were skipped" in line and line.endswith("lower ppo.optim.lr")


class Demonstrations:
    """Notes which step is asked for."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def micro_batches(self, step: int) -> list[Any]:
        self.steps.append(step)
        return []


def test_an_update_after_a_skipped_one_has_other_demonstrations() -> None:
    plan, networks, asked = BatchPlan(MAX_LENGTH, False, 4, 1, 0), Networks(False), Demonstrations()
    minibatch = minibatches_of(some_experience(), plan, iteration=0, epoch=0)[0]
    counters, ppo = PPOCounters(), PPOConfig(critic=CriticConfig(warmup_iterations=0), ptx_weight=1.0)
    for outcome in (LOST, LOST, DONE, DONE):
        update(networks, minibatch, some_experience(), ppo, counters, UpdateSums(), asked)  # type: ignore
        counters = counters.after_update(outcome, None)
    assert asked.steps == [0, 1, 2, 3]
    assert networks.actor.engine.steps == [0, 0, 0, 1]  # the learning rate does not move for nothing


def test_without_a_critic_only_the_actor_learns() -> None:
    outcome, networks, sums = updated(2, has_critic=False)
    assert outcome.critic is None and outcome.metrics() == {"grad_norm": 2.0, "learning_rate": 0.5}
    assert networks.value.grad is None and "loss/value_avg" not in sums.means()
