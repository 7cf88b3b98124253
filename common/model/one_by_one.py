"""Documents of a packed sequence, for a model whose layers would let them see each other.

Convolutions, recurrences and attentions of a model's own know nothing of document boundaries. Such a model
gets its documents as sequences of their own, side by side and padded behind: what comes after a token changes
nothing for it, so each document has the hidden states that it has alone. It is slower than packed attention,
by the padding and by what the kernels cost. Takes a transformers model; what packed callers see stays the
same. Does not know why a model needs it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORTEST = 0.75
"""A document is padded to the longest beside it, of which it has at least this share."""

PACKED_ARGUMENTS = (
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "attention_mask",
    "use_cache", "shared_prefix",
)  # fmt: skip
"""What `attention.packed_arguments` says about documents that lie end to end."""


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part that turns token ids into hidden states; the model's heads are not in it."""
    found = model.get_decoder()
    if found is model or not hasattr(found, "config"):  # a head that happens to be called decoder
        found = model.base_model if model.base_model is not model else cast(Any, model).model
    return cast("PreTrainedModel", found)


def reason_of(model: nn.Module) -> str | None:
    """Why a model's documents run one by one; None where they are packed."""
    return cast("str | None", getattr(model, "_one_by_one", None))


def run_one_by_one(model: PreTrainedModel, reason: str) -> None:
    """From now on run documents as sequences of their own wherever `model` is called with boundaries.

    Its attention has to be transformers' own. Calls without boundaries are left alone.
    """
    decoder = decoder_of(model)
    documents = _DocumentBounds(decoder)
    model._one_by_one = reason  # type: ignore[assignment]
    _replace_forward(decoder, documents.hidden_states)
    _replace_forward(model, documents.called_by(model.forward))


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Under the signature that it had, which generate() and peft look at."""

    @functools.wraps(module.forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    module.forward = run


class _DocumentBounds:
    """A decoder's own forward pass, made for each group of documents of about the same length."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        self._decoder, self._forward = decoder, decoder.forward
        self._boundaries: torch.Tensor | None = None

    def called_by(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of the model around the decoder, which need not hand on what it is called with."""
        picks = "logits_to_keep" in inspect.signature(forward).parameters

        def run(*args: Any, **kwargs: Any) -> Any:
            boundaries = kwargs.get("cu_seq_lens_q")
            if boundaries is None:
                return forward(*args, **kwargs)
            others = {name: value for name, value in kwargs.items() if name not in PACKED_ARGUMENTS}
            kept = None if picks else others.pop("logits_to_keep", None)
            self._boundaries = boundaries
            try:
                output = forward(*args, **others)
            finally:
                self._boundaries = None
            if kept is not None:
                output.logits = output.logits.index_select(1, kept)
            return output

        return run

    def hidden_states(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward pass over a flat sequence [1, N]; only last_hidden_state is returned."""
        boundaries = kwargs.get("cu_seq_lens_q", self._boundaries)
        if boundaries is None:
            return self._forward(*args, **kwargs)
        ids = args[0] if args else kwargs["input_ids"]
        starts, lengths = boundaries[:-1].tolist(), boundaries.diff().tolist()
        parts, places = [], []
        # under ZeRO-3 each module's call is a collective
        is_partitioned = any(hasattr(parameter, "ds_id") for parameter in self._decoder.parameters())
        for group in side_by_side(lengths, in_one_pass=is_partitioned):
            index, is_padding = _places([starts[i] for i in group], [lengths[i] for i in group])
            output = self._forward(input_ids=ids[0, index.to(ids.device)], use_cache=False)
            parts.append(output[0].flatten(0, 1)[(~is_padding).flatten().nonzero()[:, 0].to(ids.device)])
            places.append(index[~is_padding])
        order = torch.cat(places).argsort().to(ids.device)
        return type(output)(last_hidden_state=torch.cat(parts).index_select(0, order)[None])


def side_by_side(lengths: Sequence[int], *, in_one_pass: bool = False) -> list[list[int]]:
    """Indices of documents, in groups of about the same length; the longest first, the empty ones left out.

    in_one_pass: all together, where passes are collectives and ranks have different documents.
    """
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for index in order:
        if groups and (in_one_pass or lengths[index] >= SHORTEST * lengths[groups[-1][0]]):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _places(starts: Sequence[int], lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [D, T], places in the flat sequence, and bool [D, T], which of them repeat a last token."""
    begin, length = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
    within = torch.arange(max(lengths))[None]
    return begin + within.clamp(max=length - 1), within >= length
