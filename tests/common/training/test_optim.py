import math
import sys

import pytest
import torch

from common.errors import UserError
from common.rates import Rates, warmup_steps
from common.training.optim import (
    build_optimizer,
    build_schedule,
    parameter_groups,
    set_learning_rate,
)
from common.training_config import OptimConfig, OptimizerName, SchedulerName


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.linear = torch.nn.Linear(4, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)


def test_linear_schedule_is_step_over_warmup_then_straight_to_zero() -> None:
    optim = OptimConfig(scheduler=SchedulerName.linear, warmup_ratio=0.2)
    share = build_schedule(optim, 50)
    for step in range(51):
        expected = step / 10 if step < 10 else 1 - (step - 10) / 40
        assert share(step) == pytest.approx(expected, abs=1e-12), step


def test_cosine_ends_on_its_floor_and_passes_the_middle_of_its_range() -> None:
    share = build_schedule(OptimConfig(warmup_ratio=0.1, min_lr_ratio=0.1), 100)
    assert share(10) == pytest.approx(1.0)
    assert share(55) == pytest.approx(0.55)
    assert share(100) == pytest.approx(0.1)


def test_cosine_without_a_floor_ends_at_zero() -> None:
    assert build_schedule(OptimConfig(min_lr_ratio=0.0), 100)(100) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("scheduler", "at_half", "at_end"),
    [
        (SchedulerName.constant, 1.0, 1.0),
        (SchedulerName.constant_with_warmup, 1.0, 1.0),
        (SchedulerName.inverse_sqrt, math.sqrt(10 / 50), math.sqrt(10 / 100)),
        (SchedulerName.wsd, 1.0, 0.1),
    ],
)
def test_each_schedule_has_its_shape(scheduler: SchedulerName, at_half: float, at_end: float) -> None:
    share = build_schedule(OptimConfig(scheduler=scheduler, warmup_ratio=0.1), 100)
    assert share(50) == pytest.approx(at_half)
    assert share(100) == pytest.approx(at_end)


@pytest.mark.parametrize("scheduler", list(SchedulerName))
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_what_is_said_of_a_schedule_is_what_it_does(scheduler: SchedulerName, ratio: float) -> None:
    optim = OptimConfig(scheduler=scheduler, warmup_ratio=ratio, min_lr_ratio=0.2)
    share, said = build_schedule(optim, 100), Rates.of(optim, 3e-5, 100)
    assert said.warmup == (0 if scheduler is SchedulerName.constant else 100 * ratio)
    assert [3e-5 * share(step) for step in (said.warmup, 100)] == pytest.approx([said.peak, said.floor])
    assert max(share(step) for step in range(100)) == pytest.approx(1.0)


def test_a_schedule_is_said_in_one_line() -> None:
    said = Rates.of(OptimConfig(), 2e-5, 1_000).in_words()
    assert said == "up to 2e-05 over 30 warm-up step(s), then cosine down to 2e-06 at step 1,000"
    plain = OptimConfig(scheduler=SchedulerName.constant)
    assert Rates.of(plain, 1e-6, 10).in_words() == "1e-06, constant"


def test_warmup_is_rounded_up_and_free_of_float_noise() -> None:
    assert warmup_steps(0.03, 100) == 3
    assert warmup_steps(0.03, 10) == 1
    assert 0.07 * 100 > 7 and warmup_steps(0.07, 100) == 7
    assert warmup_steps(0.0, 10) == 0


def test_warmup_steps_take_the_place_of_the_ratio_and_never_all_of_a_run() -> None:
    optim = OptimConfig(scheduler=SchedulerName.linear, warmup_ratio=0.5, warmup_steps=4)
    share = build_schedule(optim, 12)
    assert [share(step) for step in range(5)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert Rates.of(optim, 1.0, 12).warmup == 4
    assert Rates.of(optim, 1.0, 3).warmup == 2  # the last step has the peak
    assert Rates.of(OptimConfig(warmup_steps=0), 1.0, 100).warmup == 0


def test_a_run_of_one_step_trains() -> None:
    assert build_schedule(OptimConfig(), 1)(0) == 1.0


def test_weight_decay_spares_biases_norms_and_frozen_weights() -> None:
    model = Model()
    decayed, plain = parameter_groups(model, 0.1)
    assert {id(p) for p in decayed["params"]} == {id(model.embed.weight), id(model.linear.weight)}
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    spared = [model.linear.bias, model.norm.weight, model.norm.bias]
    assert {id(p) for p in plain["params"]} == {id(p) for p in spared}


def test_adamw_takes_every_value_from_the_config() -> None:
    optim = OptimConfig(betas=[0.8, 0.7], eps=1e-5, weight_decay=0.2)
    optimizer = build_optimizer(Model(), optim, lr=0.3)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.3, (0.8, 0.7), 1e-5, 0.2)
    assert group["fused"] is True


def test_adafactor_updates_element_by_element_so_that_shards_do_not_matter() -> None:
    def stepped(parts: int) -> torch.Tensor:
        values = torch.arange(1.0, 9.0)
        shards = [torch.nn.Parameter(part.clone()) for part in values.chunk(parts)]
        holder = torch.nn.ParameterList(shards)
        optimizer = build_optimizer(holder, OptimConfig(name=OptimizerName.adafactor), lr=0.1)
        for shard, gradient in zip(shards, (values**2).chunk(parts), strict=True):
            shard.grad = gradient.clone()
        optimizer.step()
        return torch.cat([shard.detach() for shard in shards])

    assert not torch.equal(stepped(1), torch.arange(1.0, 9.0))
    assert torch.equal(stepped(1), stepped(4))


def test_muon_takes_matrices_only() -> None:
    model = Model()
    optimizer = build_optimizer(model, OptimConfig(name=OptimizerName.muon), lr=0.1)
    matrices, others = optimizer.param_groups
    assert [id(p) for p in matrices["params"]] == [id(model.linear.weight)]
    assert id(model.embed.weight) in {id(p) for p in others["params"]}
    assert len(others["params"]) == 4


def test_muons_learning_rate_is_scaled_by_the_width_of_each_matrix_to_adamws_size() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(16, 4, bias=False), torch.nn.Linear(100, 5)])
    optimizer = build_optimizer(model, OptimConfig(name=OptimizerName.muon), lr=0.1)
    set_learning_rate(optimizer, 0.5)
    # 0.2 * sqrt(16), 0.2 * sqrt(100), and AdamW for the bias
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 1.0, 0.5])


def test_bitsandbytes_optimizers_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="optim.name=adamw_8bit needs bitsandbytes"):
        build_optimizer(Model(), OptimConfig(name=OptimizerName.adamw_8bit), lr=0.1)
