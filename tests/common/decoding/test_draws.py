"""Draws follow the distribution, and depend on nothing but their row and their key."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from common.decoding import draws
from common.decoding.draws import choose, uniforms
from common.decoding.requests import SamplingParams


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_new_tokens": 1, "terminators": (), **changes})


@pytest.mark.parametrize("vocabulary", [5, 64, 130])
def test_draws_have_the_frequencies_of_the_distribution(vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, vocabulary)
    count = 40_000
    numbers = (
        torch.arange(count, dtype=torch.float64) + 0.5
    ) / count  # evenly spaced, so no luck is involved
    tokens, p, _ = choose(logits.expand(count, -1), numbers, params(temperature=0.7))
    expected = (logits[0].double() / 0.7).softmax(0)
    frequencies = torch.bincount(tokens, minlength=vocabulary) / count
    torch.testing.assert_close(frequencies.double(), expected, atol=2 / count, rtol=0)
    torch.testing.assert_close(p.double(), expected[tokens], atol=1e-6, rtol=1e-5)
    assert all(a <= b for a, b in pairwise(tokens.tolist()))  # of one stream, in the vocabulary's order


def test_top_k_and_top_p_leave_out_what_they_should_and_log_probabilities_do_not_notice() -> None:
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    numbers = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    logits = p.log()[None].expand(1000, -1)
    drawn = {
        name: choose(logits, numbers, params(**changes))
        for name, changes in {
            "k": {"top_k": 2},
            "p": {"top_p": 0.7},
            "exact": {"top_p": 0.64},
            "both": {"top_k": 3, "top_p": 0.7},
        }.items()
    }
    kept = {name: sorted(set(tokens.tolist())) for name, (tokens, _, _) in drawn.items()}
    # both: of the top three, 0.85 in all, 0.595 are wanted, which the first two have
    assert kept == {"k": [1, 3], "p": [1, 3, 4], "exact": [1, 3], "both": [1, 3]}
    tokens, probabilities, _ = drawn["k"]
    torch.testing.assert_close(probabilities, p[tokens])
    assert abs(int((tokens == 1).sum()) - round(1000 * 0.4 / 0.65)) <= 1


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((4, 200), float("-inf"))
    logits[:, [70, 130]] = 0.0
    numbers = torch.tensor([0.0, 0.5 - 1e-12, 0.5 + 1e-12, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits, numbers, params())[0].tolist() == [70, 70, 130, 130]


def test_a_stream_depends_on_every_part_of_its_key_and_on_nothing_else() -> None:
    streams = [uniforms(key, 8).tolist() for key in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3))]
    assert len({tuple(stream) for stream in streams}) == 4
    np.random.seed(0)
    assert uniforms((1, 2, 3), 8).tolist() == streams[0]
    assert uniforms((1, 2, 3), 20)[:8].tolist() == streams[0]


def sorted_and_filtered(p: torch.Tensor, wanted: SamplingParams) -> torch.Tensor:
    """By a full sort in which the first of equal tokens comes first."""
    ordered, ids = p.sort(dim=1, descending=True, stable=True)
    whole = p
    if 0 < wanted.top_k < p.shape[1]:
        ordered[:, wanted.top_k :] = 0
        whole = ordered
    enough = wanted.top_p * whole.sum(1, keepdim=True, dtype=torch.float64)
    if wanted.top_p < 1:
        ordered[ordered.cumsum(1, dtype=torch.float64) - ordered >= enough] = 0
    return torch.zeros_like(p).scatter_(1, ids, ordered)


@pytest.mark.parametrize("top_k", [0, 1, 20])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("steps", [3, 1000])
def test_what_is_kept_is_that_of_a_full_sort_also_among_equal_tokens(
    top_k: int, top_p: float, steps: int
) -> None:
    """steps: of which logits are multiples, so that few of them make many equal ones."""
    torch.manual_seed(0)
    p = ((torch.randn(200, 60) * steps).round() / steps * 2).softmax(1)
    wanted = params(top_k=top_k, top_p=top_p)
    kept, is_sure = draws._filtered(p, wanted, p.shape[1])
    assert is_sure.all() and torch.equal(kept, sorted_and_filtered(p, wanted))
    few, is_sure = draws._filtered(p, wanted, 10)
    assert torch.equal(few[is_sure], kept[is_sure])
    is_known = torch.full_like(is_sure, top_k > 0 or top_p == 1.0)
    assert torch.equal(is_sure, is_known | ((kept > 0).sum(1) <= 10))


def test_a_row_that_keeps_more_than_were_put_in_order_is_not_sure_and_the_others_are() -> None:
    logits = torch.zeros(2, 200)
    logits[1, 3] = 20.0
    numbers = torch.full((2,), 0.7525, dtype=torch.float64)
    drawn = choose(logits, numbers, params(top_p=0.8), most=50)
    assert drawn.is_sure.tolist() == [False, True] and drawn.tokens[1] == 3
    again = choose(logits, numbers, params(top_p=0.8), most=200)
    assert again.is_sure.all() and again.tokens.tolist() == [120, 3]  # 0.7525 of the first 160


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.8}, {"top_k": 5, "top_p": 0.8}, {"top_k": 5}])
def test_what_is_not_finite_is_told_by_its_probability(changes: dict[str, Any]) -> None:
    logits = torch.zeros(2, 2000)
    logits[1] = float("nan")
    drawn = choose(logits, torch.full((2,), 0.5, dtype=torch.float64), params(**changes))
    assert drawn.probabilities[0].isfinite() and not drawn.probabilities[1].isfinite()
