"""A model's numbers: one per row, whose mean is the metric; estimates of them, and a table.

Pure: numbers in, estimates and text out. Intervals are those of the report (`common/estimates.py`):
Wilson's of shares, Student's of means and of the changes of the same rows, those of correlations on the scale
of Fisher's z.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.estimates import Estimate, of_change, of_mean, on_z_scale, within_0_and_1

Values = Mapping[str, Mapping[str, float]]
"""Of each metric, by its name: the rows that have a part in it, by their key, and that part."""


@dataclass(frozen=True)
class Measured:
    """What a model was measured by. values: what its metrics are means of, which need not be what a row is by
    itself. rows: that, as it is kept."""

    values: Values
    rows: Values


SHARES = ("accuracy", "stop_rate", "win_rate", "calibration_error")
"""In the last part of the name of what lies between 0 and 1."""
NO_SHARES = ("length", "loss", "margin")
"""Metrics that are no shares even where all of their values are 0 or 1, by the last part of their names."""


def of_ratio(parts: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """A ratio of sums, Σ parts / Σ counts, as a number per row whose mean it is.

    Each row has its influence: R + (part − R count) / mean count. A mean over tokens is such a ratio, where
    rows are drawn and not tokens. parts, counts: by row; not all counts are 0.
    """
    ratio = sum(parts.values()) / sum(counts.values())
    mean = sum(counts.values()) / len(counts)
    return {key: ratio + (part - ratio * counts[key]) / mean for key, part in parts.items()}


def estimates(values: Values) -> dict[str, Estimate]:
    """The mean of each metric over its rows, with an interval; metrics without rows are left out."""
    found = {
        name: of_mean(_groups(rows), may_be_share=name.rpartition("/")[2] not in NO_SHARES)
        for name, rows in values.items()
    }
    return {name: bounded(name, estimate) for name, estimate in found.items() if estimate is not None}


def bounded(name: str, estimate: Estimate) -> Estimate:
    """The estimate with an interval in which the metric can lie."""
    last = name.rpartition("/")[2]
    if last.endswith("correlation"):
        return on_z_scale(estimate, -1, 1)
    return within_0_and_1(estimate) if any(word in last for word in SHARES) else estimate


def changes(values: Values, against: Values) -> dict[str, Estimate]:
    """By how much each metric of `values` is above that of `against`, on the rows that both have."""
    found = {
        name: of_change(_groups(against[name]), _groups(rows))
        for name, rows in values.items()
        if name in against
    }
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def _groups(rows: Mapping[str, float]) -> dict[str, list[float]]:
    return {key: [value] for key, value in rows.items()}


def plain(found: Mapping[str, Estimate]) -> dict[str, dict[str, float | int | None]]:
    """For JSON."""
    return {
        name: {"value": each.value, "low": each.low, "high": each.high, "count": each.count}
        for name, each in found.items()
    }


def table(heads: Sequence[str], columns: Sequence[Mapping[str, Estimate]]) -> list[str]:
    """Lines of text: a metric each, with its estimate in every column."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [["", *heads]]
    rows += [[name, *(_shown(column.get(name)) for column in columns)] for name in names]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    value = _number(estimate.value)
    if not estimate.has_interval:
        return value
    return f"{value} ({_number(estimate.low)} to {_number(estimate.high)})"


def _number(value: float) -> str:
    return f"{value:z.4f}" if abs(value) < 100 else f"{value:,.1f}"


def by_row(values: Values, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The parts of every row, in the order of `keys`."""
    return [{"row": key, **{name: rows[key] for name, rows in values.items() if key in rows}} for key in keys]
