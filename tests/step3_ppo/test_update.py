"""Which networks learn from an update, and how that is told. The gradients are in test_gradients.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.data.batches import BatchPlan
from common.engine import StepOutcome
from common.losses import TokenLoss
from step3_ppo.config import CriticConfig, PPOConfig
from step3_ppo.loss import UpdateSums
from step3_ppo.minibatches import minibatches_of
from step3_ppo.state import Counters
from step3_ppo.update import Outcome, update
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
        assert with_entropy
        losses, zero = -self.logprob.expand(len(batch.targets)), torch.zeros(())
        return TokenLoss(losses.sum(), zero, zero, losses, torch.ones(len(batch.targets)))

    def values(self, batch: Any) -> torch.Tensor:
        return self.value.expand(len(batch.targets))


def updated(step: int, has_critic: bool = True) -> tuple[Outcome, Networks, UpdateSums]:
    """A first minibatch of four responses in iteration `step`, with two iterations of warm-up."""
    plan, networks, sums = BatchPlan(MAX_LENGTH, False, 4, 1, 0), Networks(has_critic), UpdateSums()
    minibatch = minibatches_of(some_experience(), plan, iteration=step, epoch=0)[0]
    ppo, counters = (
        PPOConfig(critic=CriticConfig(warmup_iterations=2)),
        Counters(step=step, applied=5, critic_applied=6),
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


def test_without_a_critic_only_the_actor_learns() -> None:
    outcome, networks, sums = updated(2, has_critic=False)
    assert outcome.critic is None and outcome.metrics() == {"grad_norm": 2.0, "learning_rate": 0.5}
    assert networks.value.grad is None and "loss/value_avg" not in sums.means()
