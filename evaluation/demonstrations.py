"""Held-out loss and token accuracy of a policy on demonstrations, in all and by source.

What is measured is what SFT measures (`step1_sft/evaluate.py`): over trained tokens, each counted once.
Documents are computed one at a time, as sums of each are wanted.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from common.data.batches import collate
from common.data.stored import TokenizedDataset
from common.runtime.progress import Progress
from evaluation.inference_model import InferenceModel
from evaluation.values import Measured, of_ratio
from step1_sft.loss import compute_loss

PER_ROW = "loss_per_row"
"""Metric in nats per row, for models that make other tokens of it."""


@torch.no_grad()
def measure(model: InferenceModel, rows: TokenizedDataset, keys: Collection[str]) -> Measured:
    """`loss` (nats per token) and `mean_token_accuracy` of the rows `keys`; of several sources each, too.

    A row that was split into several documents counts as one row.
    """
    loss: dict[str, float] = {}
    correct: dict[str, float] = {}
    tokens: dict[str, float] = {}
    source: dict[str, str] = {}
    engine = model.packed()
    with Progress(len(rows), label="evaluate") as progress:
        for index in range(len(rows)):
            key = rows.place(index)
            if key in keys:
                source_id = int(rows.source_ids[index])
                batch = collate([rows[index]], [index], [source_id])
                result = compute_loss(engine, batch, model.device, with_entropy=False)
                source[key] = rows.sources[source_id]
                loss[key] = loss.get(key, 0.0) + float(result.loss_sum)
                correct[key] = correct.get(key, 0.0) + float(result.correct)
                tokens[key] = tokens.get(key, 0.0) + len(batch.targets)
            progress.update(index + 1)
    parts = {"loss": loss, "mean_token_accuracy": correct}
    found = {name: of_ratio(part, tokens) for name, part in parts.items()}
    found[PER_ROW] = loss
    names = sorted(set(source.values()))
    for each in names if len(names) > 1 else ():
        for name, part in parts.items():
            of_source = {key: value for key, value in part.items() if source[key] == each}
            found[f"{each}/{name}"] = of_ratio(of_source, {key: tokens[key] for key in of_source})
    by_row = {name: {key: part[key] / tokens[key] for key in part} for name, part in parts.items()}
    return Measured(found, {**by_row, PER_ROW: loss, "tokens": tokens})
