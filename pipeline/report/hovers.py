"""What a reader is shown who holds the pointer over a chart: the values of all its lines at one step.

Lays out columns side by side, each with a step and the values that were logged at it; the page shows a
column's values while the pointer is in it, without a script. Values are those that were logged, never means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

COLUMNS = 30
"""Columns of a chart; of more steps each column has one that was logged."""
ROWS = 12
"""Lines whose values a box has room for."""
ROW_HEIGHT, LETTER_WIDTH, PADDING = 12, 5.6, 6


class Logged(Protocol):
    """A line of a chart."""

    name: str
    colour: int
    mark: str
    series: list[tuple[int, float]]


class Axis(Protocol):
    """Steps to coordinates."""

    @property
    def begin(self) -> float: ...

    @property
    def end(self) -> float: ...

    def __call__(self, value: float) -> float: ...


@dataclass(frozen=True)
class Hover:
    """One column. x: of its step; left, width: of the column; box_*: of the box with the values."""

    x: float
    left: float
    width: float
    title: str
    rows: list[tuple[int, str]]  # colour, text
    box_x: float
    box_width: float
    box_height: float


def hovers(lines: Sequence[Logged], x: Axis, x_name: str, text: Callable[[float], str]) -> list[Hover]:
    """The columns of a chart, from left to right. text: how a value is written."""
    values = [(line, dict(line.series)) for line in lines]
    steps = _chosen([known for _, known in values], x)
    places = [x(step) for step in steps]
    edges = [x.begin, *((a + b) / 2 for a, b in zip(places, places[1:], strict=False)), x.end]
    return [
        _hover(
            f"{x_name} {step:,}",
            [(line.colour, _row(line, text(known[step]))) for line, known in values if step in known],
            place, (left, right), x,
        )
        for step, place, left, right in zip(steps, places, edges, edges[1:], strict=False)
    ]  # fmt: skip


def _chosen(known: Sequence[Mapping[int, float]], x: Axis) -> list[int]:
    """One step per column: the one at which most lines have a value, the latest of several."""
    size = (x.end - x.begin) / COLUMNS
    columns: dict[int, tuple[int, int]] = {}
    for step in sorted(set().union(*known)):
        column, count = int((x(step) - x.begin) / size), sum(step in values for values in known)
        columns[column] = max(columns.get(column, (0, 0)), (count, step))
    return [step for _, step in columns.values()]


def _row(line: Logged, value: str) -> str:
    return f"{line.mark or line.name} {value}"


def _hover(
    title: str, rows: list[tuple[int, str]], place: float, edges: tuple[float, float], x: Axis
) -> Hover:
    """A column with its box, on the side of the pointer that has room."""
    left, right = edges
    if len(rows) > ROWS:
        rows = [*rows[: ROWS - 1], (-1, f"and {len(rows) - ROWS + 1} more")]
    width = max(len(text) for text in (title, *(text for _, text in rows))) * LETTER_WIDTH + 2 * PADDING
    is_left = place > (x.begin + x.end) / 2
    box_x = place - PADDING - width if is_left else place + PADDING
    return Hover(
        place, round(left, 1), round(right - left, 1), title, rows, round(box_x, 1), round(width, 1),
        (len(rows) + 1) * ROW_HEIGHT + PADDING,
    )  # fmt: skip
