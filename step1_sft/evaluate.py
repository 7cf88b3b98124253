"""What SFT measures on held-out rows: token-weighted numbers, and completions to look at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from common.data.types import Batch
from common.runtime.distributed import all_reduce_sum
from common.training.engine import Engine
from step1_sft.loss import compute_loss


@torch.no_grad()
def evaluate(
    engine: Engine, batches: Iterable[Batch], sources: Sequence[str], device: torch.device
) -> dict[str, float]:
    """Loss, accuracy and perplexity over all held-out tokens, and the loss of each source.

    Sums are divided once, so nothing depends on the evaluation batch size or the world size.
    """
    loss = torch.zeros(len(sources), dtype=torch.float64)
    tokens, correct = torch.zeros_like(loss), 0.0
    engine.eval()
    for batch in batches:
        result = compute_loss(engine, batch, device, with_entropy=False)
        loss.index_add_(0, batch.source_of_target, result.token_losses.double().cpu())
        tokens += torch.bincount(batch.source_of_target, minlength=len(sources))
        correct += float(result.correct)
    engine.train()
    *sums, total_correct = all_reduce_sum(
        torch.cat([loss, tokens, torch.tensor([correct], dtype=torch.float64)])
    )
    losses, counts = sums[: len(sources)], sums[len(sources) :]
    mean = sum(losses) / sum(counts)
    metrics = {
        "eval/loss": mean,
        "eval/perplexity": math.exp(mean) if mean < 700 else math.inf,
        "eval/mean_token_accuracy": total_correct / sum(counts),
    }
    if sum(count > 0 for count in counts) > 1:
        for name, source_loss, count in zip(sources, losses, counts, strict=True):
            if count > 0:
                metrics[f"eval/{name}/loss"] = source_loss / count
    return metrics
