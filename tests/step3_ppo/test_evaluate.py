"""Held-out prompts are answered greedily and by sampling, to the end, and measured alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.data.batches import BatchPlan
from step3_ppo.evaluate import Evaluation, shown
from step3_ppo.rollout import Experience
from step3_ppo.scoring import Scoring
from tests.step3_ppo.test_scoring import experience, rows, scoring_of

PLAN = BatchPlan(32, True, 4, 2, 0)


class Networks:
    """The actor's log-probabilities are 0, the reference's -1/2; both are asked for without values."""

    reward_model = None

    def __init__(self, has_reference: bool) -> None:
        self.has_reference = has_reference

    def with_token_numbers(self, found: Experience, batches: Any, *, values: bool) -> Experience:
        from dataclasses import replace

        assert not values and sum(len(batch.row_ids) for batch in batches) == 3
        zeros = np.zeros(found.num_tokens, np.float32)
        return replace(found, old_logprobs=zeros, ref_logprobs=zeros - 0.5)


class Sampler:
    """Answers with the same responses each time, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, prompts: Any, prompt_ids: Any, **how: Any) -> Any:
        assert list(prompt_ids) == [1, 0, 1]
        self.asked.append(how)
        return experience().responses


def evaluated(has_reference: bool = True) -> tuple[dict[str, float], list[dict[str, Any]], Sampler]:
    sampler = Sampler()
    evaluation = Evaluation(rows(), [1, 0, 1], scoring_of(size="telling"), PLAN, seed=9)  # type: ignore[arg-type]
    metrics, samples = evaluation(Networks(has_reference), sampler)  # type: ignore[arg-type]
    return metrics, samples, sampler


def test_every_evaluation_draws_alike_and_is_not_cut_short() -> None:
    *_, sampler = evaluated()
    assert sampler.asked == [
        {"key": (9,), "samples": 1, "greedy": False, "to_the_end": True},
        {"key": (9,), "samples": 1, "greedy": True, "to_the_end": True},
    ]


def test_every_response_is_turned_into_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    completion, seen = Scoring.completion, []
    monkeypatch.setattr(Scoring, "completion", lambda *a: seen.append(a[1]) or completion(*a))
    evaluated()
    assert len(seen) == 2 * 3  # sampled and greedy


def test_numbers_are_means_over_prompts_with_their_standard_errors() -> None:
    metrics, *_ = evaluated()
    rewards, sizes = np.array([10.0, 3.5, 0.0]), np.array([5.0, 2.0, 0.0])
    lengths = np.diff(experience().offsets)
    for name, values in {
        "reward": rewards, "size": sizes, "length": lengths, "stop_rate": np.array([1.0, 0.0, 1.0]),
        "kl": 0.5 * lengths,
    }.items():  # fmt: skip
        assert metrics[f"eval/{name}"] == pytest.approx(values.mean())
        assert metrics[f"eval/{name}_se"] == pytest.approx(values.std(ddof=1) / 3**0.5)
        if name != "kl":
            assert metrics[f"eval/greedy/{name}"] == pytest.approx(values.mean())
    # the KL is a mean over the actor's own samples; greedy ones are none
    assert len(metrics) == 18 and "eval/greedy/kl" not in metrics


def test_of_several_samples_of_a_prompt_the_mean_counts_and_the_first_is_kept() -> None:
    found = experience().responses

    def sampler(prompts: Any, prompt_ids: Any, **how: Any) -> Any:
        return found[:2] if how["samples"] == 2 else found[:1]

    evaluation = Evaluation(
        rows(), [1], scoring_of(size="telling"), PLAN, seed=9, samples_per_prompt=2  # type: ignore[arg-type]
    )  # fmt: skip
    networks = Networks(has_reference=False)
    metrics, samples = evaluation(networks, sampler)  # type: ignore[arg-type]
    assert metrics["eval/size"] == pytest.approx((5.0 + 2.0) / 2)
    assert metrics["eval/greedy/size"] == 5.0
    assert [sample["mode"] for sample in samples] == ["sampled", "greedy"]


def test_without_a_reference_there_is_no_kl() -> None:
    metrics, samples, _ = evaluated(has_reference=False)
    assert not any("kl" in name for name in metrics)
    assert all(sample["kl"] is None for sample in samples)


def test_samples_say_what_was_asked_answered_and_scored() -> None:
    _, samples, _ = evaluated()
    assert [sample["mode"] for sample in samples] == ["sampled"] * 3 + ["greedy"] * 3
    assert samples[1] == {
        "prompt": "say ok", "completion": "ok", "stopped": False, "mode": "sampled", "reward": 3.5,
        "kl": 0.5 * len(experience().responses[1].tokens), "scores": {"size": 2.0},
    }  # fmt: skip
    assert samples[3]["kl"] is None and samples[3]["prompt"] == "user: hi"


def test_turns_are_shown_one_below_the_other() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert shown(turns) == "user: a\nassistant: b" and shown("text") == "text"
