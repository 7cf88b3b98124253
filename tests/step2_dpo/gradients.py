"""One rank of DPO's gradient grid: rank 0 writes gradients and first metrics.

The gradient is read off a plain SGD step so large that the old weight is lost in rounding.
"""

from __future__ import annotations

import itertools
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.config import DeepSpeedConfig, Dtype
from common.data.batches import BatchPlan, PairBatches, evaluation_pair_batches
from common.model.packed import PackedCausalLM
from common.runtime.distributed import World, all_reduce_sum, close_world, init_world
from common.training.ds_config import build_ds_config
from common.training.engine import Engine
from step2_dpo.config import LossType
from step2_dpo.evaluate import evaluate
from step2_dpo.loss import Objective, PairSums, StepCounts, compute_loss, step_loss
from step2_dpo.reference import Reference, load_or_compute, starting_policy
from tests.packed import packed_lm
from tests.spread import sharing
from tests.step2_dpo.pairs import MAX_LENGTH, SomePairs, plain_logps, tiny_llama

LEARNING_RATE = 1e5
EVERYTHING = Objective(beta=0.3, label_smoothing=0.1, sft_weight=0.5)
OTHERS = (
    Objective(),
    Objective(LossType.ipo, beta=0.3),
    Objective(LossType.hinge, beta=0.3, sft_weight=0.1),
    Objective(beta=0.3, length_normalized=True),
)


class Point(NamedTuple):
    """One way to compute the gradient of one step over all pairs."""

    micro_batch_size: int
    packing: bool
    stage: int
    objective: Objective = EVERYTHING
    share_prefix: bool = True


GRID = [
    *(Point(*point) for point in itertools.product((1, 2, 4), (True, False), (1, 2, 3))),
    *(Point(2, True, 2, objective) for objective in OTHERS),
    Point(2, True, 2, share_prefix=False),
]


class Start(NamedTuple):
    """One way to begin a run."""

    packing: bool
    stage: int
    adapters: bool


STARTS = [Start(*start) for start in itertools.product((True, False), (1, 2, 3), (False, True))]


def reference_model() -> torch.nn.Module:
    """Not the policy: the pairs' losses and weights are then all different."""
    return tiny_llama("eager", seed=1).double()


@cache
def other_reference() -> Reference:
    model, pairs = reference_model(), SomePairs()
    with torch.no_grad():
        table = np.array([[float(x) for x in plain_logps(model, pairs[i])] for i in range(len(pairs))])
    return Reference(table, table)


def plan_of(point: Point | Start, world: World) -> BatchPlan:
    return BatchPlan(
        MAX_LENGTH, point.packing, 8, getattr(point, "micro_batch_size", 2), 0,
        share_prefix=getattr(point, "share_prefix", True), **sharing(world),
    )  # fmt: skip


def engine_of(module: PackedCausalLM, stage: int, world: World, learning_rate: float) -> Engine:
    config = build_ds_config(
        DeepSpeedConfig(stage=stage), dtype=Dtype.fp32, max_grad_norm=0.0, micro_batch_size=2,
        world_size=world.size, num_parameters=sum(p.numel() for p in module.parameters()),
    )  # fmt: skip
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return Engine(module, torch.optim.SGD(trained, lr=learning_rate), config)


def train_step(
    engine: Engine, plan: BatchPlan, reference: Reference, objective: Objective, world: World
) -> dict[str, float]:
    """One optimizer step over all pairs, as in train.py; its metrics."""
    micro_batches = PairBatches(SomePairs(), plan).micro_batches(0)
    counts = StepCounts(*all_reduce_sum(StepCounts.of(micro_batches)))
    sums = PairSums()
    engine.train()
    for batch in micro_batches:
        known = reference.of_train(batch)
        result = compute_loss(engine, batch, known, objective, world.device, with_entropy=True)
        engine.backward(step_loss(result, objective, counts), 1.0)
        sums.add(result, objective)
    assert engine.step().applied
    return sums.metrics(objective, counts, with_entropy=True)


def gradient(world: World, point: Point) -> tuple[Any, dict[str, float]]:
    """Gradients by name on rank 0, and the step's metrics."""
    module = packed_lm(tiny_llama())
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    engine = engine_of(module, point.stage, world, LEARNING_RATE)
    metrics = train_step(engine, plan_of(point, world), other_reference(), point.objective, world)
    after = engine.full_state_dict()
    if after is None:
        return None, metrics
    return {name: (before[name] - after[f"model.{name}"]) / LEARNING_RATE for name in before}, metrics


def beginning(world: World, start: Start, cache: Path) -> dict[str, float]:
    """Metrics of an evaluation and of the first step of a run; then of a second step."""
    model: Any = tiny_llama()
    if start.adapters:
        import peft

        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    engine = engine_of(packed_lm(model), start.stage, world, 0.1)
    plan, pairs = plan_of(start, world), SomePairs()
    batches: Any = PairBatches(pairs, plan)
    key = {"start": list(start)}
    opened = starting_policy(engine)
    reference = load_or_compute(opened, batches, pairs, 1, key, cache, world, lambda line: None)  # type: ignore[arg-type]
    objective = Objective()
    held_out = evaluate(engine, evaluation_pair_batches(pairs, plan), reference, objective, world.device)
    first = train_step(engine, plan, reference, objective, world)
    second = train_step(engine, plan, reference, objective, world)
    return {**first, **held_out, "second loss": second["loss"]}


def main(out: str, sequence_parallel: int = 1) -> int:
    world = init_world(sequence_parallel)
    gradients, metrics = {}, {}
    for point in GRID:
        gradients[point], metrics[point] = gradient(world, point)
    with tempfile.TemporaryDirectory() as folder:
        starts = {start: beginning(world, start, Path(folder)) for start in STARTS}
    if world.is_rank0:
        torch.save({"gradients": gradients, "metrics": metrics, "starts": starts}, out)
    close_world()
    return 0
