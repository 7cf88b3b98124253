from __future__ import annotations

import torch

from common.model.fused_loss import TokenLoss
from step1_sft.loss import TokenSums


def result(losses: list[float], correct: int, entropy: float) -> TokenLoss:
    values = torch.tensor(losses)
    return TokenLoss(values.sum(), torch.tensor(correct), torch.tensor(entropy), values)


def test_sums_of_micro_batches_are_divided_once_by_all_tokens() -> None:
    sums = TokenSums()
    sums.add(result([1.0, 2.0, 3.0], 1, 6.0))
    sums.add(result([8.0], 1, 2.0))
    # a mean of the two means would be 5
    means = {"loss": 3.5, "mean_token_accuracy": 0.5, "entropy": 2.0}
    assert sums.means(4, with_entropy=True) == means
    del means["entropy"]  # not 0, which is what the losses have when they were not asked for it
    assert sums.means(4, with_entropy=False) == means


def test_sums_keep_no_graph() -> None:
    loss = torch.ones(2, requires_grad=True)
    sums = TokenSums()
    sums.add(TokenLoss(loss.sum(), torch.tensor(0), torch.tensor(0.0), loss.detach()))
    assert isinstance(sums.loss, torch.Tensor) and not sums.loss.requires_grad
