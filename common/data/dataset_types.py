"""The three types of data sets: demonstrations, preferences, prompts alone.

`dataset.py` has one way from sources to files for all; a `DatasetType` lists the functions that are called on
the way, in their order. Keeps no state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

from common.data import chat, formats, pairs, preferences, prompts
from common.data.stored import PairDataset, PromptDataset, StoredRecords, TokenizedDataset
from common.data.types import RawExample

Opened = TypeVar("Opened", bound=StoredRecords)


@dataclass(frozen=True)
class DatasetType(Generic[Opened]):
    """How rows of one type become records on disk."""

    name: str
    recognise: Callable[..., Any]
    """the format of a source, from the (renamed) columns of its first row; UserError if none fits"""
    read: Callable[[RawExample, Any, Mapping[str, str]], Any]
    """what a row says, one thing or a list of them; RowError, or RowUnused with the reason"""
    tokenize: Callable[[Sequence[Any], Any], Sequence[Any]]
    """one result per row, in order: a record, `RowRecords` where it may be several, or `Drop`"""
    fit: Callable[..., Any]
    """the record within `data.max_length`, itself when it is short enough; or `Drop`"""
    opened: type[Opened]
    """how the records are stored, and read again"""
    room: int = 0
    """tokens of `data.max_length` that a record leaves free"""
    system: str | None = None
    """system message of the prompts that have none"""


DEMONSTRATIONS = DatasetType(
    "demonstrations", formats.recognise, formats.to_conversation, chat.tokenize, chat.fit, TokenizedDataset
)
PREFERENCES = DatasetType(
    "preferences",
    preferences.recognise,
    preferences.to_preferences,
    pairs.tokenize_pairs,
    pairs.fit_pair,
    PairDataset,
)
PROMPTS = DatasetType(
    "prompts",
    prompts.recognise,
    prompts.to_prompt,
    prompts.tokenize_prompts,
    prompts.fit_prompt,
    PromptDataset,
)


def prompts_with_room(room: int, system: str | None = None) -> DatasetType[PromptDataset]:
    """Prompts that leave `room` tokens of `data.max_length` for the response.

    system: the message that those without a system message get.
    """
    kind = replace(PROMPTS, fit=partial(prompts.fit_prompt, room=room), room=room)
    return kind if system is None else replace(kind, read=partial(_read_with, system), system=system)


def _read_with(system: str, raw: RawExample, format: Any, columns_map: Mapping[str, str]) -> Any:
    return prompts.with_system(prompts.to_prompt(raw, format, columns_map), system)
