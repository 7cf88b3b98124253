"""The update of both networks is that of means over the minibatch's tokens, however it is spread."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data.types import IGNORE
from tests import forked
from tests.spread import GRADIENT_TOLERANCE, SHARING, Sharing, relative_error
from tests.step2_dpo.pairs import tiny_llama
from tests.step3_ppo import gradients
from tests.step3_ppo.gradients import GRID, KL_COEF, SHIFT, TEMPERATURE, Point, some_experience, tiny_scorer


def ids_of(response: Any) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([response.prompt, response.tokens]).astype(np.int64))[None]


def of_tokens(name: str, response: int) -> torch.Tensor:
    experience = some_experience()
    return torch.from_numpy(experience.of_tokens(getattr(experience, name), [response])).double()


@cache
def plain_actor(
    entropy_coef: float = 1.0, ptx_weight: float = 0.5, kl_coef: float = KL_COEF, weighted: bool = True
) -> Any:
    """(surrogate per token, share of clipped tokens, gradients) by transformers in float64, a response at a
    time, one backward pass over all."""
    model, terms, surrogates, clipped = tiny_llama("eager").double(), [], [], 0
    responses = some_experience().responses
    for index, response in enumerate(responses):
        logits = model(ids_of(response)).logits[0, len(response.prompt) - 1 : -1] / TEMPERATURE
        of_all = torch.log_softmax(logits, -1)
        logprobs = of_all[torch.arange(len(response.tokens)), torch.from_numpy(response.tokens).long()]
        ratio = (logprobs - of_tokens("old_logprobs", index)).exp()
        advantages = of_tokens("advantages", index)
        surrogate = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        clipped += int((surrogate.detach() > -ratio * advantages).sum())
        surrogate = surrogate * of_tokens("importance", index) if weighted else surrogate
        distance = of_tokens("ref_logprobs", index) - logprobs
        k3 = distance.exp() - 1 - distance
        entropy = -(of_all.exp() * of_all).sum(-1)
        surrogates.append(float(surrogate.detach().sum()))
        terms.append((surrogate - entropy_coef * entropy + kl_coef * k3).sum())
    tokens = some_experience().num_tokens
    loss = sum(terms) / tokens + ptx_weight * plain_demonstrations(model)
    loss.backward()
    grads = {f"model.{name}": parameter.grad for name, parameter in model.named_parameters()}
    return sum(surrogates) / tokens, clipped / tokens, grads


def plain_demonstrations(model: Any) -> torch.Tensor:
    """The mean negative log-likelihood of all demonstrations' trained tokens."""
    rows, total, count = gradients.SomeDemonstrations(), torch.zeros((), dtype=torch.float64), 0
    for index in range(len(rows)):
        ids, labels = (
            torch.from_numpy(x.astype(np.int64)) for x in (rows[index].input_ids, rows[index].labels)
        )
        logits = model(ids[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits, labels, reduction="sum", ignore_index=IGNORE
        )
        count += int((labels != IGNORE).sum())
    return total / count


@cache
def plain_critic() -> Any:
    """(loss, share of clipped tokens, gradients), likewise; a value stands where its token is predicted."""
    model, total, clipped = tiny_scorer("eager").double(), torch.zeros((), dtype=torch.float64), 0
    for index, response in enumerate(some_experience().responses):
        hidden = model.model(ids_of(response)).last_hidden_state[0, len(response.prompt) - 1 : -1]
        values, old = model.score(hidden)[:, 0] + SHIFT, of_tokens("values", index)
        returns = of_tokens("returns", index)
        free = (values - returns) ** 2
        bound = (old + (values - old).clamp(-0.2, 0.2) - returns) ** 2
        clipped += int((bound > free).sum())
        total = total + torch.max(free, bound).sum() / 2
    tokens = some_experience().num_tokens
    (total / tokens).backward()
    grads = {f"model.{name}": parameter.grad for name, parameter in model.named_parameters()}
    return float(total.detach()) / tokens, clipped / tokens, grads


@pytest.fixture(scope="module", params=SHARING, ids=str)
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Point, Any]:
    out = tmp_path_factory.mktemp("gradients") / "gradients.pt"
    sharing: Sharing = request.param
    forked.run(gradients.main, (str(out), sharing.sequence_parallel), sharing.ranks, out.with_suffix(".txt"))
    found: dict[Point, Any] = torch.load(out, weights_only=False)
    return found


def name_of(point: Point) -> str:
    return f"micro{point.micro_batch_size}-{'packed' if point.packing else 'single'}-zero{point.stage}"


@pytest.mark.parametrize("point", GRID, ids=name_of)
def test_both_gradients_are_those_of_means_over_the_tokens_of_all_ranks(
    computed: dict[Point, Any], point: Point
) -> None:
    assert_expected(*computed[point])


@pytest.mark.parametrize("sequence_parallel", [2, 4])
def test_four_ranks_that_share_rows_have_them_too(tmp_path: Path, sequence_parallel: int) -> None:
    out, points = tmp_path / "gradients.pt", (GRID[0], GRID[5])
    forked.run(gradients.main, (str(out), sequence_parallel, points), 4, tmp_path / "printed.txt")
    for found, metrics in torch.load(out, weights_only=False).values():
        assert_expected(found, metrics)


def assert_expected(found: Any, metrics: dict[str, float]) -> None:
    surrogate, clipped, expected = plain_actor()
    assert relative_error(found["actor"], expected) < GRADIENT_TOLERANCE
    assert metrics["loss/policy_avg"] == pytest.approx(surrogate, rel=1e-5)
    assert metrics["policy/clipfrac_avg"] == clipped
    loss, clipped, expected = plain_critic()
    assert relative_error(found["critic"], expected) < GRADIENT_TOLERANCE
    assert metrics["loss/value_avg"] == pytest.approx(loss, rel=1e-5)
    assert metrics["val/clipfrac_avg"] == clipped


def test_metrics_do_not_depend_on_how_an_update_is_spread(computed: dict[Point, Any]) -> None:
    first = computed[GRID[0]][1]
    for point in GRID:
        assert computed[point][1] == pytest.approx(first, rel=1e-5)


def test_every_term_and_the_clipping_are_felt() -> None:
    """Guards the comparison."""
    _, clipped, whole = plain_actor()
    assert 0.1 < clipped < 0.9 and 0.1 < plain_critic()[1] < 0.9
    for changed in ({"entropy_coef": 0.0}, {"ptx_weight": 0.0}, {"kl_coef": 0.0}, {"weighted": False}):
        assert relative_error(plain_actor(**changed)[2], whole) > 1000 * GRADIENT_TOLERANCE
