"""Preference -> TokenizedPair: both sides of a pair as tokens, each through its terminator.

`chat.py` makes a document of each side and says which tokens the response trains; a side that would need
several documents cannot be compared. What the template writes behind the last terminator is cut, so that a
side's last token is where its reward is read. Pairs that cannot be compared are dropped with a reason. The
two prompts are usually the same tokens but need not be. Does not read files and does not make batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.config import Truncation
from common.data import chat
from common.data.columns import says_nothing
from common.data.outcomes import Drop, RowRecords
from common.data.types import IGNORE, Conversation, Place, Preference, TokenizedExample, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAME = "chosen and rejected are the same"
NO_TERMINATOR = "no terminator"
CUT = "cut by truncation"
SPLIT = "several turns to compare, and "


def tokenize_pairs(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerFast
) -> list[TokenizedPair | Drop]:
    """One result per preference, in order; not yet cut to a length.

    Raises UserError when the chat template has no one-token terminator, or as `chat.tokenize` does.
    """
    terminators = chat.find_terminators(tokenizer)
    results: list[TokenizedPair | Drop | None] = [_drop_empty(preference) for preference in preferences]
    usable = [index for index, result in enumerate(results) if result is None]
    sides = [side for index in usable for side in _sides(preferences[index])]
    tokenized = chat.tokenize(sides, tokenizer)
    for index, chosen, rejected in zip(usable, tokenized[0::2], tokenized[1::2], strict=True):
        results[index] = _pair(preferences[index], chosen, rejected, terminators)
    return [result for result in results if result is not None]


def fit_pair(
    pair: TokenizedPair, place: Place, max_length: int, truncation: Truncation, bos_id: int | None = None
) -> TokenizedPair | Drop:
    """The pair with both sides in at most `max_length` tokens, or why it is dropped.

    `left` removes as many tokens from the beginning of both sides (behind the BOS, when they begin with
    `bos_id`) as the longer one needs, but never any of a response. `right` would remove the terminator,
    so it drops what is too long.
    """
    excess = max(len(side.input_ids) for side in (pair.chosen, pair.rejected)) - max_length
    if excess <= 0:
        return pair
    if truncation is Truncation.drop:
        return Drop(f"longer than data.max_length={max_length}", place)
    if truncation is Truncation.right:
        return Drop(CUT, place)
    chosen, rejected = (_without_beginning(side, excess, bos_id) for side in (pair.chosen, pair.rejected))
    if chosen is None or rejected is None:
        return Drop(CUT, place)
    return TokenizedPair(chosen, rejected, pair.margin)


def prompt_length(side: TokenizedExample) -> int:
    """Tokens before the response: its first token is predicted by the last of these."""
    return int(np.argmax(side.labels != IGNORE)) + 1


def _drop_empty(preference: Preference) -> Drop | None:
    chosen, rejected = (says_nothing(side[-1]) for side in (preference.chosen, preference.rejected))
    if chosen and rejected:
        return Drop("both sides are empty", preference.place)
    if chosen or rejected:
        return Drop("chosen is empty" if chosen else "rejected is empty", preference.place)
    return None


def _sides(preference: Preference) -> tuple[Conversation, Conversation]:
    prompt, source, place = preference.prompt, preference.source, preference.place
    chosen, rejected = (
        Conversation(prompt + side, None, source, place, len(prompt), preference.context)
        for side in (preference.chosen, preference.rejected)
    )
    return chosen, rejected


def _pair(
    preference: Preference,
    chosen: RowRecords[TokenizedExample] | Drop,
    rejected: RowRecords[TokenizedExample] | Drop,
    terminators: Sequence[int],
) -> TokenizedPair | Drop:
    sides = []
    for name, made in (("chosen", chosen), ("rejected", rejected)):
        side = made if isinstance(made, Drop) else _comparable(made, preference.place)
        if isinstance(side, Drop):
            return Drop(f"{name}: {side.reason}", side.place, side.faulty)
        sides.append(side)
    ends = [_through_terminator(side, terminators) for side in sides]
    if ends[0] is None or ends[1] is None:
        return Drop(NO_TERMINATOR, preference.place)
    if np.array_equal(ends[0].input_ids, ends[1].input_ids):
        return Drop(SAME, preference.place)
    return TokenizedPair(ends[0], ends[1], preference.margin)


def _comparable(side: RowRecords[TokenizedExample], place: Place) -> TokenizedExample | Drop:
    """The side as one document that trains all of the response."""
    if side.untrained:
        return Drop(side.untrained[0], place)
    return Drop(SPLIT + side.split, place) if side.split else side.records[0]


def _through_terminator(side: TokenizedExample, terminators: Sequence[int]) -> TokenizedExample | None:
    """The side through the last token it trains; None when that is no terminator."""
    end = int(np.flatnonzero(side.labels != IGNORE)[-1]) + 2  # behind the token that label stands for
    if side.input_ids[end - 1] not in terminators:
        return None
    return TokenizedExample(side.input_ids[:end], side.labels[:end], side.source)


def _without_beginning(side: TokenizedExample, excess: int, bos_id: int | None) -> TokenizedExample | None:
    """Without `excess` tokens of its prompt; None when nothing of the prompt would be left."""
    kept = 1 if bos_id is not None and side.input_ids[0] == bos_id else 0
    if kept + excess >= prompt_length(side):
        return None
    removed = slice(kept, kept + excess)
    return TokenizedExample(np.delete(side.input_ids, removed), np.delete(side.labels, removed), side.source)
