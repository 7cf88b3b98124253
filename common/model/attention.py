"""One attention for packed sequences, registered with transformers under the name "packed".

It takes what a transformers attention module gives (query [1, H, N, d], key and value [1, G, N, d] with
G key-value heads, G dividing H) and, through the model's forward arguments, where documents begin and
end; it returns [1, N, H, d]. Each document attends causally to itself and to nothing else; what it has in
common with the beginning of a document before it may stand there only (`SharedPrefix`). The backend follows
the device: a loop over documents on the CPU; on CUDA `varlen_attn` (flash attention) in half precision, and
`efficient_attention` for fp32, dropout and heads that flash attention does not take. Soft-capped scores and
attention sinks, which no kernel knows, are computed in the loop in plain steps, with memory that grows with
the square of a document's length.

It knows nothing of padding, masks or caches; transformers' own `generate` runs inside `plain_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

from common.data.types import prefix_owners_of
from common.errors import UserError
from common.model.efficient_attention import efficient_attention
from common.model.flash_attention import flash_applies, flash_attention
from common.model.sequence import own_heads, row_of_slices, slice_of_row
from common.notices import notice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

NAME, DECODING = "packed", "decoding"
"""The names under which transformers knows the attention here, and the one in `common/decoding/slots.py`."""

CPU_FP32_LENGTH = 256
"""On the CPU, half-precision documents up to this length are computed in fp32: the kernel for bf16 converts
block by block, and took 1.4 to 2.3 times as long on short documents."""

# What a model may ask of its attention that changes the result and that no backend here computes.
UNSUPPORTED_ARGUMENTS = {
    "position_bias": "a position bias",
    "indices": "sparse attention",
}


class SharedPrefix:
    """Prefix sharing: documents whose prefix is stored once, in an earlier document of the row.

    tokens: for each document, the length of its shared prefix (0: none). cu_seqlens: int32 [D + 1], bounds
    of the stored tokens. length: of them all. max_seqlen: most of a document. owners: for each document, the
    one that stores its prefix.
    """

    def __init__(self, tokens: Sequence[int], cu_seqlens: torch.Tensor, length: int, max_seqlen: int) -> None:
        self.tokens = tuple(tokens)
        self.owners = prefix_owners_of(self.tokens)
        self._cu_seqlens, self._length, self._max_seqlen = cu_seqlens, length, max_seqlen

    @cached_property
    def keys(self) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
        """The keys of all documents, end to end: positions int64 [K], boundaries int32 [D + 1], how many a
        document has at most, and int64 [N], where among them each stored token is its own document's.

        Flash attention aligns the last query with the last key, so every query sees the keys in front. Made
        once per batch, for all layers, on the device: the host waits for nothing.
        """
        device, count = self._cu_seqlens.device, self._length + sum(self.tokens)
        numbers = torch.tensor([self.tokens, self.owners]).to(device, non_blocking=True)
        shared, owners = numbers.unbind()
        starts = self._cu_seqlens.long()
        ends = F.pad((starts.diff() + shared).cumsum(0), (1, 0))
        document = torch.arange(len(self.tokens), device=device)
        document = document.repeat_interleave(ends.diff(), output_size=count)
        within = torch.arange(count, device=device) - ends[document]
        own = starts[document] + within - shared[document]
        positions = torch.where(own < starts[document], starts[owners[document]] + within, own)
        before = shared.cumsum(0).repeat_interleave(starts.diff(), output_size=self._length)
        stored = torch.arange(self._length, device=device) + before
        return positions, ends.int(), self._max_seqlen + max(self.tokens), stored


def packed_arguments(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    shared_prefix: tuple[int, ...] = (),
    sequence_parallel: int = 1,
) -> dict[str, Any]:
    """What a transformers model wants to hear about a packed sequence. Shapes as in `Batch`."""
    shared: dict[str, Any] = {}
    if sequence_parallel > 1:
        shared["sequence_parallel"] = sequence_parallel
    if any(shared_prefix):
        length = input_ids.shape[1] * sequence_parallel
        shared["shared_prefix"] = SharedPrefix(shared_prefix, cu_seqlens, length, max_seqlen)
        if cu_seqlens.is_cuda:
            shared["shared_prefix"].keys  # noqa: B018  (here, and not in a layer that is compiled)
    return {
        **shared,
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": None,
        "use_cache": False,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
    }


def positions_within(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [1, N]: the position of each token in its own document, from 0."""
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff().long())
    return (torch.arange(length, device=cu_seqlens.device) - starts)[None]


def register() -> None:
    """Make `attn_implementation="packed"` known to transformers. Calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    shared_prefix: SharedPrefix | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sequence_parallel: int = 1,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of one flat sequence.

    cu_seq_lens_q: int32 [D + 1], document boundaries (0 first, N last); max_length_q: longest document;
    sliding_window: each token sees itself and the `sliding_window - 1` before it. shared_prefix: the
    prefixes that documents share (None: none). softcap: scores become softcap · tanh(score / softcap).
    s_aux: [H], a sink of each head: a score that takes part in the softmax and has no value.
    sequence_parallel: ranks that have the sequence; query, key and value are this rank's slice of it. Returns
    ([1, N, H, d], None). Raises UserError for what no backend computes, ValueError when called without
    boundaries.
    """
    refuse_unsupported(module, attention_mask, is_causal, kwargs)
    if cu_seq_lens_q is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise NoBoundaries(
            "packed attention needs one flat sequence, cu_seq_lens_q and no cache; "
            "generate inside `with plain_attention(model)`"
        )
    if sequence_parallel > 1:
        query, key, value = (row_of_slices(x, sequence_parallel) for x in (query, key, value))
        s_aux = None if s_aux is None else own_heads(s_aux, sequence_parallel)
    scores = Scores(scaling, dropout, softcap, s_aux)
    if (in_one_call := _in_one_call(query, value, scores)) is not None:
        longest = max_length_q or int(cu_seq_lens_q.diff().max())
        out = in_one_call(query, key, value, cu_seq_lens_q, longest, scores, sliding_window, shared_prefix)
    else:
        if query.is_cuda:
            _say_one_by_one(getattr(getattr(module, "config", None), "model_type", "?"))
        lengths = _lengths_of(cu_seq_lens_q)
        out = _by_document(query, key, value, lengths, scores, sliding_window, shared_prefix)
    return slice_of_row(out, sequence_parallel) if sequence_parallel > 1 else out, None


class Scores(NamedTuple):
    """How queries and keys become weights; see `packed_attention`."""

    scaling: float | None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether SDPA and flash attention compute it."""
        return self.softcap is None and self.sinks is None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """[1, H, n, d]: the last n of the tokens that have keys; seen: bool [n, length], None: causal."""
        if self.is_plain:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, dropout_p=self.dropout, is_causal=seen is None,
                scale=self.scaling, enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        heads = q.shape[1]
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        scores = self.capped((q @ k.transpose(2, 3)).float() * self.scale_for(q))
        if seen is None:
            seen = _seen_by_own(k.shape[2], k.shape[2], k.shape[2] - q.shape[2], q.device)
        sinks = None if self.sinks is None else self.sinks.view(heads, 1, 1)
        weights = softmax_with_sinks(scores.masked_fill(~seen, float("-inf")), sinks)
        return F.dropout(weights, self.dropout).to(v.dtype) @ v

    def scale_for(self, q: torch.Tensor) -> float:
        """What products of queries and keys are multiplied by."""
        return float(q.shape[-1] ** -0.5) if self.scaling is None else self.scaling

    def capped(self, scores: torch.Tensor) -> torch.Tensor:
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap


def softmax_with_sinks(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the last dimension; sinks [..., 1] (None: none) get a share that no key is given."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def refuse_unsupported(
    module: torch.nn.Module, mask: torch.Tensor | None, is_causal: bool | None, extra: dict[str, Any]
) -> None:
    asked = [what for name, what in UNSUPPORTED_ARGUMENTS.items() if extra.get(name) is not None]
    asked += ["a mask of its own"] * (mask is not None)
    if is_causal is False or getattr(module, "is_causal", True) is False:
        asked.append("attention to later tokens")
    if asked:
        raise Unsupported(getattr(getattr(module, "config", None), "model_type", "?"), asked[0])


class Unsupported(UserError):
    """An architecture that cannot be trained; what: the reason, to come behind "has"."""

    def __init__(self, model_type: str, what: str) -> None:
        super().__init__(
            f"model_type={model_type} has {what}, which cannot be trained here",
            hint="choose a decoder whose tokens see only those before them, e.g. Llama, Qwen 3, Gemma 3",
        )
        self.what = what


class NoBoundaries(ValueError):
    """Packed attention was called without knowing where documents begin."""


def _in_one_call(
    query: torch.Tensor, value: torch.Tensor, scores: Scores
) -> Callable[..., torch.Tensor] | None:
    """What computes all documents of these tensors at once; None: nothing does."""
    if not query.is_cuda or not scores.is_plain:
        return None
    return _varlen if flash_applies(query, value, scores.dropout) else _efficient


@cache
def _say_one_by_one(kind: str) -> None:
    """A notice, from the passes in which `probes` tries a model before it is trained."""
    notice(
        "attention goes document by document, not over a whole row at once",
        f"no kernel knows the soft-capped scores or attention sinks of model_type={kind}",
        "slower the shorter documents are, and memory grows with the square of the longest",
    )


_LENGTHS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _lengths_of(bounds: torch.Tensor) -> list[int]:
    """Of the documents. A device is asked once for all layers of a pass: they are given one tensor."""
    if bounds not in _LENGTHS:
        _LENGTHS[bounds] = bounds.diff().tolist()
    lengths: list[int] = _LENGTHS[bounds]
    return lengths


def _by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scores: Scores,
    window: int | None,
    shared_prefix: SharedPrefix | None,
) -> torch.Tensor:
    """Attention once per document. `split`, not slices: the backward of a slice fills a whole sequence."""
    queries, keys, values = (tensor.split(lengths, 2) for tensor in (query, key, value))
    outs = []
    for index, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        if not lengths[index]:
            continue
        shared = 0 if shared_prefix is None else shared_prefix.tokens[index]
        if shared_prefix is not None and shared:
            owner = shared_prefix.owners[index]
            k = torch.cat([keys[owner][:, :, :shared], k], 2)
            v = torch.cat([values[owner][:, :, :shared], v], 2)
        seen = k.shape[2]
        if q.device.type == "cpu" and seen <= CPU_FP32_LENGTH:
            q, k, v = q.float(), k.float(), v.float()
        banded = shared > 0 or (window is not None and seen > window)
        mask = _seen_by_own(seen, window or seen, shared, q.device) if banded else None
        out = scores.attend(q, k, v, mask)
        outs.append(out.transpose(1, 2).to(query.dtype))
    return torch.cat(outs, 1)


@lru_cache(maxsize=128)
def _seen_by_own(length: int, window: int, shared: int, device: torch.device) -> torch.Tensor:
    """bool [length - shared, length]: what a document's own tokens see. The same for all layers of a pass."""
    position = torch.arange(length, device=device)
    distance = position[shared:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scores: Scores,
    window: int | None,
    shared_prefix: SharedPrefix | None,
) -> torch.Tensor:
    key_boundaries, key_longest = boundaries, longest
    if shared_prefix is not None:
        order, key_boundaries, key_longest, _ = shared_prefix.keys
        key, value = key.index_select(2, order), value.index_select(2, order)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, d]
    out = flash_attention(q, k, v, boundaries, key_boundaries, longest, key_longest, scores.scaling, window)
    return out[None]


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scores: Scores,
    window: int | None,
    shared_prefix: SharedPrefix | None,
) -> torch.Tensor:
    """A document that shares its prefix has its queries, too; what they find is left out."""
    width, scale = value.shape[-1], scores.scale_for(query)
    q, k, v = (F.pad(x[0].transpose(0, 1), (0, -x.shape[-1] % 8)) for x in (query, key, value))
    stored = None
    if shared_prefix is not None:
        order, boundaries, longest, stored = shared_prefix.keys
        q, k, v = (x.index_select(0, order) for x in (q, k, v))
    narrow = 0 if window is None or window > longest else window
    out, *_ = efficient_attention(q, k, v, boundaries, longest, scale, narrow, scores.dropout)
    out = out[..., :width]
    return (out if stored is None else out.index_select(0, stored))[None]


def plain_name(model: PreTrainedModel) -> str:
    """The attention that transformers gives the model when nobody asks for one."""
    return "sdpa" if model._supports_sdpa else "eager"


def plain_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Switch the model to transformers' own attention, with masks and caches, while the block runs."""
    if model.config._attn_implementation not in (NAME, DECODING):  # one by one: it is its own already
        return nullcontext()
    return switched_to(model, plain_name(model))


@contextmanager
def switched_to(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switch the model to the attention that transformers knows under `name` while the block runs."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
