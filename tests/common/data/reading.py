"""Rows of a source with a ledger of its own for bad rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from common.config import OnBadRow, SourceConfig
from common.data.ledger import BadRows, SourceLedger
from common.data.sources import rows_of
from common.data.types import RawExample


def read_source(
    source: SourceConfig,
    *,
    on_bad_row: OnBadRow = OnBadRow.error,
    max_bad_rows: int = 100,
    report: Callable[[str], None] = print,
    seed: int = 0,
) -> Iterator[RawExample]:
    """The rows of a source in order; with `max_rows` a sample drawn by `seed`, still in order.

    Raises UserError when the source is missing, empty or unreadable, and for bad rows as
    `on_bad_row` says.
    """
    bad_rows = BadRows(on_bad_row, max_bad_rows, report)
    return rows_of(source, partial(bad_rows.add, SourceLedger("s", source.path)), seed=seed)
