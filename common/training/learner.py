"""A trained network under ZeRO, with its optimizer and the schedule of its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.config import JobConfig
from common.model.packed import PackedModel
from common.model.router_balance import RouterBalance
from common.rates import Rates
from common.runtime.distributed import World
from common.training.ds_config import build_ds_config
from common.training.engine import Engine, StepOutcome
from common.training.optim import build_optimizer, build_schedule, set_learning_rate
from common.training_config import OptimConfig, TrainConfig


@dataclass(frozen=True)
class Learner:
    """A network under ZeRO with its optimizer and the schedule of its learning rate."""

    engine: Engine
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]  # of the next step, by the number of applied ones
    rates: Rates  # over the run
    balance: RouterBalance | None = None  # of a mixture's experts, where it is asked for

    def step(self, applied: int) -> StepOutcome:
        """Reduce, clip and update with the learning rate that is due after `applied` steps."""
        set_learning_rate(self.optimizer, self.learning_rate(applied))
        return self.engine.step()

    def balance_routers(self, micro_batches: Sequence[Any], world: World) -> dict[str, float]:
        """Before the first pass of a step, of which these are this rank's: metrics of how its tokens are
        divided over experts; none where nothing balances them. A collective."""
        if self.balance is None:
            return {}
        return self.balance.count(micro_batches, world.device, world.size * self.engine.loss_scale)


def build_learner(
    module: PackedModel,
    job: JobConfig,
    train: TrainConfig,
    optim: OptimConfig,
    world: World,
    *,
    peak_lr: float,
    steps: int,
) -> Learner:
    """The module under ZeRO, as the job says. steps: of the optimizer, after which the schedule ends."""
    coefficient = job.model.router_aux_loss_coef
    balance = RouterBalance(module, coefficient) if coefficient else None  # before DeepSpeed's own hooks
    schedule = build_schedule(optim, steps)
    optimizer = build_optimizer(module, optim, peak_lr, seed=job.seed)
    config = build_ds_config(
        job.deepspeed,
        dtype=job.model.dtype,
        max_grad_norm=optim.max_grad_norm,
        micro_batch_size=train.micro_batch_size,
        world_size=world.size,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        optimizer=optim.name,
        gpu=world.device.type == "cuda",
    )
    engine = Engine(module, optimizer, config)
    rates = Rates.of(optim, peak_lr, steps)
    return Learner(engine, optimizer, lambda applied: peak_lr * schedule(applied), rates, balance)
