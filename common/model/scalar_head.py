"""A network that gives one number per document: a decoder with `score = Linear(h, 1, bias=False)` above it.

Takes a `ModelConfig` whose path is a policy (the head is then made) or a reward model (it must be there);
returns what plain transformers calls a sequence classifier with one label. `PackedScalarModel` takes packed
documents and reads the score at positions it is given: it never looks for a pad or an eos. Does not know of
pairs, losses or calibration.

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
from common.model.loading import disable_dropout, load_network
from common.model.one_by_one import decoder_of
from common.model.probes import can_share_prefix, evaluating, isolate_documents, last_layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HEAD = "score"
"""What transformers calls the head of its decoders with a sequence classifier."""

HEAD_WEIGHT = f"{HEAD}.weight"
LM_HEADS = ("lm_head.weight", "lm_head.bias", "embed_out.weight")

REWARD_MODEL = HeadSpec("reward model", "AutoModelForSequenceClassification", "SEQ_CLS", left_out=())
NEW_REWARD_MODEL = replace(REWARD_MODEL, fields={"num_labels": 1}, made_new=(HEAD_WEIGHT,), left_out=LM_HEADS)


def load_scalar_model(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    device: torch.device,
    max_length: int | None = None,
) -> PreTrainedModel:
    """The decoder of the policy that `model` names under a new head, in training mode, without dropout.

    With adapters it is a PeftModel around it, which trains the head as well. Otherwise as
    `loading.load_model`. UserError also for an architecture without a sequence classifier.
    """

    def prepare(network: PreTrainedModel) -> None:
        begin(network, seed)

    return load_network(
        model, tokenizer, NEW_REWARD_MODEL, prepare, seed=seed, device=device, max_length=max_length
    )


def load_reward_model(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    device: torch.device,
    max_length: int | None = None,
) -> PreTrainedModel:
    """The reward model in the folder `model.path`, its head included; otherwise as `load_scalar_model`.

    UserError for a head that is missing (transformers would make one up), that is empty, all zeros or not
    finite, or that has several labels.
    """

    def prepare(network: PreTrainedModel) -> None:
        _check_head(network, str(model.path))
        _check(network)

    return load_network(
        model, tokenizer, REWARD_MODEL, prepare, seed=seed, device=device, max_length=max_length
    )


def begin(network: PreTrainedModel, seed: int) -> None:
    """Give it a new head, turn off its dropout, and settle how its documents are kept apart."""
    begin_head(_head_of(network), seed)
    _check(network)


@torch.no_grad()
def begin_head(head: nn.Linear, seed: int) -> None:
    """Draw the head's weight [1, h] from N(0, 1 / (h + 1)), which gives scores a variance of about 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
    head.weight.copy_(drawn)


def head_weights(network: nn.Module) -> list[nn.Parameter]:
    """The weights [1, h] of a network's head; with adapters that which is trained, and that it began as."""
    head = cast(nn.Module, getattr(unwrapped(network), HEAD))
    return list(head.parameters())


def _head_of(network: PreTrainedModel) -> nn.Linear:
    head = getattr(network, HEAD, None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UserError(
            f"model_type={network.config.model_type} has no linear head without bias named {HEAD}",
            hint="choose a decoder such as Llama, Qwen 3, Mistral",
        )
    return head


def _check_head(network: PreTrainedModel, path: str) -> None:
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
            f"model.path={path} is no reward model: its head {HEAD_WEIGHT} {fault}",
            hint="name the export/ folder of a reward step",
        )


def _check(network: PreTrainedModel) -> None:
    disable_dropout(network)
    with evaluating(network):
        isolate_documents(network)


class ScalarHead(nn.Linear):
    """A head whose product is computed in fp32, whatever the dtype of its weight.

    Under ZeRO-3 a module's weight is whole only while the module is called, so the conversion has to happen
    here. Made from the model's own nn.Linear by changing its class: same parameters, names and hooks.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., h] to fp32 [..., 1]."""
        return F.linear(hidden.float(), self.weight.float())


class PackedScalarModel(nn.Module):
    """A sequence classifier with one label (also one wrapped by peft) that takes packed documents."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        head = cast(nn.Module, getattr(self.base(), HEAD))
        for part in head.modules():  # peft keeps the original beside the one that is trained
            if type(part) is nn.Linear:
                part.__class__ = ScalarHead
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
        score_positions: torch.Tensor,
        shared_prefix: tuple[int, ...] = (),
    ) -> torch.Tensor:
        """fp32 [S], the scores read at score_positions (int64 [S], indices into N). Shapes as in `Batch`."""
        arguments = packed_arguments(input_ids, position_ids, cu_seqlens, max_seqlen, shared_prefix)
        with self.last_layer.only(score_positions):
            hidden = decoder_of(self.base())(**arguments).last_hidden_state
        selected = hidden[0].index_select(0, score_positions)
        return cast(torch.Tensor, getattr(self.base(), HEAD)(selected))[:, 0]

    def scores(self, documents: Sequence[torch.Tensor]) -> torch.Tensor:
        """fp32 [D], the score at the last token of each of D documents (int64 [T]), in one packed pass."""
        lengths = torch.tensor([len(document) for document in documents])
        ends = lengths.cumsum(0).to(documents[0].device)
        boundaries = F.pad(ends, (1, 0)).to(torch.int32)
        ids = torch.cat(list(documents))[None]
        positions = positions_within(boundaries, ids.shape[1])
        scores: Any = self(ids, positions, boundaries, int(lengths.max()), ends - 1)
        return cast(torch.Tensor, scores)
