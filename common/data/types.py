"""The nouns of the data path, in the order a row becomes them.

RawExample -> Conversation -> TokenizedExample -> (row of a batch) -> Batch, for pairs of answers
RawExample -> Preference -> TokenizedPair -> (row of a batch) -> PairBatch, and for prompts alone
RawExample -> Prompt -> TokenizedPrompt. Each hop is one file; nothing goes back. Who decides what:
`prompt_rule.py` decides the loss mask, as spans of text; `chat.py` writes it as labels, shifted once;
`packing.py` decides which documents share a row; `batches.py` decides which rows make a step. Nothing here
reads or writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE = -100
"""Label of a position that is not trained."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row came from, for error messages."""

    file: str
    row: int  # line number for line-based files, row number otherwise; from 1

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class RawExample:
    """One row as read: columns by name, nothing interpreted yet.

    columnar: from a file of columns, where a key that the row does not have reads as null.
    """

    columns: Mapping[str, object]
    source: str  # the source's name in the ledger
    place: Place
    columnar: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `extra` holds what templates may read besides (tool_calls, reasoning_content, name).

    trained: False for an assistant turn that the row leaves out of the loss (`weight: 0`, `train: false`).
    """

    role: str  # system, user, assistant or tool
    content: str
    extra: Mapping[str, object] = field(default_factory=dict)
    trained: bool = True


@dataclass(frozen=True, slots=True)
class TemplateContext:
    """What a chat template is given besides the turns.

    tools: tool definitions, as JSON objects. variables: by name, e.g. enable_thinking; a row's own take
    precedence over `data.chat_template_kwargs`.
    """

    tools: tuple[Mapping[str, object], ...] = ()
    variables: Mapping[str, object] = field(default_factory=dict)


NO_CONTEXT = TemplateContext()


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row understood: turns to be rendered by a chat template, or plain text trained whole."""

    messages: tuple[Message, ...]  # empty for plain text
    text: str | None  # set for plain text only
    source: str
    place: Place
    first_trained: int = 0  # turns before this one are a prompt: assistant turns in it are not trained
    context: TemplateContext = NO_CONTEXT


@dataclass(frozen=True, slots=True)
class Preference:
    """A row understood: a prompt with a chosen and a rejected response."""

    prompt: tuple[Message, ...]  # at least one turn; the last is not an assistant's
    chosen: tuple[Message, ...]  # what follows the prompt; its last turn is an assistant's
    rejected: tuple[Message, ...]
    source: str
    place: Place
    margin: float = 0.0  # by how much chosen should be better, in units of reward
    context: TemplateContext = NO_CONTEXT


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row understood: turns that end where an assistant's answer would begin."""

    messages: tuple[Message, ...]  # at least one turn; the last is not an assistant's
    as_given: str | list[dict[str, object]]  # what the row called its prompt, for reward functions
    columns: Mapping[str, object]  # the row's other columns
    source: str
    place: Place
    context: TemplateContext = NO_CONTEXT


Held = TypeVar("Held", bound="Batch | PairBatch | SharedReads")
Row = TypeVar("Row", bound=Conversation | Preference | Prompt)


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One document with its loss mask. The labels are shifted in `chat.py`, and nowhere else.

    input_ids: int32 [T]. labels: int32 [T]; labels[t] is the token that position t must predict,
    input_ids[t + 1], or IGNORE where the loss mask leaves that token out. labels[T - 1] is IGNORE.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    source: str

    @property
    def trained(self) -> int:
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """Two documents that begin with the same prompt.

    Each ends with the terminator of its last turn: the last token, which is where a reward is read.
    Labels are those of the response (all turns that follow the prompt), through the terminator.
    """

    chosen: TokenizedExample
    rejected: TokenizedExample
    margin: float


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt for the policy, as tokens.

    input_ids: int32 [T], rendered up to where the assistant's words begin. prompt: as the row had it, a
    string or a list of messages; columns: the row's other columns. Reward functions are called with both.
    """

    input_ids: np.ndarray
    prompt: str | list[dict[str, object]]
    columns: Mapping[str, object]
    source: str


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: all its documents laid end to end in one sequence.

    input_ids: int64 [1, N]. position_ids: int64 [1, N], from 0 in each document.
    cu_seqlens: int32 [D + 1], where documents begin and the last ends (0 first, N last).
    trained_positions: int64 [M], indices into N. targets: int64 [M], the token each must predict.
    source_of_target: int64 [M], index of the source each target belongs to (for evaluation).
    max_seqlen: longest document. row_ids: dataset indices of its documents, for logs.
    shared_prefix: for each document, the length of its prefix that is stored only in its owner: the nearest
    document before it that shares nothing (0). Empty: no document shares a prefix.
    computed_positions: int64 [C], the different ones among trained_positions, ascending (None: not listed).
    padding: how many of the N positions, the last ones, are no document's.
    sequence_parallel: ranks that have the sequence, an equal slice each. N and all tensors are this rank's
    slice's; but cu_seqlens, max_seqlen, shared_prefix and row_ids tell of the whole. first: the position of
    the sequence at which the slice begins. own_targets: int64 [M], on the host, which of the sequence's
    targets are the slice's (None: all).
    A batch may have M = 0: ranks that run out of rows still take part in the collectives.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    trained_positions: torch.Tensor
    targets: torch.Tensor
    source_of_target: torch.Tensor
    max_seqlen: int
    row_ids: tuple[int, ...]
    shared_prefix: tuple[int, ...] = ()
    computed_positions: torch.Tensor | None = None
    padding: int = 0
    sequence_parallel: int = 1
    first: int = 0
    own_targets: np.ndarray | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return _moved(self, lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in memory from which a GPU copies by itself."""
        return _moved(self, lambda x: x.pin_memory())


@dataclass(frozen=True, slots=True)
class SharedReads:
    """What the ranks of a sequence group read off their slices and need of each other's.

    own: int64, places of what this rank needs among what all have read, end to end, each rank `length` values
    (padded).
    """

    own: torch.Tensor
    length: int


@dataclass(frozen=True, slots=True)
class PairBatch:
    """One micro-batch of P pairs; document 2p is the chosen side of pair p, document 2p + 1 the rejected one.

    documents: all 2P documents in one sequence of N positions (its row_ids are pair indices).
    score_positions: int64 [2P], index into N of each document's terminator. document_of_target: int64 [M],
    the document that each target of `documents` belongs to. margins: fp32 [P]. source_ids: int64 [P].
    lengths: int64 [2P], tokens of each document. num_tokens: their sum; shared prefixes count on both sides.
    target_reads, score_reads: where ranks share the sequence (None: they do not), `documents`, and what is
    read at the targets and score_positions in it, are of this rank's slice; the P pairs, and all else, are
    those of the sequence that are this rank's to judge.
    A batch may have P = 0: ranks that run out of rows still take part in the collectives.
    """

    documents: Batch
    score_positions: torch.Tensor
    document_of_target: torch.Tensor
    margins: torch.Tensor
    source_ids: torch.Tensor
    lengths: torch.Tensor
    pair_ids: tuple[int, ...]
    target_reads: SharedReads | None = None
    score_reads: SharedReads | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def to(self, device: torch.device) -> PairBatch:
        """The same batch with its tensors on `device`."""
        return _moved(self, lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> PairBatch:
        """The same batch in memory from which a GPU copies by itself."""
        return _moved(self, lambda x: x.pin_memory())


def _moved(holder: Held, move: Callable[[torch.Tensor], torch.Tensor]) -> Held:
    """The same with its tensors moved, and those of what it holds."""
    import torch

    found = {each.name: getattr(holder, each.name) for each in fields(holder)}
    moved: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            moved[name] = move(value)
        elif isinstance(value, Batch | SharedReads):
            moved[name] = _moved(value, move)
    return replace(holder, **moved)


def prefix_owners_of(shared_prefix: Sequence[int]) -> tuple[int, ...]:
    """For each document, the index of the one that stores its prefix; its own index where it shares none."""
    return tuple(accumulate((0 if shared else at for at, shared in enumerate(shared_prefix)), max))
