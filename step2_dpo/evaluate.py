"""What DPO measures on held-out pairs: pair-weighted numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from common.data.types import PairBatch
from common.runtime.distributed import all_reduce_sum
from common.training.engine import Engine
from step2_dpo.loss import Objective, PairSums, StepCounts, compute_loss
from step2_dpo.reference import Reference


@torch.no_grad()
def evaluate(
    engine: Engine,
    batches: Iterable[PairBatch],
    reference: Reference,
    objective: Objective,
    device: torch.device,
) -> dict[str, float]:
    """The metrics of a training step, as `eval/*`, over all held-out pairs.

    Sums are divided once, so nothing depends on the evaluation batch size or the world size.
    """
    sums, counted = PairSums(), np.zeros(3)
    engine.eval()
    for batch in batches:
        known = reference.of_held_out(batch)
        sums.add(compute_loss(engine, batch, known, objective, device, with_entropy=True), objective)
        counted += StepCounts.of([batch])
    engine.train()
    metrics = sums.metrics(objective, StepCounts(*all_reduce_sum(counted.tolist())), with_entropy=True)
    return {f"eval/{name}": value for name, value in metrics.items()}
