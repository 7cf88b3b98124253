"""Advantages by hand, against a second implementation, and over ranks; the KL and its coefficient."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from common.runtime.distributed import all_gather_objects, close_world, init_world
from step3_ppo.advantages import (
    Advantages,
    compute_advantages,
    gae,
    group_relative,
    k1,
    leave_one_out,
    next_coef,
    response_sums,
    reward_to_go,
    token_rewards,
    whitened,
)
from step3_ppo.config import Estimator, KLController
from tests import forked
from tests.step3_ppo import reference

TWO = np.array([0, 3, 4])
"""A response of three tokens and one of one."""


def random_case(seed: int) -> dict:
    """Groups of several sizes, interleaved; ragged lengths, some of 1."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(4), rng.integers(2, 5, 4)))
    lengths = rng.integers(1, 9, len(groups))
    lengths[rng.integers(len(lengths))] = 1
    tokens = int(lengths.sum())
    return {
        "rewards": rng.normal(size=len(groups)) * 3 + 1,
        "offsets": np.cumsum([0, *lengths]),
        "groups": groups,
        "kl": rng.normal(size=tokens),
        "values": rng.normal(size=tokens).astype(np.float32),
        "kl_coef": float(rng.uniform(0, 0.3)),
        "gamma": float(rng.uniform(0.8, 1)),
        "lam": float(rng.uniform(0.5, 1)),
    }


def test_the_reward_is_paid_at_the_last_token_and_the_kl_at_every_token() -> None:
    kl = np.array([1.0, -2.0, 3.0, 4.0])
    found = token_rewards(np.array([10.0, 20.0]), TWO, kl=kl, coef=0.5)
    assert found.tolist() == [-0.5, 1.0, 10 - 1.5, 20 - 2.0]
    assert token_rewards(np.array([10.0, 20.0]), TWO).tolist() == [0, 0, 10, 20]


def test_gae_of_two_responses_worked_by_hand() -> None:
    # γ 1/2, λ 1/2, so γλ 1/4. First response: r 1, 2, 4; V 2, 4, 8
    #   δ_2 = 4 − 8 = −4              A_2 = −4
    #   δ_1 = 2 + 8/2 − 4 = 2         A_1 = 2 − 4/4 = 1
    #   δ_0 = 1 + 4/2 − 2 = 1         A_0 = 1 + 1/4 = 5/4
    # second: r 3, V 16: δ = A = 3 − 16 = −13; nothing of it reaches the first
    advantages, returns = gae(np.array([1.0, 2, 4, 3]), np.array([2.0, 4, 8, 16]), TWO, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [1.25, 1, -4, -13]
    assert returns.tolist() == [3.25, 5, 4, 3]
    assert advantages.dtype == returns.dtype == np.float64


def test_nothing_of_a_response_reaches_the_one_before_it_or_after_it() -> None:
    rng = np.random.default_rng(0)
    rewards, values, offsets = rng.normal(size=9), rng.normal(size=9), np.array([0, 3, 5, 9])
    whole, _ = gae(rewards, values, offsets, gamma=1.0, lam=0.95)
    for start, end in zip(offsets, offsets[1:], strict=False):
        alone, _ = gae(rewards[start:end], values[start:end], np.array([0, end - start]), gamma=1.0, lam=0.95)
        assert np.array_equal(whole[start:end], alone)


def test_the_order_of_responses_does_not_matter() -> None:
    case = random_case(7)
    lengths = np.diff(case["offsets"])
    order = np.argsort(lengths)
    assert not np.array_equal(order, np.arange(len(order)))
    tokens = np.concatenate([np.arange(*case["offsets"][b : b + 2]) for b in order])
    rewards = np.random.default_rng(1).normal(size=len(tokens))
    there, _ = gae(rewards, case["values"], case["offsets"], gamma=0.9, lam=0.9)
    sorted_offsets = np.cumsum([0, *lengths[order]])
    here, _ = gae(rewards[tokens], case["values"][tokens], sorted_offsets, gamma=0.9, lam=0.9)
    assert np.array_equal(there[tokens], here)


def test_with_lambda_one_the_returns_are_the_rewards_to_go() -> None:
    rewards, values = np.array([1.0, 2, 4, 3]), np.array([2.0, 4, 8, 16])
    _, returns = gae(rewards, values, TWO, gamma=0.5, lam=1.0)
    assert returns.tolist() == [1 + 1 + 1, 2 + 2, 4, 3]
    assert reward_to_go(rewards, TWO, gamma=0.5).tolist() == returns.tolist()


def test_whitening_worked_by_hand() -> None:
    # mean 3; squares 9, 1, 1, 9, population variance 5
    found = whitened(np.array([0.0, 2.0, 4.0, 6.0]))
    assert found == pytest.approx(np.array([-3, -1, 1, 3]) / 5**0.5, rel=1e-6)
    assert found.mean() == pytest.approx(0, abs=1e-7) and found.std() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("equal", [0.0, 0.1, -1e6, 1 / 3])
def test_equal_numbers_are_whitened_to_zeros(equal: float) -> None:
    assert whitened(np.full(1001, equal)).tolist() == [0.0] * 1001


def test_rounding_is_not_whitened_into_signal() -> None:
    assert np.abs(whitened(0.3 + 1e-9 * np.arange(5))).max() < 1e-3


def test_nothing_to_whiten() -> None:
    assert whitened(np.zeros(0)).shape == (0,)


def test_grpo_worked_by_hand() -> None:
    # group 5: rewards 1 and 3, mean 2, sample deviation √2. group 2: 0, 0, 3, mean 1, deviation √3
    rewards, groups = np.array([1.0, 0, 3, 0, 3]), np.array([5, 2, 5, 2, 2])
    found = group_relative(rewards, groups)
    assert found == pytest.approx([-(0.5**0.5), -1 / 3**0.5, 0.5**0.5, -1 / 3**0.5, 2 / 3**0.5], rel=1e-5)


def test_rloo_worked_by_hand() -> None:
    # the others' means: of 1 in {1, 3}: 3; of 0 in {0, 0, 3}: 3/2; of 3 in {0, 0, 3}: 0
    rewards, groups = np.array([1.0, 0, 3, 0, 3]), np.array([5, 2, 5, 2, 2])
    assert leave_one_out(rewards, groups) == pytest.approx([-2, -1.5, 2, -1.5, 3])


@pytest.mark.parametrize("compare", [group_relative, leave_one_out])
@pytest.mark.parametrize("equal", [0.0, 0.1, 1e6 + 0.3])
def test_a_group_whose_rewards_are_equal_has_no_advantage(compare: object, equal: float) -> None:
    rewards, groups = np.array([equal, 1.0, equal, 2.0, equal]), np.array([0, 1, 0, 1, 0])
    found = compare(rewards, groups)  # type: ignore[operator]
    assert found[[0, 2, 4]].tolist() == [0, 0, 0] and found[1] < 0 < found[3]


@pytest.mark.parametrize("compare", [group_relative, leave_one_out])
def test_a_group_of_one_has_nothing_to_be_compared_with(compare: object) -> None:
    with pytest.raises(ValueError, match="group 7 has one response"):
        compare(np.array([1.0, 2.0, 3.0]), np.array([0, 7, 0]))  # type: ignore[operator]


def test_reinforce_pp_worked_by_hand() -> None:
    # γ 1/2, no KL: to go 1, 2, 4 and 9. Mean 4; squares 9, 4, 0, 25; variance 38/4
    found = compute_advantages(
        Estimator.reinforce_pp, rewards=np.array([4.0, 9.0]), offsets=TWO, gamma=0.5, whiten=False
    )
    assert found.advantages == pytest.approx(np.array([-3, -2, 0, 5]) / 9.5**0.5, rel=1e-6)
    assert found.returns is None


def test_the_kl_is_taken_from_a_responses_reward_before_it_is_compared() -> None:
    # rewards 1 and 1, KLs 1 + 2 + 3 and 2 at 1/2 a nat: 1 − 3 = −2 and 1 − 1 = 0
    found = compute_advantages(
        Estimator.rloo,
        rewards=np.array([1.0, 1.0]),
        offsets=TWO,
        groups=np.array([0, 0]),
        kl=np.array([1.0, 2, 3, 2]),
        kl_coef=0.5,
    )
    assert found.advantages.tolist() == [-2, -2, -2, 2]


def test_grpo_takes_the_kl_in_nats_not_in_units_of_the_rewards_spread() -> None:
    # rewards 1 and 3: ∓√½. Divergences 6 and 2 at 1/2 a nat: −3 and −1, which is −1 and 1 against their mean
    given = {"rewards": np.array([1.0, 3.0]), "offsets": TWO, "groups": np.array([0, 0])}
    found = compute_advantages(Estimator.grpo, **given, kl=np.array([1.0, 2, 3, 2]), kl_coef=0.5)
    assert found.advantages == pytest.approx([-(0.5**0.5) - 1] * 3 + [0.5**0.5 + 1], rel=1e-5)
    # a hundredth of the spread of the rewards leaves the KL what it is
    given["rewards"] = np.array([0.01, 0.03])
    found = compute_advantages(Estimator.grpo, **given, kl=np.array([1.0, 2, 3, 2]), kl_coef=0.5)
    assert found.advantages == pytest.approx([-(0.5**0.5) - 1] * 3 + [0.5**0.5 + 1], rel=1e-4)


@pytest.mark.parametrize("estimator", [Estimator.grpo, Estimator.reinforce_pp])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("equal", [1.0, 0.1, -10.0])
@pytest.mark.parametrize("responses", [2, 4, 49])  # the mean of 49 numbers of 0.1 is not 0.1
def test_equal_rewards_have_no_advantage_whatever_the_kl_costs(
    estimator: Estimator, gamma: float, equal: float, responses: int
) -> None:
    offsets = np.arange(responses + 1) * 5
    kl = np.random.default_rng(0).normal(0, 1e-3, offsets[-1])
    given = {"rewards": np.full(responses, equal), "offsets": offsets, "groups": np.zeros(responses, int)}
    for coef in (0.0, 0.05, 100.0):
        found = compute_advantages(estimator, **given, kl=kl, kl_coef=coef, gamma=gamma)
        assert found.advantages.tolist() == [0.0] * offsets[-1]


def test_a_group_with_equal_rewards_takes_nothing_from_the_others() -> None:
    offsets, kl = np.arange(5), np.array([4.0, 2.0, 4.0, 2.0])
    found = compute_advantages(
        Estimator.grpo,
        rewards=np.array([1.0, 1.0, 1.0, 3.0]),
        offsets=offsets,
        groups=np.array([0, 0, 1, 1]),
        kl=kl,
        kl_coef=0.5,
    )
    assert found.advantages == pytest.approx([0, 0, -(0.5**0.5) - 0.5, 0.5**0.5 + 0.5], rel=1e-5)


def test_with_rloo_equal_rewards_leave_the_kl_at_its_price() -> None:
    # 4 and 2 thousandths of a nat at 1/2: −0.002 and −0.001, against each other
    found = compute_advantages(
        Estimator.rloo, rewards=np.ones(2), offsets=np.arange(3), groups=np.zeros(2, int),
        kl=np.array([0.004, 0.002]), kl_coef=0.5,
    )  # fmt: skip
    assert found.advantages == pytest.approx([-0.001, 0.001])


@pytest.mark.parametrize("estimator", list(Estimator))
def test_with_the_kl_in_the_loss_the_reward_keeps_it_out(estimator: Estimator) -> None:
    case = random_case(3) | {"kl_coef": 0.0}
    without = case | {"kl": None}
    a, b = compute_advantages(estimator, **case), compute_advantages(estimator, **without)
    assert np.array_equal(a.advantages, b.advantages)


def test_returns_are_those_of_advantages_that_are_not_whitened_yet() -> None:
    case = random_case(4)
    white = compute_advantages(Estimator.gae, **case)
    plain = compute_advantages(Estimator.gae, **case, whiten=False)
    assert white.returns is not None and plain.returns is not None
    assert np.array_equal(white.returns, plain.returns)
    assert not np.allclose(white.advantages, plain.advantages, atol=0.1)
    assert plain.advantages + case["values"] == pytest.approx(plain.returns, abs=1e-5)
    assert white.advantages == pytest.approx(whitened(plain.advantages), abs=1e-6)


def test_what_an_estimator_needs_and_does_not_get_is_an_error() -> None:
    given = {"rewards": np.ones(2), "offsets": TWO}
    for estimator, missing in (
        (Estimator.gae, "values"),
        (Estimator.grpo, "groups"),
        (Estimator.rloo, "groups"),
    ):
        with pytest.raises(ValueError, match=f"without {missing}"):
            compute_advantages(estimator, **given)
    with pytest.raises(ValueError, match="no KL"):
        compute_advantages(Estimator.reinforce_pp, **given, kl_coef=0.1)
    with pytest.raises(ValueError, match="tokens"):
        compute_advantages(Estimator.gae, **given, values=np.zeros(5))
    with pytest.raises(ValueError, match="one token or more"):
        compute_advantages(Estimator.gae, rewards=np.ones(2), offsets=np.array([0, 3, 3]), values=np.zeros(3))


@pytest.mark.parametrize("estimator", list(Estimator))
@pytest.mark.parametrize("seed", range(25))
def test_every_estimator_agrees_with_loops_over_padded_rows(estimator: Estimator, seed: int) -> None:
    case = random_case(seed)
    lengths = np.diff(case["offsets"]).tolist()
    assert 1 in lengths and max(lengths) > 1
    found = compute_advantages(estimator, **case)
    kl, mask = reference.pad(case["kl"], lengths)
    values, _ = reference.pad(case["values"], lengths)
    advantages, returns = reference.compute_advantages(
        estimator.value,
        case["rewards"].tolist(),
        case["groups"].tolist(),
        kl,
        values,
        mask,
        case["kl_coef"],
        case["gamma"],
        case["lam"],
    )
    # fp32 keeps 24 bits: half of 2^-23 of numbers around 1
    assert found.advantages == pytest.approx(reference.flatten(advantages, mask), rel=1e-6, abs=1e-6)
    assert (found.returns is None) == (returns is None)
    if returns is not None:
        assert found.returns == pytest.approx(reference.flatten(returns, mask), rel=1e-6, abs=1e-6)
    assert found.advantages.dtype == np.float32 and np.abs(found.advantages).max() > 0.5


def of_some_ranks(folder: str) -> int:
    """Each rank begins with its share of the responses; all write what they find for all of them."""
    world = init_world()
    case = random_case(11)
    half = len(case["rewards"]) // 2
    middle = case["offsets"][half]
    mine = slice(0, half) if world.rank == 0 else slice(half, None)
    tokens = slice(0, middle) if world.rank == 0 else slice(middle, None)
    if world.size == 1:
        mine = tokens = slice(None)
    share = {name: case[name][mine] for name in ("rewards", "groups")}
    share |= {name: case[name][tokens] for name in ("kl", "values")}
    share["lengths"] = np.diff(case["offsets"])[mine]
    gathered = all_gather_objects(share)
    whole = {name: np.concatenate([part[name] for part in gathered]) for name in share}
    whole["offsets"] = np.cumsum([0, *whole.pop("lengths")])
    found = compute_advantages(Estimator.gae, **case | whole)
    (Path(folder) / f"{world.size}_{world.rank}.json").write_text(json.dumps(found.advantages.tolist()))
    close_world()
    return 0


def test_two_ranks_whiten_over_the_tokens_of_both(tmp_path: Path) -> None:
    for size in (1, 2):
        ranks = forked.start(of_some_ranks, (str(tmp_path),), size, tmp_path / "output.txt")
        assert ranks.finish() == [0] * size, (tmp_path / "output.txt").read_text()
    one, first, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1")
    )
    assert one == first == second
    case = random_case(11)
    plain: Advantages = compute_advantages(Estimator.gae, **case, whiten=False)
    assert one == pytest.approx(whitened(plain.advantages), abs=1e-6)
    middle = case["offsets"][len(case["rewards"]) // 2]
    per_rank = [*whitened(plain.advantages[:middle]), *whitened(plain.advantages[middle:])]
    assert np.abs(np.array(one) - per_rank).max() > 0.05


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
