"""The outcomes of a row: it is bad, unused or dropped, or it gives records.

Any module of this folder raises or returns them. `ledger.py` counts them and decides about bad rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from common.data.types import Place

Record = TypeVar("Record")

LONGEST_ROW = 64 * 2**20
"""Longest row: bytes in a file, or characters where text is read. A longer one is a bad row and is not held
in memory."""
TOO_LONG = f"longer than {LONGEST_ROW // 2**20} MiB"


class RowError(ValueError):
    """One row cannot be used; the text says why. `BadRows` decides what happens."""


class RowUnused(Exception):
    """A row that gives no pair, through no fault of its own; the text says why."""


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that is not used. `faulty`: the row is to blame, so `data.on_bad_row` decides."""

    reason: str
    place: Place
    faulty: bool = False


@dataclass(frozen=True, slots=True)
class RowRecords(Generic[Record]):
    """The records of a row, at least one.

    split: why the row was split into a document for each trained turn; empty for one document. untrained: a
    reason for each turn that the row asks to train and that is not trained.
    """

    records: tuple[Record, ...]
    split: str = ""
    untrained: tuple[str, ...] = ()
