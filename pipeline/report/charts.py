"""Lays out line charts: series of numbers in, coordinates and labels for one inline SVG out.

A chart shows everything that was logged. A few hundred values are drawn one by one, with their moving mean
when there are many; of more, each bucket of steps is drawn as a band from its lowest to its highest value and
a line through the means, so that no spike is lost. What is not a number is a gap, marked below it and counted
in a note. Draws nothing itself: colours and fonts are the page's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median

from pipeline.report import shown
from pipeline.report.estimates import Z
from pipeline.report.files import Series

WIDTH, HEIGHT = 340, 192
LEFT, RIGHT, TOP, BOTTOM = 44, 62, 10, 34
BUCKETS = 240
SMOOTHED_FROM = 60
SCATTER = 0.003
"""Median distance from the moving mean, as a share of the range, from which a line is smoothed."""
DOTS_UP_TO = 40
LABEL_HEIGHT = 12
LOG_RANGE = 1000.0
SMALLEST = 1e-280
"""Below this, logarithms and differences lose themselves in the smallest floats."""

Runs = list[list[tuple[float, float]]]


@dataclass(frozen=True)
class Line:
    """A named series. `style` chooses colour and dashes on the page: 0 is the first colour."""

    name: str
    series: Series
    style: int = 0
    sparse: bool = False  # measured now and then: drawn with a dot at every value
    errors: Mapping[int, float] = field(default_factory=dict)  # standard errors by step
    limits: tuple[float, float] = (-math.inf, math.inf)  # where intervals end at the latest


@dataclass(frozen=True)
class Drawn:
    """One line of a chart, laid out."""

    name: str
    style: int
    path: str  # the line
    faint: str  # every value, behind its moving mean
    band: str  # lowest to highest of each bucket
    dots: list[tuple[float, float]]
    whiskers: list[tuple[float, float, float]]  # x, and between what the value lies with 95 % confidence
    gaps: list[float]  # where values are not numbers
    end: tuple[float, float] | None  # last value
    label: str
    label_y: float


@dataclass(frozen=True)
class Chart:
    """Everything that the template needs to draw one chart and say it in words."""

    title: str
    lines: list[Drawn]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_name: str
    description: str
    notes: list[str]
    table: list[tuple[str, str, str, str, str]]  # name, first, lowest, highest, last
    unit: str = ""


@dataclass(frozen=True)
class Scale:
    """Values to coordinates along one axis."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        # halves keep the difference of two huge values finite
        place = (at / 2 - low / 2) / (high / 2 - low / 2)
        return round(self.begin + place * (self.end - self.begin), 1)


@dataclass
class _Drawing:
    """A line on its way: what was measured, and what is drawn of it."""

    line: Line
    finite: list[tuple[int, float]]
    runs: Runs = field(default_factory=list)
    faint: Runs = field(default_factory=list)
    band: list[list[tuple[float, float, float]]] = field(default_factory=list)


def lay_out(
    title: str, lines: Sequence[Line], *, x_name: str = "step", percent: bool = False, unit: str = ""
) -> Chart | None:
    """A chart of the lines that have values; None when none has a single finite one.

    percent: values are shares; they are drawn, and labelled, in percent.
    """
    if percent:
        lines = [_in_percent(line) for line in lines]
    drawings = [_Drawing(line, [(s, v) for s, v in line.series if _drawable(v)]) for line in lines]
    drawings = [drawing for drawing in drawings if drawing.line.series]
    values = [value for drawing in drawings for _, value in drawing.finite]
    if not values:
        return None
    ends = [end for drawing in drawings for _, *both in _intervals(drawing) for end in both]
    values += ends
    notes = []
    for drawing in drawings:
        notes += _prepare(drawing, x_name)
    steps = [step for drawing in drawings for step, _ in drawing.line.series]
    x = Scale(*_widened(min(steps), max(steps), whole=True), LEFT, WIDTH - RIGHT)
    y, y_ticks = _value_axis(values)
    if y.log:
        notes.append("Logarithmic scale.")
    elif ends:
        notes.append("Bars: 95% intervals.")
    drawn = _spread_labels([_draw(drawing, x, y, percent) for drawing in drawings])
    unit = "%" if percent else unit
    return Chart(
        title,
        drawn,
        _step_ticks(x),
        y_ticks,
        x_name,
        _description(title, drawings, x_name, unit),
        list(dict.fromkeys(notes)),
        [_table_row(drawing, percent) for drawing in drawings],
        unit,
    )


def nice_ticks(low: float, high: float, wanted: int) -> tuple[list[float], float]:
    """Round values that cover low to high in about `wanted` equal distances, and that distance."""
    rough = (high / 2 - low / 2) / wanted * 2
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)], step


def _drawable(value: float) -> bool:
    """Finite, and so small that sums of such values stay finite."""
    return math.isfinite(value) and abs(value) < 1e300


def _in_percent(line: Line) -> Line:
    series = [(step, value * 100) for step, value in line.series]
    errors = {step: error * 100 for step, error in line.errors.items()}
    return replace(line, series=series, errors=errors, limits=(0.0, 100.0))


def _intervals(drawing: _Drawing) -> list[tuple[int, float, float]]:
    """95 % intervals by step, where a standard error was logged."""
    if len(drawing.finite) > DOTS_UP_TO:
        return []
    found = []
    for step, value in drawing.finite:
        half = Z * drawing.line.errors.get(step, 0.0)
        if half > 0 and _drawable(value - half) and _drawable(value + half):
            low, high = drawing.line.limits
            found.append((step, max(value - half, low), min(value + half, high)))
    return found


def _prepare(drawing: _Drawing, x_name: str) -> list[str]:
    """Cut the series at its gaps, thin it or smooth it; returns what must be said about it."""
    line, notes = drawing.line, []
    runs = list(_unbroken(line.series))
    missing = len(line.series) - len(drawing.finite)
    if missing:
        first = next(step for step, value in line.series if not _drawable(value))
        said = "1 value is" if missing == 1 else f"{missing:,} values are"
        notes.append(f"{line.name}: {said} not a finite number, first at {x_name} {first:,}; left out.")
    if len(drawing.finite) > 2 * BUCKETS:
        size = math.ceil(len(drawing.finite) / BUCKETS)
        for run in runs:
            buckets = [run[at : at + size] for at in range(0, len(run), size)]
            drawing.runs.append([(fmean(s for s, _ in b), fmean(v for _, v in b)) for b in buckets])
            drawing.band.append([(b[0][0], min(v for _, v in b), max(v for _, v in b)) for b in buckets])
        notes.append(f"Line: the mean of every {size} values. Band: from their lowest to their highest.")
    elif len(drawing.finite) >= SMOOTHED_FROM and not line.sparse:
        half = max(2, len(drawing.finite) // 40)
        smooth = [_moving_mean(run, half) for run in runs]
        drawing.runs = runs
        if _is_noisy(runs, smooth):
            drawing.faint, drawing.runs = runs, smooth
            notes.append(f"Thin: every value. Thick: the mean of {2 * half + 1}.")
    else:
        drawing.runs = runs
    return notes


def _unbroken(series: Series) -> Iterator[list[tuple[float, float]]]:
    run: list[tuple[float, float]] = []
    for step, value in series:
        if _drawable(value):
            run.append((step, value))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _moving_mean(run: list[tuple[float, float]], half: int) -> list[tuple[float, float]]:
    """Centred; towards the ends over fewer values, as many on either side."""
    smooth = []
    for index, (step, _) in enumerate(run):
        reach = min(half, index, len(run) - 1 - index)
        smooth.append((step, fmean(value for _, value in run[index - reach : index + reach + 1])))
    return smooth


def _is_noisy(runs: Runs, smooth: Runs) -> bool:
    """Whether values scatter about their moving mean; a schedule does not, and is drawn as it is."""
    pairs = zip(itertools.chain(*runs), itertools.chain(*smooth), strict=True)
    values = [value for run in runs for _, value in run]
    scatter = median(abs(raw - mean) for (_, raw), (_, mean) in pairs)
    return scatter > SCATTER * (max(values) - min(values))


def _widened(low: float, high: float, *, whole: bool = False) -> tuple[float, float]:
    """A range with some width, for values that are all the same."""
    if high > low:
        return low, high
    margin = 1.0 if whole else max(abs(low) * 0.1, 1e-9)
    return low - margin, high + margin


def _value_axis(values: Sequence[float]) -> tuple[Scale, list[tuple[float, str]]]:
    """The vertical axis: linear on round numbers, or logarithmic where values span more than 1 to 1000."""
    low, high = _widened(min(values), max(values))
    if low > SMALLEST and high / low > LOG_RANGE:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        scale = Scale(10.0**first, 10.0**last, HEIGHT - BOTTOM, TOP, log=True)
        every = max(1, math.ceil((last - first) / 5))
        marks = [10.0**power for power in range(first, last + 1, every)]
        return scale, [(scale(mark), shown.figure(mark)) for mark in marks]
    if high - low < max(abs(low), abs(high), SMALLEST) * 1e-9:  # all the same but for rounding
        low, high = _widened(low, low)
    marks, step = nice_ticks(low, high, 4)
    scale = Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    return scale, [(scale(mark), shown.tick(mark, step)) for mark in marks]


def _step_ticks(x: Scale) -> list[tuple[float, str]]:
    """The horizontal axis: whole steps only."""
    marks, step = nice_ticks(x.low, x.high, 4)
    step = max(step, 1)
    inside = [m for m in marks if x.low <= m <= x.high and float(m).is_integer()]
    return [(x(mark), shown.tick(mark, step)) for mark in inside]


def _draw(drawing: _Drawing, x: Scale, y: Scale, percent: bool) -> Drawn:
    line, finite = drawing.line, drawing.finite
    last = finite[-1] if finite else None
    end = None if last is None else (x(last[0]), y(last[1]))
    as_dots = line.sparse and len(finite) <= DOTS_UP_TO
    lone = [run[0] for run in drawing.runs if len(run) == 1]
    return Drawn(
        line.name,
        line.style,
        _path(drawing.runs, x, y),
        _path(drawing.faint, x, y),
        "".join(_band(run, x, y) for run in drawing.band if len(run) > 1),
        [(x(step), y(value)) for step, value in (finite if as_dots else lone)],
        [(x(step), y(low), y(high)) for step, low, high in _intervals(drawing)] if not y.log else [],
        [x(step) for step, value in line.series if not _drawable(value)][:BUCKETS],
        end,
        "" if last is None else _label(last[1], percent),
        0.0 if end is None else end[1],
    )


def _label(value: float, percent: bool) -> str:
    return shown.share(value / 100) if percent else shown.figure(value)


def _path(runs: Runs, x: Scale, y: Scale) -> str:
    return "".join("M" + "L".join(f"{x(s):g} {y(v):g}" for s, v in run) for run in runs if len(run) > 1)


def _band(run: list[tuple[float, float, float]], x: Scale, y: Scale) -> str:
    upper = [f"{x(step):g} {y(high):g}" for step, _, high in run]
    lower = [f"{x(step):g} {y(low):g}" for step, low, _ in reversed(run)]
    return "M" + "L".join(upper + lower) + "Z"


def _spread_labels(lines: list[Drawn]) -> list[Drawn]:
    """Move the labels of last values apart where they would lie on each other."""
    ends = sorted((line.label_y, index) for index, line in enumerate(lines) if line.end is not None)
    if not ends:
        return lines
    places: dict[int, float] = {}
    floor = float(TOP)
    for at, index in ends:
        places[index] = max(at, floor)
        floor = places[index] + LABEL_HEIGHT
    excess = max(0.0, floor - LABEL_HEIGHT - (HEIGHT - BOTTOM))
    ceiling = float(HEIGHT - BOTTOM)
    for _, index in reversed(ends):
        if excess:
            places[index] = min(places[index], ceiling)
            ceiling = places[index] - LABEL_HEIGHT
    return [
        replace(line, label_y=round(places.get(index, line.label_y), 1)) for index, line in enumerate(lines)
    ]


def _description(title: str, drawings: Sequence[_Drawing], x_name: str, unit: str) -> str:
    """What a reader who does not see the chart is told."""
    parts = []
    for drawing in drawings:
        if drawing.finite:
            (begin, first), (end, last) = drawing.finite[0], drawing.finite[-1]
            values = [value for _, value in drawing.finite]
            parts.append(
                f"{drawing.line.name}: {shown.figure(first)} at {x_name} {begin:,}, {shown.figure(last)} at "
                f"{x_name} {end:,}, between {shown.figure(min(values))} and {shown.figure(max(values))}"
            )
    return f"{title}{f' in {unit}' if unit else ''}. " + "; ".join(parts) + "."


def _table_row(drawing: _Drawing, percent: bool) -> tuple[str, str, str, str, str]:
    values = [value for _, value in drawing.finite]
    if not values:
        return drawing.line.name, "–", "–", "–", "–"
    first, low, high, last = (_label(v, percent) for v in (values[0], min(values), max(values), values[-1]))
    return drawing.line.name, first, low, high, last
