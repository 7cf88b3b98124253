"""Stochastic rounding on literals, and an AdamW that keeps its moments so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.training import adamw_bf16
from common.training.adamw_bf16 import AdamWBf16, rounded
from common.training.reshard import Piece
from tests.common.training.test_optim import Model

ALL_NOISE = torch.arange(2**16, dtype=torch.int32)
SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}


def optimizer_of(*parameters: torch.Tensor, seed: int = 0, decay: float = 0.0) -> AdamWBf16:
    return AdamWBf16([{"params": list(parameters), "weight_decay": decay}], seed=seed, **SETTINGS)


def learn(optimizer: torch.optim.Optimizer, gradients: torch.Tensor, parameter: torch.Tensor) -> None:
    for gradient in gradients:
        parameter.grad = gradient.clone().view_as(parameter)
        optimizer.step()


@pytest.mark.parametrize("value", [1 + 2**-9, -(1 + 2**-9), 3.1415927, -1e-20, 65_000.5])
def test_rounding_is_right_on_average_and_gives_only_the_two_neighbours(value: float) -> None:
    found = rounded(torch.full((2**16,), value), ALL_NOISE)
    # over all noise the mean is the value, up to what fp32 itself rounded
    assert float(found.double().mean()) == pytest.approx(float(torch.tensor(value)), rel=1e-7)
    assert len(found.unique()) == 2


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 2.0**-100])
def test_what_bf16_holds_stays_as_it_is(value: float) -> None:
    assert rounded(torch.full((2**16,), value), ALL_NOISE).unique().tolist() == [value]


def test_the_first_step_is_adamws() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(7, 5), torch.randn(1, 7, 5)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    learn(optimizer_of(ours, decay=0.2), gradient, ours)
    learn(torch.optim.AdamW([theirs], weight_decay=0.2, **SETTINGS), gradient, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # fp32: the order of products


def test_a_second_moment_that_hardly_changes_follows_its_fp32_twin() -> None:
    # from 1 towards 0.25 by a thousandth of the distance a step: less than half of bf16's last place, 2^-9
    parameter = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = optimizer_of(parameter)
    learn(optimizer, torch.zeros(1, 20_000), parameter)
    moment = optimizer.state[parameter]["exp_avg_sq"]
    moment.fill_(1.0)
    learn(optimizer, torch.full((300, 20_000), 0.5), parameter)
    expected = 0.25 + 0.75 * 0.999**300
    assert moment.dtype is torch.bfloat16
    # the mean of 20,000 walks of 300 steps, each rounded by at most 2^-8: a thousandth is eight deviations
    assert float(moment.double().mean()) == pytest.approx(expected, abs=1e-3)
    assert float((torch.ones(1).bfloat16() * 0.99925).bfloat16()) == 1.0, "to nearest it would stay"


def test_a_parameter_in_parts_has_the_bits_of_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adamw_bf16.CHUNK, "cpu", 100)
    torch.manual_seed(0)
    start, gradients = torch.randn(1000), torch.randn(5, 1000)
    whole = torch.nn.Parameter(start.clone())
    optimizer = optimizer_of(whole)
    optimizer.place({whole: [Piece("a", 0, 0, 700), Piece("b", 0, 700, 300)]})
    learn(optimizer, gradients, whole)
    # the ranks' parts: of a its end and then b, of a its beginning, each filled up with zeros
    for elements, pieces in (
        (torch.arange(450, 1000), [Piece("a", 450, 0, 250), Piece("b", 0, 250, 300)]),
        (torch.arange(0, 450), [Piece("a", 0, 0, 450)]),
    ):
        filled = torch.cat([start[elements], torch.zeros(3)])
        part = torch.nn.Parameter(filled)
        optimizer = optimizer_of(part)
        optimizer.place({part: pieces})
        learn(optimizer, torch.cat([gradients[:, elements], torch.zeros(5, 3)], dim=1), part)
        assert torch.equal(part[:-3], whole[elements]) and not part[-3:].any()


def test_a_loaded_state_goes_on_with_the_same_bits_and_stays_in_bf16() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(6, 500)
    whole = torch.nn.Parameter(torch.ones(500))
    optimizer = optimizer_of(whole)
    learn(optimizer, gradients[:3], whole)
    stored, other = optimizer.state_dict(), torch.nn.Parameter(whole.detach().clone())
    again = optimizer_of(other)
    again.load_state_dict(stored)
    assert again.state[other]["exp_avg"].dtype is torch.bfloat16
    learn(optimizer, gradients[3:], whole)
    learn(again, gradients[3:], other)
    assert torch.equal(whole, other)


def test_random_bits_are_even_and_differ_by_seed_step_parameter_and_place() -> None:
    parameter = torch.nn.Parameter(torch.zeros(50_000))

    def bits(seed: int, step: int, name: str) -> torch.Tensor:
        optimizer = optimizer_of(parameter, seed=seed)
        optimizer.place({parameter: [Piece(name, 0, 0, 50_000)]})
        return torch.cat([noise for _, _, noise in optimizer._stretches(parameter, step, "")])

    one = bits(0, 1, "a")
    for field in (one & 0xFFFF, (one >> 16) & 0xFFFF):
        # evenly from 0 to 65,535: the mean's deviation is 85, and of 16 equal parts each has 3,125 +- 54
        assert float(field.double().mean()) == pytest.approx(32_767.5, abs=350)
        counts = torch.bincount(field.int() // 4096, minlength=16)
        assert int((counts - 3125).abs().max()) < 250
    assert torch.equal(one, bits(0, 1, "a"))
    for other in (bits(1, 1, "a"), bits(0, 2, "a"), bits(0, 1, "b"), one.roll(1)):
        pair = torch.stack([one.double(), other.double()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.02  # its deviation is 0.0045


def test_optim_name_adamw_bf16_takes_every_value_from_the_config() -> None:
    from common.training.optim import build_optimizer
    from common.training_config import OptimConfig, OptimizerName

    optim = OptimConfig(name=OptimizerName.adamw_bf16, betas=[0.8, 0.7], eps=1e-5, weight_decay=0.2)
    optimizer = build_optimizer(Model(), optim, lr=0.3, seed=4)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, AdamWBf16) and optimizer._seed == 4
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.3, (0.8, 0.7), 1e-5, 0.2)
