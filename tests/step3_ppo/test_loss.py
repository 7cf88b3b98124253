"""The clipped losses in each of their regions, their sums over ranks, and a second implementation."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from common.model.fused_loss import TokenLoss
from common.runtime.distributed import close_world, init_world
from step3_ppo.loss import UpdateSums, explained_variance, policy_loss, value_loss
from tests import forked
from tests.step3_ppo import reference

LOG = math.log


def grown(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, requires_grad=True)


# ratio, advantage -> loss, d loss / d log π, clipped
POLICY_REGIONS = [
    (1.5, 2.0, -2.4, 0.0, 1),  # better, and already likelier than 1.2: as if 1.2, no pull
    (1.1, 2.0, -2.2, -2.2, 0),  # better, and near: pulled up
    (0.5, 2.0, -1.0, -1.0, 0),  # better, and less likely than it was: pulled back up from anywhere
    (0.5, -2.0, 1.6, 0.0, 1),  # worse, and already less likely than 0.8: as if 0.8, no pull
    (0.9, -2.0, 1.8, 1.8, 0),  # worse, and near: pulled down
    (1.5, -2.0, 3.0, 3.0, 0),  # worse, and likelier than it was: pulled down from anywhere
    (1.5, 0.0, 0.0, 0.0, 0),  # neither
]


@pytest.mark.parametrize("ratio, advantage, loss, slope, clipped", POLICY_REGIONS)
def test_a_token_of_each_region_by_hand(
    ratio: float, advantage: float, loss: float, slope: float, clipped: int
) -> None:
    logprobs = grown([LOG(ratio * 0.1)])
    sums = policy_loss(logprobs, torch.tensor([LOG(0.1)]), torch.tensor([advantage]), clip=0.2)
    sums.loss.backward()
    assert sums.loss.item() == pytest.approx(loss, rel=1e-5)
    assert logprobs.grad.tolist() == pytest.approx([slope], rel=1e-5)
    assert sums.clipped.item() == clipped and sums.tokens == 1
    assert sums.surrogate.item() == pytest.approx(loss, rel=1e-5)
    assert sums.ratio.item() == pytest.approx(ratio, rel=1e-5)
    assert sums.ratio_abs_error.item() == pytest.approx(abs(ratio - 1), rel=1e-5)
    assert sums.approxkl.item() == pytest.approx(ratio - 1 - LOG(ratio), rel=1e-4)


# new value (the old one is 1, clipped at 0.2 from it), return -> loss, d loss / d V, clipped
VALUE_REGIONS = [
    (1.5, 2.0, 0.32, 0.0, 1),  # on its way to the return, and past 1.2: (1.2 − 2)²/2, no pull
    (1.5, 0.0, 1.125, 1.5, 0),  # away from the return: (1.5 − 0)²/2, pulled back
    (0.5, 0.0, 0.32, 0.0, 1),  # on its way down, and past 0.8: (0.8 − 0)²/2, no pull
    (0.5, 2.0, 1.125, -1.5, 0),  # away from the return
    (1.1, 2.0, 0.405, -0.9, 0),  # near the old one: (1.1 − 2)²/2
]


@pytest.mark.parametrize("value, target, loss, slope, clipped", VALUE_REGIONS)
def test_a_value_of_each_region_by_hand(
    value: float, target: float, loss: float, slope: float, clipped: int
) -> None:
    values = grown([value])
    sums = value_loss(values, torch.tensor([1.0]), torch.tensor([target]), clip=0.2)
    sums.loss.backward()
    assert sums.loss.item() == pytest.approx(loss, rel=1e-5)
    assert values.grad.tolist() == pytest.approx([slope], rel=1e-5)
    assert sums.clipped.item() == clipped and sums.tokens == 1


def test_values_that_may_go_anywhere() -> None:
    values = grown([1.5, 0.5])
    sums = value_loss(values, torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]), clip=0)
    sums.loss.backward()
    assert sums.loss.item() == 0.25 and values.grad.tolist() == [-0.5, 0.5] and sums.clipped.item() == 0


def test_the_entropy_bonus_and_the_kl_from_the_reference_by_hand() -> None:
    # π/π_ref = 2: k3 = 1/2 − 1 + log 2, and its slope 1 − 1/2
    logprobs, entropies = grown([LOG(0.5)]), grown([0.7])
    old, advantages = torch.tensor([LOG(0.5)]), torch.tensor([3.0])
    sums = policy_loss(
        logprobs,
        old,
        advantages,
        clip=0.2,
        entropies=entropies,
        entropy_coef=0.01,
        ref=torch.tensor([LOG(0.25)]),
        kl_coef=0.1,
    )
    sums.loss.backward()
    k3 = LOG(2) - 0.5
    assert sums.loss.item() == pytest.approx(-3 - 0.01 * 0.7 + 0.1 * k3)
    assert logprobs.grad.tolist() == pytest.approx([-3 + 0.1 * 0.5])
    assert entropies.grad.tolist() == pytest.approx([-0.01])  # descent raises it
    assert sums.surrogate.item() == -3 and sums.kl.item() == pytest.approx(k3)
    assert sums.entropy.item() == pytest.approx(0.7)


def test_k3_in_the_loss_has_the_kl_as_its_mean() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.45, 0.3, 0.25])
    one, mean = torch.ones(1), 0.0
    for sampled, of_reference in zip(p.log(), q.log(), strict=True):
        ours = sampled[None]
        sums = policy_loss(ours, ours, one, clip=0.2, ref=of_reference[None], kl_coef=1.0)
        mean += float(sampled.exp() * sums.kl)
    # fp32; the other way around it is another number, and k3 would not notice by being negative
    assert mean == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert mean != pytest.approx(float((q * (q / p).log()).sum()), rel=1e-3)


def test_what_is_only_looked_at_has_no_gradient() -> None:
    logprobs, entropies = grown([LOG(0.5)]), grown([0.7])
    one = torch.ones(1)
    sums = policy_loss(
        logprobs, logprobs.detach(), one, clip=0.2, entropies=entropies, ref=torch.tensor([-2.0])
    )
    sums.loss.backward()
    assert entropies.grad is None and logprobs.grad.tolist() == [-1]
    assert sums.entropy.item() == pytest.approx(0.7) and sums.kl.item() > 0
    assert not any(isinstance(x, torch.Tensor) and x.requires_grad for x in sums[1:])


def test_a_coefficient_without_its_tensor_is_an_error() -> None:
    nothing = grown([])
    for coefficient in ("entropy_coef", "kl_coef"):
        with pytest.raises(ValueError, match="nothing to multiply"):
            policy_loss(nothing, nothing, nothing, clip=0.2, **{coefficient: 0.1})


def test_a_log_ratio_of_any_size_stays_finite() -> None:
    logprobs, old = grown([-1.0, -90.0]), torch.tensor([-90.0, -1.0])
    sums = policy_loss(logprobs, old, torch.tensor([-1.0, -1.0]), clip=0.2, ref=old, kl_coef=1.0)
    sums.loss.backward()
    assert sums.ratio.item() == pytest.approx(math.exp(20) + math.exp(-20), rel=1e-6)
    assert sums.loss.isfinite() and all(math.isfinite(x) for x in sums[1:] if x is not None)
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_no_token_gives_zeros_and_a_zero_gradient(coefficient: float) -> None:
    empty, weight = torch.zeros(0), torch.ones((), requires_grad=True)
    logprobs = torch.zeros(0) * weight
    sums = policy_loss(
        logprobs,
        empty,
        empty,
        clip=0.2,
        entropies=logprobs,
        entropy_coef=coefficient,
        ref=empty,
        kl_coef=coefficient,
    )
    critic = value_loss(torch.zeros(0) * weight, empty, empty, clip=0.2)
    (sums.loss + critic.loss).backward()
    assert all(x == 0 for x in (*sums, *critic))
    assert weight.grad is not None and weight.grad.item() == 0


@pytest.mark.parametrize("seed", range(25))
def test_both_losses_and_their_gradients_agree_with_loops_over_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 200))
    old, ref, advantages, old_values, returns = rng.normal(size=(5, count)).astype(np.float32)
    new = (old + rng.normal(size=count) * 0.4).astype(np.float32)
    values = (old_values + rng.normal(size=count) * 0.4).astype(np.float32)
    logprobs, critic = grown(new.tolist()), grown(values.tolist())
    old_, ref_, advantages_, old_values_, returns_ = map(
        torch.from_numpy, (old, ref, advantages, old_values, returns)
    )
    sums = policy_loss(logprobs, old_, advantages_, clip=0.2, ref=ref_, kl_coef=0.3)
    of_critic = value_loss(critic, old_values_, returns_, clip=0.2)
    (sums.loss + of_critic.loss).backward()
    tokens = [
        reference.policy(*map(float, token), clip=0.2, kl_coef=0.3)
        for token in zip(new, old, advantages, ref, strict=True)
    ]
    states = [
        reference.value(*map(float, state), clip=0.2)
        for state in zip(values, old_values, returns, strict=True)
    ]
    for ours, theirs, gradient in ((sums, tokens, logprobs.grad), (of_critic, states, critic.grad)):
        losses, slopes, clipped = zip(*theirs, strict=True)
        assert ours.loss.item() == pytest.approx(sum(losses), rel=1e-6, abs=1e-5)
        assert gradient.tolist() == pytest.approx(list(slopes), rel=1e-5, abs=1e-6)
        assert ours.clipped.item() == sum(clipped)


TOKENS = {
    "new": [-1.0, -0.2, -2.0, -0.7, -1.1],
    "old": [-1.3, -0.2, -1.0, -0.6, -1.2],
    "advantages": [1.0, -1.0, 0.5, -0.2, 0.1],
    "entropies": [1.0, 2.0, 3.0, 4.0, 5.0],
    "values": [0.1, 0.9, -0.5, 0.0, 2.0],
    "returns": [1.0, 1.0, 1.0, -1.0, 0.0],
}


def add_tokens(sums: UpdateSums, start: int, end: int) -> None:
    of = {name: torch.tensor(values[start:end]) for name, values in TOKENS.items()}
    sums.add_policy(
        policy_loss(
            of["new"],
            of["old"],
            of["advantages"],
            clip=0.2,
            entropies=of["entropies"],
            ref=of["old"] - 0.1,
            kl_coef=0.1,
        )
    )
    sums.add_value(value_loss(of["values"], of["old"], of["returns"], clip=0.2))


def test_metrics_are_means_over_tokens_and_not_over_micro_batches() -> None:
    uneven, whole = UpdateSums(), UpdateSums()
    for start, end in ((0, 1), (1, 1), (1, 5)):
        add_tokens(uneven, start, end)
    add_tokens(whole, 0, 5)
    found = uneven.means()
    assert found == pytest.approx(whole.means(), rel=1e-6)
    assert found["policy/entropy_avg"] == pytest.approx(3.0)  # of batches' means it would be 2.25
    ratios = [math.exp(new - old) for new, old in zip(TOKENS["new"], TOKENS["old"], strict=True)]
    assert found["val/ratio"] == pytest.approx(sum(ratios) / 5)
    assert found["val/ratio_off"] == pytest.approx(sum(abs(r - 1) for r in ratios) / 5)
    assert found["policy/approxkl_avg"] == pytest.approx(sum(r - 1 - LOG(r) for r in ratios) / 5, rel=1e-5)
    assert found["policy/clipfrac_avg"] == pytest.approx(1 / 5)  # the first: e^0.3, and better
    assert set(found) == {
        "loss/policy_avg",
        "loss/value_avg",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "policy/entropy_avg",
        "policy/ref_kl_avg",
        "val/clipfrac_avg",
        "val/ratio",
        "val/ratio_off",
    }


def test_without_a_critic_or_without_an_actors_update_their_metrics_are_left_out() -> None:
    actor, critic = UpdateSums(), UpdateSums()
    one = torch.ones(1)
    actor.add_policy(policy_loss(one, one, one, clip=0.2))
    critic.add_value(value_loss(one, one, one + 1, clip=0.2))
    assert "loss/value_avg" not in actor.means() and actor.means()["val/ratio"] == 1
    assert critic.means() == {"loss/value_avg": 0.5, "val/clipfrac_avg": 0.0}
    demonstrated = UpdateSums()
    for losses in (one, torch.tensor([2.0, 6.0])):
        demonstrated.add_demonstrations(TokenLoss(losses.sum(), torch.tensor(0), torch.zeros(()), losses))
    assert demonstrated.means() == {"loss/ptx_avg": 3.0}
    assert UpdateSums().means() == {}


def test_sums_continue_from_json_exactly() -> None:
    straight, before = UpdateSums(), UpdateSums()
    for sums in (straight, before):
        add_tokens(sums, 0, 2)
    after = UpdateSums.of(json.loads(json.dumps(before.state())))
    for sums in (straight, after):
        add_tokens(sums, 2, 5)
    assert after.state() == straight.state() and straight.state()["surrogate"] != 0
    assert list(straight.state()) == [field.name for field in fields(UpdateSums)]


def test_entropies_are_averaged_over_the_tokens_that_they_were_asked_for() -> None:
    sums, one = UpdateSums(), torch.ones(3)
    sums.add_policy(policy_loss(one, one, one, clip=0.2))
    assert "policy/entropy_avg" not in sums.means() and sums.means()["val/ratio"] == 1
    for entropies in (torch.tensor([1.0]), torch.tensor([2.0, 6.0])):
        few = one[: len(entropies)]
        sums.add_policy(policy_loss(few, few, few, clip=0.2, entropies=entropies))
    assert sums.means()["policy/entropy_avg"] == 3.0 and sums.policy_tokens == 6
    # a checkpoint of an earlier version, which asked for all of them
    earlier = {name: value for name, value in sums.state().items() if name != "entropy_tokens"}
    assert UpdateSums.of(earlier).means()["policy/entropy_avg"] == 9 / 6


def test_updates_add_up_to_their_iteration() -> None:
    iteration, straight = UpdateSums(), UpdateSums()
    for start, end in ((0, 2), (2, 5)):
        update = UpdateSums()
        add_tokens(update, start, end)
        before = update.state()
        iteration.add(update)
        assert update.state() == before
        add_tokens(straight, start, end)
    assert iteration.state() == pytest.approx(straight.state())


def of_some_ranks(folder: str) -> int:
    world = init_world()
    sums = UpdateSums()
    add_tokens(sums, *[(0, 1), (1, 5)][world.rank])
    total = sums.all_reduced().means()
    assert total != sums.means()
    (Path(folder) / f"{world.size}_{world.rank}.json").write_text(json.dumps(total))
    close_world()
    return 0


def test_two_ranks_with_one_and_four_tokens_have_the_metrics_of_one_rank(tmp_path: Path) -> None:
    ranks = forked.start(of_some_ranks, (str(tmp_path),), 2, tmp_path / "output.txt")
    assert ranks.finish() == [0, 0], (tmp_path / "output.txt").read_text()
    first, second = (json.loads((tmp_path / f"2_{rank}.json").read_text()) for rank in (0, 1))
    alone = UpdateSums()
    add_tokens(alone, 0, 5)
    assert first == second == pytest.approx(alone.means(), rel=1e-6)


def test_explained_variance_by_hand() -> None:
    returns = np.array([0.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(np.full(3, 7.0), returns) == pytest.approx(0)  # off by a constant: no matter
    # residuals 0, 1, 2: variance 2/3 of 8/3
    assert explained_variance(returns / 2, returns) == pytest.approx(0.75)
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, np.ones(3)))
