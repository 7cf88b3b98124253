"""A transformers model that takes packed documents: `PackedModel`, and the causal LM among them.

`PackedCausalLM` takes the tensors of a `Batch`, computes the loss of trained positions and nothing else, and
returns the sums of `fused_loss`. It neither pads, shifts labels, nor reads a mask: targets come aligned. Who
makes one asks `probes.find_shortcuts` what its passes may leave out; making it runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from common.model.adapters import unwrapped
from common.model.attention import packed_arguments, positions_within
from common.model.fused_loss import ScoringHead, TokenLoss
from common.model.last_layer import computed_at, feed_forward_of
from common.model.one_by_one import decoder_of, reason_of
from common.model.probes import Shortcuts
from common.stage import Role

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from common.data.types import Batch
    from common.launch_config import LaunchConfig

ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary embeddings that transformers adapts to the largest position of a pass."""


class PackedModel(nn.Module):
    """A transformers model, perhaps in peft's wrapper, that takes packed documents."""

    role: ClassVar[Role]  # what it is exported as

    def __init__(self, model: nn.Module, shortcuts: Shortcuts) -> None:
        """shortcuts: of this model, see `probes.find_shortcuts`."""
        super().__init__()
        self.model, self.shortcuts = model, shortcuts
        self.routed = 0  # of the positions of a pass, the first ones: those that are a document's

    def base(self) -> PreTrainedModel:
        """The transformers model, without peft's wrapper; adapters stay active in it."""
        return unwrapped(self.model)

    def answers(self, documents: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the model says to a few documents (int64 [T] each), to compare an export with."""
        raise NotImplementedError

    def read_at(
        self, rows: torch.Tensor, length: int, different: torch.Tensor | None = None
    ) -> AbstractContextManager[None]:
        """While the block runs, hidden states are needed at `rows` only (int64, of `length` positions).

        different: those that differ, ascending; without them the device is asked, for which the host waits.
        """
        network = feed_forward_of(self.base()) if self.shortcuts.partial_last_layer else None
        if network is None:
            return nullcontext()
        return computed_at(network, rows.unique() if different is None else different, length)

    def replace_linears(self, part: nn.Module, kind: type[nn.Linear]) -> None:
        """Put a `kind` with the same parameters, and so the same names of tensors, in the place of each
        nn.Linear that `part` is or has.

        Under ZeRO-3 a module's weight is whole only while the module is called: what else is computed with
        the weight has to be computed in there.
        """
        parts = set(part.modules())
        for name, old in list(self.base().named_modules()):
            if old in parts and type(old) is nn.Linear:
                new = kind(old.in_features, old.out_features, old.bias is not None, device="meta")
                new.weight, new.bias = old.weight, old.bias
                self.base().set_submodule(name, new)


class PackedCausalLM(PackedModel):
    """The causal LM, of which only trained positions reach the output projection.

    Models that change their logits after the projection go through their own forward and plain cross-entropy.
    """

    role = Role.policy

    def __init__(self, model: nn.Module, shortcuts: Shortcuts) -> None:
        super().__init__(model, shortcuts)
        if shortcuts.fused_loss:
            self.replace_linears(cast(nn.Module, self.base().get_output_embeddings()), ScoringHead)

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
        computed_positions: torch.Tensor | None = None,
        sequence_parallel: int = 1,
        padding: int = 0,
    ) -> TokenLoss:
        """Score the trained positions of one packed sequence. Shapes as in `Batch`.

        per_token: `token_losses` and, with_entropy, `token_entropies` carry the gradient, and loss_sum does
        not. temperature: the distributions are softmax(logits / temperature).
        """
        base: Any = self.base()
        self.routed = input_ids.shape[1] - padding
        arguments = packed_arguments(
            input_ids, position_ids, cu_seqlens, max_seqlen, shared_prefix, sequence_parallel
        )
        with self.read_at(trained_positions, input_ids.shape[1], computed_positions):
            if not self.shortcuts.fused_loss:
                logits = base(**arguments, logits_to_keep=trained_positions).logits[0]
                return _plain_cross_entropy(logits, targets, with_entropy, per_token, temperature)
            hidden = decoder_of(base)(**arguments).last_hidden_state
        selected = hidden[0].index_select(0, trained_positions)
        scored = base.get_output_embeddings()(selected, targets, with_entropy, per_token, temperature)
        return cast(TokenLoss, scored)

    def answers(self, documents: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits [T, V] of the only document."""
        (document,) = documents
        return self.logits(document[None])

    def logits(self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [N, V] of the flat sequence input_ids [1, N]; one document unless cu_seqlens says more."""
        length = input_ids.shape[1]
        whole = torch.tensor([0, length], dtype=torch.int32, device=input_ids.device)
        boundaries = whole if cu_seqlens is None else cu_seqlens
        positions = positions_within(boundaries, length)
        arguments = packed_arguments(input_ids, positions, boundaries, int(boundaries.diff().max()))
        return cast(torch.Tensor, cast(Any, self.base())(**arguments).logits[0])


def refuse_unsliced(network: PreTrainedModel, launch: LaunchConfig, ranks: int | None = None) -> None:
    """Where ranks share rows, UserError for a network in which a slice of a row would be computed otherwise
    than within the row, or whose heads they cannot share. ranks: of the run; None: of a small network, whose
    heads are others."""
    if launch.sequence_parallel == 1:
        return
    if ranks is not None:
        launch.check_sequence_parallel(ranks, network.config.get_text_config().num_attention_heads)
    why = reason_of(network)
    kinds = {str(getattr(module, "rope_type", "")) for module in network.modules()}
    if any(named in kind for kind in kinds for named in ROPE_BY_LENGTH):
        why = "rotary embeddings depend on how long the row is"
    if why is not None:
        raise UserError(
            f"launch.sequence_parallel: model_type={network.config.model_type} cannot share rows: {why}",
            hint="launch.sequence_parallel=1",
        )


def document_arguments(batch: Batch) -> dict[str, Any]:
    """The arguments of a packed model's forward pass that say what its documents are."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "shared_prefix": batch.shared_prefix,
        "sequence_parallel": batch.sequence_parallel,
        "padding": batch.padding,
    }


def decoder_arguments(batch: Batch) -> dict[str, Any]:
    """The arguments of its decoder for the same documents."""
    return packed_arguments(
        batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.shared_prefix,
        batch.sequence_parallel,
    )  # fmt: skip


def batch_arguments(batch: Batch) -> dict[str, Any]:
    """The arguments of `PackedCausalLM.forward` for a batch."""
    trained = {"trained_positions": batch.trained_positions, "targets": batch.targets}
    return {**document_arguments(batch), **trained, "computed_positions": batch.computed_positions}


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
