"""What SFT minimises, and the numbers read off it.

The loss of an optimizer step is the negative log-likelihood of its trained tokens, divided by their
number; both over all micro-batches and ranks (InstructGPT, arXiv 2203.02155). Sums travel through
here; they are divided once, at the end. The negative log-likelihood itself is computed in
`common/model/fused_loss.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.data.types import Batch
from common.model.fused_loss import TokenLoss
from common.model.packed import batch_arguments
from common.runtime.distributed import all_reduce_sum, on_host
from common.training.engine import Engine


def compute_loss(engine: Engine, batch: Batch, device: torch.device, *, with_entropy: bool) -> TokenLoss:
    """Sums over the batch's trained tokens; `loss_sum` carries the gradient."""
    return engine(**batch_arguments(batch.to(device)), with_entropy=with_entropy)


@dataclass
class TokenSums:
    """Sums over the trained tokens that one rank saw in one step."""

    loss: torch.Tensor | float = 0.0
    correct: torch.Tensor | float = 0.0
    entropy: torch.Tensor | float = 0.0

    def add(self, result: TokenLoss) -> None:
        """Add one micro-batch; nothing waits for the device here."""
        self.loss = self.loss + result.loss_sum.detach().double()
        self.correct = self.correct + result.correct.double()
        self.entropy = self.entropy + result.entropy_sum.double()

    def means(self, tokens: float, *, with_entropy: bool) -> dict[str, float]:
        """Token means over all ranks; `tokens` is the global number of trained tokens.

        with_entropy: as the losses were asked for; without it there is no `entropy`.
        """
        loss, correct, entropy = all_reduce_sum(on_host([self.loss, self.correct, self.entropy]))
        return {
            "loss": loss / tokens,
            "mean_token_accuracy": correct / tokens,
            **({"entropy": entropy / tokens} if with_entropy else {}),
        }
