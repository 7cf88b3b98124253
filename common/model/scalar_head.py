"""A network that gives one number per document: a decoder with `score = Linear(h, 1, bias=False)` above it.

It is what plain transformers calls a sequence classifier with one label. `loading.load_model` makes it with a
policy's decoder (`NEW_REWARD_MODEL`), or loads one that is there (`REWARD_MODEL`). `PackedScalarModel` takes
packed documents and reads the score at positions it is given: it never looks for a pad or an eos. Does not
know of pairs, losses or calibration.

The reward model is that of InstructGPT (arXiv 2203.02155); how its head begins, N(0, 1 / (h + 1)), is from
"The N+ implementation details of RLHF with PPO" (arXiv 2403.17031).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from common.config import ModelConfig
from common.errors import UserError
from common.model.adapters import unwrapped
from common.model.architecture import HeadSpec
from common.model.attention import packed_arguments, positions_within
from common.model.loading import disable_dropout
from common.model.one_by_one import decoder_of
from common.model.packed import PackedModel
from common.model.probes import Shortcuts
from common.stage import Role

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "score"
"""What transformers calls the head of its decoders with a sequence classifier."""

HEAD_WEIGHT = f"{HEAD}.weight"
LM_HEADS = ("lm_head.weight", "lm_head.bias", "embed_out.weight")


@torch.no_grad()
def init_head(head: nn.Linear, seed: int) -> None:
    """Draw the head's weight [1, h] from N(0, 1 / (h + 1)), which gives scores a variance of about 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
    head.weight.copy_(drawn)


def head_weights(network: nn.Module) -> list[nn.Parameter]:
    """The weights [1, h] of a network's head; with adapters that which is trained, and that it began as."""
    return list(_head(unwrapped(network)).parameters())


def _head(network: nn.Module) -> nn.Module:
    return cast(nn.Module, getattr(network, HEAD))


def _head_of(network: PreTrainedModel) -> nn.Linear:
    head = getattr(network, HEAD, None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UserError(
            f"model_type={network.config.model_type} has no linear head without bias named {HEAD}",
            hint="choose a decoder such as Llama, Qwen 3, Mistral",
        )
    return head


def _check_head(network: PreTrainedModel, model: ModelConfig, seed: int) -> None:
    """UserError for a head that is empty, all zeros or not finite, or that has several labels."""
    disable_dropout(network)
    weight = _head_of(network).weight.detach()
    fault = None
    if weight.shape[0] != 1:
        fault = f"has {weight.shape[0]} labels, where a reward model has one"
    elif not torch.isfinite(weight).all():
        fault = "is not finite"
    elif not weight.any():
        fault = "is all zeros: it was never trained"
    if fault:
        raise UserError(
            f"model.path={model.path} is no reward model: its head {HEAD_WEIGHT} {fault}",
            hint="name a trained sequence classifier with one label: of a reward step, or a published one",
        )


def _make_head(network: PreTrainedModel, model: ModelConfig, seed: int) -> None:
    disable_dropout(network)
    init_head(_head_of(network), seed)


REWARD_MODEL = HeadSpec(
    "reward model", "AutoModelForSequenceClassification", "SEQ_CLS", left_out=(), settle=_check_head
)
"""A reward model with its own head, which transformers would make up where it is missing."""

NEW_REWARD_MODEL = replace(
    REWARD_MODEL, fields={"num_labels": 1}, made_new=(HEAD_WEIGHT,), left_out=LM_HEADS, settle=_make_head
)
"""The decoder of a policy under a new head, which is trained as well where there are adapters."""


class ScalarHead(nn.Linear):
    """A head whose product is computed in fp32, whatever the dtype of its weight."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., h] to fp32 [..., 1]."""
        return F.linear(hidden.float(), self.weight.float())


class PackedScalarModel(PackedModel):
    """A sequence classifier with one label that takes packed documents."""

    role = Role.reward_model

    def __init__(self, model: nn.Module, shortcuts: Shortcuts) -> None:
        super().__init__(model, shortcuts)
        self.replace_linears(_head(self.base()), ScalarHead)  # with adapters two, see `head_weights`

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        score_positions: torch.Tensor,
        shared_prefix: tuple[int, ...] = (),
        computed_positions: torch.Tensor | None = None,
        sequence_parallel: int = 1,
        padding: int = 0,
    ) -> torch.Tensor:
        """fp32 [S], the scores read at score_positions (int64 [S], indices into N). Shapes as in `Batch`.

        computed_positions: the different ones among score_positions, ascending (None: found here).
        """
        self.routed = input_ids.shape[1] - padding
        arguments = packed_arguments(
            input_ids, position_ids, cu_seqlens, max_seqlen, shared_prefix, sequence_parallel
        )
        with self.read_at(score_positions, input_ids.shape[1], computed_positions):
            hidden = decoder_of(self.base())(**arguments).last_hidden_state
        selected = hidden[0].index_select(0, score_positions)
        return cast(torch.Tensor, _head(self.base())(selected))[:, 0]

    def answers(self, documents: Sequence[torch.Tensor]) -> torch.Tensor:
        """fp32 [D], the score at the last token of each of D documents (int64 [T]), in one packed pass."""
        lengths = torch.tensor([len(document) for document in documents])
        ends = lengths.cumsum(0).to(documents[0].device)
        boundaries = F.pad(ends, (1, 0)).to(torch.int32)
        ids = torch.cat(list(documents))[None]
        positions = positions_within(boundaries, ids.shape[1])
        scores: Any = self(ids, positions, boundaries, int(lengths.max()), ends - 1)
        return cast(torch.Tensor, scores)
