"""An iteration in numbers, worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from step3_ppo.advantages import response_kl
from step3_ppo.metrics import describe, held_out_line, mean_with_error
from step3_ppo.rollout import Experience, Response


def two_responses() -> Experience:
    """One of a single token that stopped, one of three that did not."""
    prompt = np.array([1, 2], np.int32)
    responses = [
        Response(0, 0, prompt, np.array([5], np.int32), np.array([-1.0], np.float32), True),
        Response(
            1, 1, prompt, np.array([6, 7, 8], np.int32), np.array([-2.0, -2.0, -2.5], np.float32), False
        ),
    ]
    return Experience(
        responses,
        scores={"model": np.array([4.0, 6.0])},
        rewards=np.array([1.0, -2.0]),
        old_logprobs=np.array([-1.0, -2.0, -2.0, -2.0], np.float32),
        ref_logprobs=np.array([-1.5, -2.0, -1.0, -4.0], np.float32),
        values=np.array([1.0, 2.0, 3.0, 4.0], np.float32),
        advantages=np.array([1.0, -1.0, 2.0, 0.0], np.float32),
        returns=np.array([1.0, 2.0, 3.0, 2.0], np.float32),
    )


def test_means_are_over_responses_where_they_are_of_responses_and_over_tokens_where_of_tokens() -> None:
    found = describe(two_responses(), kl_coef=0.1)
    # (0.5) and (0 - 1 + 2): sums over a response's tokens, then the mean over responses
    assert response_kl(two_responses()) == pytest.approx([0.5, 1.0])
    assert found == pytest.approx(
        {
            "reward/model": 5.0,
            "objective/scores": -0.5,
            "objective/scores_std": 1.5,
            "objective/kl": 0.75,
            "objective/non_score_reward": -0.075,
            "objective/rlhf_reward": -0.575,
            "objective/entropy": (1 + 6) / 2,
            "objective/advantages_abs_mean": 1.0,
            "response/length_mean": 2.0,
            "response/length_max": 3.0,
            "response/truncated_share": 0.5,
            "val/num_eos_tokens": 1.0,
            "rollout/logprob_drift": 0.5 / 4,
            "rollout/logprob_drift_max": 0.5,
            "val/explained_variance": 1 - 0.75 / 0.5,
        }
    )


def test_what_is_not_there_is_left_out() -> None:
    found = describe(replace(two_responses(), ref_logprobs=None, values=None, returns=None), kl_coef=0.0)
    assert not {"objective/kl", "val/explained_variance"} & set(found)
    assert found["objective/non_score_reward"] == 0.0 and found["objective/rlhf_reward"] == -0.5


def test_a_mean_has_the_error_of_a_mean() -> None:
    assert mean_with_error(np.array([1.0, 3.0])) == (2.0, pytest.approx(math.sqrt(2) / math.sqrt(2)))
    assert mean_with_error(np.array([4.0])) == (4.0, 0.0)


def test_an_evaluation_in_one_line() -> None:
    metrics = {"eval/reward": 0.5, "eval/reward_se": 0.1, "eval/kl": 1.25, "eval/stop_rate": 0.98}
    metrics |= {"eval/gold": 0.75, "eval/gold_se": 0.01, "eval/greedy/gold": 1.0, "eval/length": 7.0}
    assert held_out_line(4, metrics) == "held out, step 4: reward 0.500, KL 1.25 nats, gold 0.750, 98% stop"
    assert "KL 0.00 nats" in held_out_line(4, {**metrics, "eval/kl": -1e-5})
    del metrics["eval/kl"]
    assert "KL" not in held_out_line(4, metrics)
