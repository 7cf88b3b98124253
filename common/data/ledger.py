"""What became of each row: counted per source, with the places of the first few.

Filled while rows are read and tokenized (`reader.py`, `writer.py`), stored beside them, and printed as a
table. Also decides about bad rows, as `data.on_bad_row` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.config import OnBadRow
from common.data.types import Place
from common.errors import UserError

COUNTED = {
    "dropped": "dropped from",
    "untrained": "not trained in",
    "split": "split in",
    "control": "control tokens in contents of",
}
"""What is counted by reason, and how it is said."""

ALIASES = {"functions": "tools", "system_prompt": "system"}
"""What other programs call columns that are read here."""

PLACES_KEPT = 5
"""Places of dropped rows named in the ledger, per reason; of bad rows, per source."""


@dataclass
class Dropped:
    """Rows (or turns) that one reason applies to; the first few by place."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: Place) -> None:
        self.count += 1
        if len(self.places) < PLACES_KEPT:
            self.places.append(str(place))


@dataclass
class SourceLedger:
    """What became of the rows of one source. Tokens are counted over kept rows, held out or not.

    For preferences, kept and dropped count pairs, and trained tokens count both responses. Prompts have no
    trained tokens. further_pairs: pairs beyond the first of their row; further_documents: documents beyond
    the first of a row that was split; read + further = kept + dropped + bad. split: rows that were split into
    a document for each trained turn, by reason. untrained: turns that the row asks to train and that are not
    trained, by reason. control: rows whose contents hold a control token, by token and by its treatment.
    """

    name: str
    path: str
    format: str = ""
    rows_read: int = 0
    rows_kept: int = 0
    rows_held_out: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    bad_rows: int = 0
    bad_examples: list[str] = field(default_factory=list)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    further_pairs: int = 0
    unused_columns: list[str] = field(default_factory=list)
    further_documents: int = 0
    split: dict[str, Dropped] = field(default_factory=dict)
    untrained: dict[str, Dropped] = field(default_factory=dict)
    control: dict[str, Dropped] = field(default_factory=dict)

    def not_used(self, columns: Sequence[str]) -> None:
        self.unused_columns += [name for name in columns if name not in self.unused_columns]

    def drop(self, reason: str, place: Place) -> None:
        self.dropped.setdefault(reason, Dropped()).add(place)

    def note(self, counted: dict[str, Dropped], reasons: Iterable[str], place: Place) -> None:
        """Note what applies to a row. counted: `untrained`, `split` or `control`."""
        for reason in reasons:
            counted.setdefault(reason, Dropped()).add(place)


@dataclass
class Ledger:
    """The account of a whole data set, one entry per source."""

    sources: list[SourceLedger] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        entries = []
        for entry in value["sources"]:
            counted = {
                name: {reason: Dropped(**drop) for reason, drop in entry[name].items()} for name in COUNTED
            }
            entries.append(SourceLedger(**{**entry, **counted}))
        return cls(entries)

    def lines(self) -> list[str]:
        """A plain-text table, and below it why rows were dropped."""
        head = ("source", "format", "read", "kept", "held out", "tokens", "trained", "cut", "bad", "dropped")
        table = [head, *(_cells(entry) for entry in self.sources)]
        widths = [max(len(row[column]) for row in table) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        for entry in self.sources:
            if entry.further_pairs:
                lines.append(
                    f"{entry.name}: a row can give several pairs; read counts rows, the others pairs"
                )
            if entry.further_documents:
                lines.append(
                    f"{entry.name}: a row can give several documents; read counts rows, the others documents"
                )
            if entry.unused_columns:
                ours = ", ".join(
                    f"{ALIASES[name]}: {name}" for name in entry.unused_columns if name in ALIASES
                )
                way_out = f"; to read them: data.sources.columns={{{ours}}}" if ours else ""
                named = ", ".join(entry.unused_columns)
                lines.append(f"columns of {entry.name} that are not used: {named}{way_out}")
        return lines + self.reasons()

    def reasons(self) -> list[str]:
        """Why rows were left out, a line each."""
        lines = []
        for entry in self.sources:
            lines += [f"skipped from {entry.name}: {example}" for example in entry.bad_examples]
            for name, verb in COUNTED.items():
                for reason, drop in getattr(entry, name).items():
                    more = ", ..." if drop.count > len(drop.places) else ""
                    places = ", ".join(drop.places)
                    lines.append(f"{verb} {entry.name}: {drop.count} × {reason} ({places}{more})")
        return lines


def _cells(entry: SourceLedger) -> tuple[str, ...]:
    numbers = (entry.rows_read, entry.rows_kept, entry.rows_held_out, entry.tokens, entry.trained_tokens)
    dropped = sum(drop.count for drop in entry.dropped.values())
    return (
        entry.name,
        entry.format,
        *(f"{n:,}" for n in (*numbers, entry.truncated, entry.bad_rows, dropped)),
    )


@dataclass
class BadRows:
    """What to do about bad rows.

    With `error` the first one ends the program with its place and reason; with `skip` each is reported and
    counted in the ledger, until there are more than `limit` of them.
    """

    on_bad_row: OnBadRow = OnBadRow.error
    limit: int = 100
    report: Callable[[str], None] = print
    count: int = 0

    def add(self, entry: SourceLedger, place: Place, reason: str) -> None:
        """Count a bad row; raises UserError when there are too many."""
        if self.on_bad_row is OnBadRow.error:
            raise UserError(
                f"{place}: {reason}", hint="correct the row, or skip bad rows with data.on_bad_row=skip"
            )
        self.count += 1
        entry.bad_rows += 1
        if len(entry.bad_examples) < PLACES_KEPT:
            entry.bad_examples.append(f"{place}: {reason}")
        self.report(f"skipped {place}: {reason}")
        if self.count > self.limit:
            raise UserError(
                f"{place}: {reason} (more than data.max_bad_rows={self.limit} bad rows)",
                hint="correct the data, or raise data.max_bad_rows",
            )
