"""What becomes of a row beside a record: it is bad, unused or dropped, or it was made into records.

Raised or returned where it is found, by any module of this folder. `ledger.py` counts them, and decides about
bad rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from common.data.types import Place

Record = TypeVar("Record")

LONGEST_ROW = 64 * 2**20
"""Bytes of a row in a file, or characters where text is read: more is no row, and is not held in memory."""
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

    split: why each of its trained turns stands in a document of its own; empty when it is one document.
    untrained: of each turn that is not trained though the row asks for it, why not.
    """

    records: tuple[Record, ...]
    split: str = ""
    untrained: tuple[str, ...] = ()
