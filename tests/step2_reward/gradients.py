"""One rank of the reward model's gradient grid: `main` writes what rank 0 found.

The gradient is read off a plain SGD step so large that the old weight is lost in rounding.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from common.config import DeepSpeedConfig, Dtype
from common.data.batches import BatchPlan, PairBatches, count_pairs, evaluation_pair_batches
from common.runtime.distributed import World, all_reduce_sum, close_world, init_world
from common.training.ds_config import build_ds_config
from common.training.engine import Engine
from step2_reward.evaluate import held_out_metrics, score_pairs
from step2_reward.loss import ScoredPairs, pair_losses, score, step_metrics
from tests.packed import packed_scorer
from tests.spread import sharing
from tests.step2_reward.pairs import CENTERING, MAX_LENGTH, SomePairs, tiny_scorer

LEARNING_RATE = 1e5


class Point(NamedTuple):
    """One way to compute the gradient of one step over all pairs."""

    micro_batch_size: int
    packing: bool
    stage: int
    checkpointing: bool = False
    share_prefix: bool = True


GRID = [
    *(Point(*point) for point in itertools.product((1, 2, 4), (True, False), (1, 2, 3))),
    *(Point(2, True, stage, checkpointing=True) for stage in (1, 2, 3)),
    Point(2, True, 2, share_prefix=False),
]


class Found(NamedTuple):
    gradient: dict[str, torch.Tensor]
    metrics: dict[str, float]  # of the step
    held_out: dict[str, float]  # of all pairs, before the step


def one_step(world: World, point: Point) -> Found:
    """Evaluate all pairs, then one optimizer step over them, as in train.py; the gradient on rank 0."""
    module = packed_scorer(tiny_scorer(checkpointing=point.checkpointing))
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    config = build_ds_config(
        DeepSpeedConfig(stage=point.stage), dtype=Dtype.fp32, max_grad_norm=0.0, world_size=world.size,
        micro_batch_size=point.micro_batch_size, num_parameters=sum(p.numel() for p in module.parameters()),
    )  # fmt: skip
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=LEARNING_RATE), config)
    plan = BatchPlan(
        MAX_LENGTH, point.packing, 8, point.micro_batch_size, 0, share_prefix=point.share_prefix,
        **sharing(world),
    )  # fmt: skip
    evaluated = score_pairs(engine, evaluation_pair_batches(SomePairs(), plan), world.device)
    micro_batches = PairBatches(SomePairs(), plan).micro_batches(0)
    pairs, *_ = all_reduce_sum(count_pairs(micro_batches))
    engine.train()
    scored = []
    for batch in micro_batches:
        scores = score(engine, batch, world.device)
        engine.backward(pair_losses(scores, batch.margins, CENTERING).sum(), pairs)
        scored.append(ScoredPairs.of(batch, scores))
    assert engine.step().applied
    metrics = step_metrics(ScoredPairs.all_gathered(scored), CENTERING)
    after = engine.full_state_dict()
    gradient = {name: (before[name] - after[f"model.{name}"]) / LEARNING_RATE for name in before if after}
    return Found(gradient, metrics, held_out_metrics(evaluated, SomePairs.sources, CENTERING))


def main(out: str, sequence_parallel: int = 1) -> int:
    world = init_world(sequence_parallel)
    found = {tuple(point): tuple(one_step(world, point)) for point in GRID}
    if world.is_rank0:
        torch.save(found, out)
    close_world()
    return 0
