"""Estimators of the KL, and the coefficient that follows it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from step3_ppo.config import KLController
from step3_ppo.kl import k1, next_coef, response_sums


def test_the_estimator_of_three_tokens_by_hand() -> None:
    # π/π_ref is 2, 1 and 1/4
    logprobs = np.log([0.5, 0.3, 0.2])
    ref = np.log([0.25, 0.3, 0.8])
    log2 = math.log(2)
    assert k1(logprobs, ref) == pytest.approx([log2, 0, -2 * log2])


def test_k1_has_the_kl_as_its_mean() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.45, 0.3, 0.25])
    kl = float((p * np.log(p / q)).sum())
    assert float((p * k1(np.log(p), np.log(q))).sum()) == pytest.approx(kl, rel=1e-12)
    # the other way around it is another number
    assert float((q * np.log(q / p)).sum()) != pytest.approx(kl, rel=1e-3)


def test_k1_is_exact_where_fp32_would_cancel() -> None:
    a, b = np.array([-10.0], np.float32), np.array([-10.000001], np.float32)
    assert k1(a, b).dtype == np.float64 and k1(a, b)[0] == float(a[0]) - float(b[0]) != 0


def test_sums_over_responses_by_hand() -> None:
    assert response_sums(np.array([1.0, 2, 3, 4]), np.array([0, 3, 4])).tolist() == [6, 4]
    assert response_sums(np.zeros(0), np.array([0])).tolist() == []


@pytest.mark.parametrize("offsets", [[0, 4, 4], [0, 3], [0, 3, 2, 4]])
def test_offsets_that_do_not_divide_the_tokens_are_an_error(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="do not divide 4 tokens"):
        response_sums(np.ones(4), np.array(offsets))


def adaptive(kl: float, *, responses: int = 1000) -> float:
    return next_coef(KLController.adaptive, 0.5, kl, target=6.0, horizon=10_000, responses=responses)


def test_an_adaptive_coefficient_by_hand() -> None:
    # a tenth above the target, a tenth of the horizon: a hundredth more
    assert adaptive(6.6) == pytest.approx(0.5 * 1.01)
    assert adaptive(5.4) == pytest.approx(0.5 * 0.99)
    assert adaptive(6.0) == 0.5
    # far off counts as a fifth; a KL below 0 (k1 of few tokens) too
    assert adaptive(60.0) == pytest.approx(0.5 * 1.02)
    assert adaptive(0.0) == adaptive(-3.0) == pytest.approx(0.5 * 0.98)


def test_more_responses_than_the_horizon_move_it_by_a_fifth_and_not_below_zero() -> None:
    assert adaptive(60.0, responses=10**6) == pytest.approx(0.5 * 1.2)
    assert adaptive(0.0, responses=10**6) == pytest.approx(0.5 * 0.8)


def test_a_fixed_coefficient_stays() -> None:
    assert next_coef(KLController.fixed, 0.3, 99.0, target=6.0, horizon=1.0, responses=10) == 0.3


def test_a_kl_that_is_not_finite_moves_nothing() -> None:
    with pytest.raises(ValueError, match="nan"):
        adaptive(math.nan)
