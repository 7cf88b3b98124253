"""What a model does with packed documents, found by running a few tokens through it or its miniature.

Takes a loaded transformers model. `isolate_documents` settles how its documents are kept apart, and refuses a
model that cannot; `find_shortcuts` finds what its packed passes may leave out, and notices say what they may
not. Both leave mode, weights and random state as they were. What a config tells without a forward pass is in
`architecture`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from common.errors import UserError
from common.model import attention
from common.model.adapters import unwrapped
from common.model.architecture import why_not_packed
from common.model.attention import packed_arguments, positions_within
from common.model.fused_loss import ScoringHead
from common.model.last_layer import WHOLE_LAYER, computed_at, feed_forward_of, runs_layers_its_own_way
from common.model.miniature import differ, miniature_of, some_tokens
from common.model.one_by_one import decoder_of, reason_of, run_one_by_one
from common.notices import notice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_CHANGES = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
}
"""Config fields by which a model changes what its projection gives, and the value that changes nothing."""


@dataclass(frozen=True)
class Shortcuts:
    """What the packed passes of a model leave out without changing a number; by default nothing."""

    fused_loss: bool = False  # logits: the output projection makes them chunk by chunk, and the loss of each
    partial_last_layer: bool = False  # the last feed-forward network where no hidden state is read
    shared_prefix: bool = False  # a prefix that documents have in common, but once


@torch.no_grad()
def find_shortcuts(model: nn.Module) -> Shortcuts:
    """Find a model's shortcuts by running a few tokens; a notice says which of them it lacks, and why.

    model: as `loading.load_model` returns it, perhaps in peft's wrapper.
    """
    base = unwrapped(model)
    small = miniature_of(base)
    with evaluating(small):
        return Shortcuts(_fuses_loss(base, small), _runs_at_rows(base, small), _shares_prefix(base, small))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode; what fails in the model's own code is an error of the user's choice of model."""
    training = model.training
    model.eval()
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise attention.Unsupported(
            model.config.model_type, f"a forward pass that fails ({type(error).__name__}: {error})"
        ) from error
    finally:
        model.train(training)


def _fuses_loss(model: PreTrainedModel, small: PreTrainedModel) -> bool:
    """Whether the logits are a plain product with the weight of the output projection, and nothing more."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    config = model.config.get_text_config(decoder=True)
    changes = any(getattr(config, name, None) not in (None, same) for name, same in LOGIT_CHANGES.items())
    # a subclass (an adapter, a quantized layer) does more than multiply by its weight
    is_plain = type(head) in (nn.Linear, ScoringHead)
    if is_plain and not changes:
        ids = some_tokens(small, 4)
        hidden = _run_decoder(small, ids, [0, 4])
        projected = cast(nn.Module, small.get_output_embeddings())(hidden.to(small.dtype)).float()
        own = cast(Any, small)(**_arguments(ids, [0, 4])).logits[0].float()
        changes = own.shape != projected.shape or differ(projected, own, small.dtype)
    if changes:
        notice(
            "logits of all trained tokens are held at once, not chunk by chunk",
            f"model_type={model.config.model_type} changes them after the projection",
            "4 bytes x tokens x vocabulary, several times",
        )
    return is_plain and not changes


def _runs_at_rows(model: PreTrainedModel, small: PreTrainedModel) -> bool:
    """Whether the last feed-forward network can be computed at some positions only."""
    kind, why = model.config.model_type, None
    if feed_forward_of(model) is None:
        why = None if reason_of(model) else f"the feed-forward network of model_type={kind} is not found"
    elif runs_layers_its_own_way(model):
        why = None  # said where documents run one by one, and by `architecture.say_what_differs`
    elif _is_exact_at_rows(small):
        return True
    else:
        why = f"the feed-forward networks of model_type={kind} cannot be run at some"
    if why is not None:
        notice("the last layer is computed at all positions", why, WHOLE_LAYER)
    return False


def _is_exact_at_rows(small: PreTrainedModel) -> bool:
    ids, rows = some_tokens(small, 12), [2, 3, 5, 11]
    try:
        whole = _run_decoder(small, ids, [0, 6, 12])
        with computed_at(cast(nn.Module, feed_forward_of(small)), torch.tensor(rows, device=ids.device), 12):
            part = _run_decoder(small, ids, [0, 6, 12])
        return not differ(whole[rows], part[rows], small.dtype)
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False  # called with something else than hidden states, or returns more


def _shares_prefix(model: PreTrainedModel, small: PreTrainedModel) -> bool:
    """Whether a document may begin in one before it (`attention.SharedPrefix`): a model must hand its
    attention what it is called with."""
    if reason_of(model):
        return False
    ids = some_tokens(small, 12)
    ids[:, 6:9] = ids[:, :3]  # the second document is 3 tokens of the first and 3 of its own
    apart = _run_decoder(small, ids, [0, 6, 12])
    together = _run_decoder(small, torch.cat([ids[:, :6], ids[:, 9:]], 1), [0, 6, 9], (0, 3))
    shares = not differ(apart[9:], together[6:], small.dtype)
    if not shares:
        notice(
            "a prompt is computed again for each of its responses",
            f"model_type={model.config.model_type} does not tell its attention which tokens they share",
        )
    return shares


def _run_decoder(
    model: PreTrainedModel, ids: torch.Tensor, cu_seqlens: list[int], shared_prefix: tuple[int, ...] = ()
) -> torch.Tensor:
    """fp32 [N, h], hidden states of documents which begin at `cu_seqlens`."""
    arguments = _arguments(ids, cu_seqlens, shared_prefix)
    return decoder_of(model)(**arguments).last_hidden_state[0].float()


def _arguments(
    ids: torch.Tensor, cu_seqlens: list[int], shared_prefix: tuple[int, ...] = ()
) -> dict[str, Any]:
    boundaries = torch.tensor(cu_seqlens, dtype=torch.int32, device=ids.device)
    positions = positions_within(boundaries, ids.shape[1])
    for start, end, shared in zip(cu_seqlens, cu_seqlens[1:], shared_prefix, strict=False):
        positions[:, start:end] += shared
    return packed_arguments(ids, positions, boundaries, int(boundaries.diff().max()), shared_prefix)


@torch.no_grad()
def isolate_documents(base: PreTrainedModel) -> None:
    """Settle how documents are kept apart: packed where that is exact, else one by one, else UserError.

    base: without peft's wrapper, loaded with packed attention or its own.
    """
    with evaluating(base):
        reason = why_not_packed(type(base), base.config) or _why_packing_fails(base)
        if reason is None:
            return
        if base.config._attn_implementation == attention.NAME:
            base.set_attn_implementation(attention.plain_name(base))
        run_one_by_one(base, reason)
        kind, fault = base.config.model_type, _crossing(miniature_of(base))
        if fault is not None:
            raise attention.Unsupported(kind, fault)
        notice("documents run one by one, not packed", f"model_type={kind} has {reason}", "exact, and slower")


def _why_packing_fails(base: PreTrainedModel) -> str | None:
    try:
        return _crossing(miniature_of(base))
    except attention.Unsupported as error:
        return error.what
    except attention.NoBoundaries:
        return "layers that are not told where documents begin"
    except (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        return f"a pass over packed documents that fails ({type(error).__name__}: {error})"


def _crossing(base: PreTrainedModel) -> str | None:
    """What joins tokens that must not know of each other; None: nothing.

    Document B after A, after another A, and alone under transformers' own attention: always the same.
    """
    ids, bounds = some_tokens(base, 11), [0, 6, 11]
    other = ids.clone()
    other[:, :6] = ids[:, :6].flip(1)
    later = ids.clone()
    later[:, 7:] = ids[:, :4]
    b = _run_decoder(base, ids, bounds)[6:]
    if differ(b, _run_decoder(base, other, bounds)[6:], base.dtype):
        return "state that crosses documents"
    if differ(b[:1], _run_decoder(base, later, bounds)[6:7], base.dtype):
        return "attention to later tokens"
    with attention.plain_attention(base):
        alone = decoder_of(base)(input_ids=ids[:, 6:], use_cache=False).last_hidden_state[0].float()
    return "an attention with arguments of its own" if differ(b, alone, base.dtype) else None
