"""Importance weights of responses that another forward pass sampled, on numbers worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.vllm_fit import SamplingEngine
from step3_ppo.config import RolloutConfig, VLLMConfig
from step3_ppo.importance import drift, importance_metrics, with_importance
from step3_ppo.loss import policy_loss
from step3_ppo.rollout import Experience, Response
from step3_ppo.state import from_arrays, to_arrays

# of four tokens in two responses: as often, three times as often, half as often, as often
RATIOS = [1.0, 3.0, 0.5, 1.0]


def experience(log_ratios: list[float]) -> Experience:
    """Two responses of two tokens, sampled with log-probabilities -1; the actor's differ by these."""
    sampled = np.full(2, -1.0, np.float32)
    prompt, tokens = np.array([5], np.int32), np.array([6, 7], np.int32)
    responses = [Response(0, 0, prompt, tokens, sampled, False) for _ in range(2)]
    return Experience(responses, old_logprobs=np.array(log_ratios, np.float32) - 1)


def of(**vllm: float) -> RolloutConfig:
    return RolloutConfig(engine=SamplingEngine.vllm, vllm=VLLMConfig(**vllm))


@pytest.fixture(autouse=True)
def any_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers worked by hand are far from those of rounding."""
    monkeypatch.setattr("step3_ppo.importance.LARGEST_DRIFT", 10.0)


def test_a_weight_is_the_ratio_of_the_two_probabilities_and_at_most_the_cap() -> None:
    found = with_importance(experience([math.log(ratio) for ratio in RATIOS]), of(importance_cap=2.0))
    assert found.importance is not None and found.importance.dtype == np.float32
    assert found.importance.tolist() == pytest.approx([1.0, 2.0, 0.5, 1.0])
    assert importance_metrics(found, of(importance_cap=2.0)) == pytest.approx(
        {"rollout/importance_mean": 4.5 / 4, "rollout/importance_capped_share": 0.25}
    )


def test_there_are_no_weights_within_the_bound_nor_with_the_builtin_decoder() -> None:
    seen = experience([0.1, -0.1, 0.1, -0.1])
    assert drift(seen).mean() == pytest.approx(0.1)
    assert with_importance(seen, of(drift_bound=0.11)) is seen
    assert with_importance(seen, of(drift_bound=0.09)).importance is not None
    assert with_importance(seen, RolloutConfig()) is seen
    assert importance_metrics(seen, of()) == {}


def test_a_drift_that_no_rounding_makes_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"samples from another policy .* 0\.4 nats per token"):
        with_importance(experience([0.4, -0.4, 0.4, -0.4]), of())
    assert with_importance(experience([0.2, -0.2, 0.2, -0.2]), of()).importance is not None


def test_weights_multiply_the_clipped_part_of_the_loss_alone() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    old, advantages, ref = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, -2.0]), torch.tensor([-1.5, -2.0])
    weights = torch.tensor([0.5, 2.0])
    plain = policy_loss(logprobs, old, advantages, clip=0.2, ref=ref, kl_coef=0.1)
    weighted = policy_loss(logprobs, old, advantages, clip=0.2, ref=ref, kl_coef=0.1, importance=weights)
    assert float(plain.surrogate) == pytest.approx(-1 + 2)  # ratio 1
    assert float(weighted.surrogate) == pytest.approx(-0.5 + 4)
    assert float(weighted.kl) == float(plain.kl) > 0
    of_plain, of_weighted = (torch.autograd.grad(sums.loss, logprobs)[0] for sums in (plain, weighted))
    of_kl = of_plain - torch.tensor([-1.0, 2.0])
    assert of_weighted.tolist() == pytest.approx((torch.tensor([-0.5, 4.0]) + of_kl).tolist())


def test_weights_of_an_unfinished_iteration_are_kept_in_its_checkpoint() -> None:
    found = with_importance(experience([math.log(ratio) for ratio in RATIOS]), of())
    again = from_arrays(to_arrays(replace(found, rewards=np.zeros(2))))
    assert again.importance is not None
    assert again.importance.tobytes() == found.importance.tobytes()  # type: ignore[union-attr]
