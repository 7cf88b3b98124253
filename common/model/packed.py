"""The causal LM that takes packed documents and computes the loss of trained positions, and nothing else.

`PackedCausalLM` takes the tensors of a `Batch` and returns the sums of `fused_loss`. It neither pads, shifts
labels, nor reads a mask: targets come aligned. What it may leave out with its model is found by `probes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from common.model.adapters import unwrapped
from common.model.attention import packed_arguments, positions_within
from common.model.fused_loss import ScoringHead, TokenLoss, changes_logits, scores_in_head
from common.model.one_by_one import decoder_of
from common.model.probes import can_share_prefix, last_layer_of
from common.notices import notice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from common.data.types import Batch


class PackedCausalLM(nn.Module):
    """A transformers causal LM (also one wrapped by peft) that takes packed batches and returns sums.

    Only trained positions reach the output projection. Models that change their logits after the
    projection go through their own forward and plain cross-entropy.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.scores_in_head = scores_in_head(self.base())
        if self.scores_in_head:
            cast(nn.Module, self.base().get_output_embeddings()).__class__ = ScoringHead
        elif changes_logits(self.base()):
            notice(
                "logits of all trained tokens are held at once, not chunk by chunk",
                f"model_type={self.base().config.model_type} changes them after the projection",
                "4 bytes x tokens x vocabulary, several times",
            )
        self.last_layer = last_layer_of(self.base())
        self.shares_prefix = can_share_prefix(self.base())

    def base(self) -> PreTrainedModel:
        """The transformers model, without peft's wrapper; adapters stay active in it."""
        return unwrapped(self.model)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        trained_positions: torch.Tensor,
        targets: torch.Tensor,
        shared_prefix: tuple[int, ...] = (),
        with_entropy: bool = False,
        per_token: bool = False,
        temperature: float = 1.0,
    ) -> TokenLoss:
        """Score the trained positions of one packed sequence. Shapes as in `Batch`.

        per_token: `token_losses` and, with_entropy, `token_entropies` carry the gradient, and loss_sum does
        not. temperature: the distributions are softmax(logits / temperature).
        """
        arguments = packed_arguments(input_ids, position_ids, cu_seqlens, max_seqlen, shared_prefix)
        if not self.scores_in_head:
            with self.last_layer.only(trained_positions):
                logits = self.base()(**arguments, logits_to_keep=trained_positions).logits[0]
            return _plain_cross_entropy(logits, targets, with_entropy, per_token, temperature)
        with self.last_layer.only(trained_positions):
            hidden = decoder_of(self.base())(**arguments).last_hidden_state
        selected = hidden[0].index_select(0, trained_positions)
        return cast(
            TokenLoss,
            self.base().get_output_embeddings()(selected, targets, with_entropy, per_token, temperature),
        )

    def logits(self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [N, V] of the flat sequence input_ids [1, N]; one document unless cu_seqlens says more."""
        length = input_ids.shape[1]
        whole = torch.tensor([0, length], dtype=torch.int32, device=input_ids.device)
        boundaries = whole if cu_seqlens is None else cu_seqlens
        positions = positions_within(boundaries, length)
        arguments = packed_arguments(input_ids, positions, boundaries, int(boundaries.diff().max()))
        return cast(torch.Tensor, cast(Any, self.base())(**arguments).logits[0])


def batch_arguments(batch: Batch) -> dict[str, Any]:
    """The arguments of `PackedCausalLM.forward` for a batch."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "trained_positions": batch.trained_positions,
        "targets": batch.targets,
        "shared_prefix": batch.shared_prefix,
    }


def _plain_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, with_entropy: bool, per_token: bool, temperature: float
) -> TokenLoss:
    """From logits [M, V] that the model made itself."""
    scores = logits.float()
    if temperature != 1:
        scores = scores / temperature
    losses = F.cross_entropy(scores, targets, reduction="none")
    entropies = None
    if with_entropy:
        with torch.set_grad_enabled(per_token and torch.is_grad_enabled()):
            logprobs = scores.log_softmax(1)
            entropies = -(logprobs.exp() * logprobs).sum(1)
    with torch.no_grad():
        correct = (scores.argmax(1) == targets).sum() if len(targets) else targets.new_zeros(())
        entropy = scores.new_zeros(()) if entropies is None else entropies.sum()
    if per_token:
        return TokenLoss(losses.detach().sum(), correct, entropy, losses, entropies)
    return TokenLoss(losses.sum(), correct, entropy, losses.detach())
