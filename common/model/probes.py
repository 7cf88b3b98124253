"""What a model does with packed documents, found by running a few tokens through it or its miniature.

Takes a loaded transformers model; settles how its documents are kept apart, and tells whether prefixes can be
shared, whether the last layer can be computed at some positions only, and whether the head's product is the
logits. A model that none of it fits is refused; a slower way is a notice. Leaves mode, weights and random
state as they were. What a config tells without a forward pass is in `architecture`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from common.errors import UserError
from common.model import attention
from common.model.adapters import unwrapped
from common.model.architecture import why_not_packed
from common.model.attention import packed_arguments, positions_within
from common.model.fused_loss import scores_in_head
from common.model.last_layer import WHOLE_LAYER, LastLayer
from common.model.miniature import differ, miniature_of, some_tokens
from common.model.one_by_one import decoder_of, reason_of, run_one_by_one
from common.notices import notice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("rlhf.models")


@torch.no_grad()
def check_packed(model: nn.Module) -> None:
    """Run a few tokens and settle how the model's documents are kept apart; see `isolate_documents`.

    Also finds logits that are changed after the projection by what no config says. Raises UserError. Costs
    some forward passes of a miniature; leaves mode, weights and random state as they were.
    """
    with evaluating(unwrapped(model)):
        isolate_documents(unwrapped(model))
        _check_head(unwrapped(model))


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


@torch.no_grad()
def can_share_prefix(model: PreTrainedModel) -> bool:
    """Whether a document may begin in one before it (`attention.SharedPrefix`): a model must hand its
    attention what it is called with. Asked of a miniature by running a few tokens.

    model: a transformers model with packed attention, without peft's wrapper.
    """
    if reason_of(model):
        return False
    small = miniature_of(model)
    with evaluating(small):
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


def last_layer_of(model: PreTrainedModel) -> LastLayer:
    """The model's last layer, told to compute everything where a few tokens show that it must.

    model: a transformers model with packed attention, without peft's wrapper; its mode is left as it was.
    """
    last = LastLayer(model)
    if last.works and not _last_layer_can_be_partial(miniature_of(model)):
        notice(
            "the last layer is computed at all positions",
            f"the feed-forward networks of model_type={model.config.model_type} cannot be run at some",
            WHOLE_LAYER,
        )
        last.give_up()
    elif not last.found and reason_of(model) is None:
        notice(
            "the last layer is computed at all positions",
            f"the feed-forward network of model_type={model.config.model_type} is not found",
            WHOLE_LAYER,
        )
    return last


@torch.no_grad()
def _last_layer_can_be_partial(small: PreTrainedModel) -> bool:
    last, training = LastLayer(small), small.training
    small.eval()
    try:
        ids, rows = some_tokens(small, 12), [2, 3, 5, 11]
        whole = _run_decoder(small, ids, [0, 6, 12])
        with last.only(torch.tensor(rows, device=ids.device)):
            part = _run_decoder(small, ids, [0, 6, 12])
        return not differ(whole[rows], part[rows], small.dtype)
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False  # called with something else than hidden states, or returns more
    finally:
        last.give_up()
        small.train(training)


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

    base: in evaluation mode, without peft's wrapper, loaded with packed attention or its own.
    """
    kind = base.config.model_type
    reason = why_not_packed(type(base), base.config)
    if reason is None:
        try:
            reason = _crossing(miniature_of(base))
        except attention.Unsupported as error:
            reason = error.what
        except attention.NoBoundaries:
            reason = "layers that are not told where documents begin"
        except (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
            reason = f"a pass over packed documents that fails ({type(error).__name__}: {error})"
    if reason is None:
        return
    if base.config._attn_implementation == attention.NAME:
        base.set_attn_implementation(attention.plain_name(base))
    run_one_by_one(base, reason)
    fault = _crossing(miniature_of(base))
    if fault is not None:
        raise attention.Unsupported(kind, fault)
    notice("documents run one by one, not packed", f"model_type={kind} has {reason}", "exact, and slower")


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


def _check_head(model: PreTrainedModel) -> None:
    """Where the head's product is not the model's logits, the model makes its logits itself from now on."""
    if not scores_in_head(model):
        return
    small = miniature_of(model)
    ids = some_tokens(small, 4)
    hidden = _run_decoder(small, ids, [0, 4])
    projected = small.get_output_embeddings()(hidden.to(small.dtype)).float()
    own = cast(Any, small)(**_arguments(ids, [0, 4])).logits[0].float()
    if own.shape != projected.shape or differ(projected, own, small.dtype):
        model._makes_own_logits = True  # type: ignore[assignment]
        log.info("model_type=%s changes its logits after the projection", model.config.model_type)
