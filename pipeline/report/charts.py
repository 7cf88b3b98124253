"""Lays out line charts: series of numbers in, coordinates and labels for one inline SVG out.

A chart shows everything that was logged. A few hundred values are drawn one by one, with their moving mean
when there are many; of more, each bucket of steps is drawn as a band from its lowest to its highest value and
a line through the means, so that no spike is lost. What is not a number is a gap, marked below it and counted
in a note. Draws nothing itself: colours and fonts are the page's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from common.evidence import Z
from pipeline.report import shown
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

Run = Sequence[tuple[float, float]]
Runs = list[Run]


@dataclass(frozen=True)
class Line:
    """A named series. `style` chooses colour and dashes on the page: 0 is the first colour."""

    name: str
    series: Series
    style: int = 0
    sparse: bool = False  # measured now and then: drawn with a dot at every value
    errors: Mapping[int, float] = field(default_factory=dict)  # standard errors by step


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


class Curve:
    """A line of a chart: what was measured, and what the notes say of it. `place` adds what is drawn."""

    path: str  # the line
    faint: str  # every value, behind its moving mean
    band: str  # lowest to highest of each bucket
    dots: list[tuple[float, float]]
    whiskers: list[tuple[float, float, float]]  # x, and the ends of the 95 % interval
    gaps: list[float]  # where values are not numbers
    end: tuple[float, float] | None  # last value
    label: str
    label_y: float

    def __init__(self, line: Line, x_name: str, *, percent: bool) -> None:
        factor, limits = (100, (0.0, 100.0)) if percent else (1, (-math.inf, math.inf))
        self.name, self.style = line.name, line.style
        self.series = [(step, value * factor) for step, value in line.series]
        self.finite = [(step, value) for step, value in self.series if _drawable(value)]
        self.values = [value for _, value in self.finite]
        self.notes: list[str] = []
        self._lost = [step for step, value in self.series if not _drawable(value)]
        self._runs, self._all, self._bands = _unbroken(self.series), Runs(), Runs()
        few = len(self.finite) <= DOTS_UP_TO
        self._dotted = line.sparse and few
        halves = [(s, v, Z * factor * line.errors.get(s, 0.0)) for s, v in self.finite] if few else []
        self.intervals = [
            (step, max(value - half, limits[0]), min(value + half, limits[1]))
            for step, value, half in halves
            if half > 0 and _drawable(value - half) and _drawable(value + half)
        ]
        if self._lost:
            said = "1 value is" if len(self._lost) == 1 else f"{len(self._lost):,} values are"
            where = f"first at {x_name} {self._lost[0]:,}"
            self.notes.append(f"{line.name}: {said} not a finite number, {where}; left out.")
        if len(self.finite) > 2 * BUCKETS:
            self._thin(math.ceil(len(self.finite) / BUCKETS))
        elif len(self.finite) >= SMOOTHED_FROM and not line.sparse:
            self._smooth(max(2, len(self.finite) // 40))

    def _thin(self, size: int) -> None:
        """The mean and the ends of every `size` values."""
        cut = [[run[at : at + size] for at in range(0, len(run), size)] for run in self._runs]
        self._runs = [[(fmean(s for s, _ in b), fmean(v for _, v in b)) for b in run] for run in cut]
        for run in (run for run in cut if len(run) > 1):
            upper = [(bucket[0][0], max(v for _, v in bucket)) for bucket in run]
            self._bands.append(upper + [(bucket[0][0], min(v for _, v in bucket)) for bucket in run[::-1]])
        self.notes.append(f"Line: the mean of every {size} values. Band: from their lowest to their highest.")

    def _smooth(self, half: int) -> None:
        """The moving mean before every value, where values scatter about it."""
        smooth = [_moving_mean(run, half) for run in self._runs]
        if _is_noisy(self._runs, smooth):
            self._all, self._runs = self._runs, smooth
            self.notes.append(f"Thin: every value. Thick: the mean of {2 * half + 1}.")

    def place(self, x: Scale, y: Scale, text: Callable[[float], str]) -> None:
        """Lay it out on the axes. text: how a value is written."""
        last = self.finite[-1] if self.finite else None
        dots = self.finite if self._dotted else [run[0] for run in self._runs if len(run) == 1]
        self.path, self.faint = _path(self._runs, x, y), _path(self._all, x, y)
        self.band = "".join(_path([band], x, y) + "Z" for band in self._bands)
        self.dots = [(x(s), y(v)) for s, v in dots]
        self.whiskers = [] if y.log else [(x(step), y(low), y(high)) for step, low, high in self.intervals]
        self.gaps = [x(step) for step in self._lost][:BUCKETS]
        self.end = None if last is None else (x(last[0]), y(last[1]))
        self.label = "" if last is None else text(last[1])
        self.label_y = 0.0 if self.end is None else self.end[1]

    def in_words(self, x_name: str) -> str:
        """What a reader who does not see the chart is told."""
        (begin, first), (end, last) = self.finite[0], self.finite[-1]
        low, high = shown.figure(min(self.values)), shown.figure(max(self.values))
        return (
            f"{self.name}: {shown.figure(first)} at {x_name} {begin:,}, {shown.figure(last)} at "
            f"{x_name} {end:,}, between {low} and {high}"
        )

    def row(self, text: Callable[[float], str]) -> list[str]:
        """For the table: name, first, lowest, highest, last."""
        known = self.values
        return (
            [self.name, *map(text, (known[0], min(known), max(known), known[-1]))]
            if known
            else [self.name, *"––––"]
        )


@dataclass(frozen=True)
class Chart:
    """Everything that the template needs to draw one chart and say it in words."""

    title: str
    lines: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_name: str
    description: str
    notes: list[str]
    table: list[list[str]]  # name, first, lowest, highest, last
    unit: str = ""


def lay_out(
    title: str, lines: Sequence[Line], *, x_name: str = "step", percent: bool = False, unit: str = ""
) -> Chart | None:
    """A chart of the lines that have values; None when none has a single finite one.

    percent: values are shares; they are drawn, and labelled, in percent.
    """
    text = (lambda value: shown.share(value / 100)) if percent else shown.figure
    unit = "%" if percent else unit
    made = [Curve(line, x_name, percent=percent) for line in lines if line.series]
    values = [value for curve in made for value in curve.values]
    if not values:
        return None
    ends = [end for curve in made for _, *both in curve.intervals for end in both]
    steps = [step for curve in made for step, _ in curve.series]
    x = Scale(*_widened(min(steps), max(steps), whole=True), LEFT, WIDTH - RIGHT)
    y, y_ticks = _value_axis(values + ends)
    for curve in made:
        curve.place(x, y, text)
    _spread_labels([curve for curve in made if curve.end is not None])
    notes = [note for curve in made for note in curve.notes]
    notes += ["Logarithmic scale."] if y.log else ["Bars: 95% intervals."] if ends else []
    said = "; ".join(curve.in_words(x_name) for curve in made if curve.finite)
    description = f"{title}{f' in {unit}' if unit else ''}. {said}."
    table = [curve.row(text) for curve in made]
    return Chart(
        title, made, _step_ticks(x), y_ticks, x_name, description, list(dict.fromkeys(notes)), table, unit
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


def _unbroken(series: Series) -> Runs:
    """The series in pieces, cut where values are not numbers."""
    pieces = itertools.groupby(series, key=lambda pair: _drawable(pair[1]))
    return [[*piece] for is_drawn, piece in pieces if is_drawn]


def _moving_mean(run: Run, half: int) -> Run:
    """Centred; towards the ends over fewer values, as many on either side."""
    reach = [min(half, index, len(run) - 1 - index) for index in range(len(run))]
    means = (fmean(value for _, value in run[at - far : at + far + 1]) for at, far in enumerate(reach))
    return [(step, mean) for (step, _), mean in zip(run, means, strict=True)]


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
    inside = (mark for mark in marks if x.low <= mark <= x.high and float(mark).is_integer())
    return [(x(mark), shown.tick(mark, max(step, 1))) for mark in inside]


def _path(runs: Runs, x: Scale, y: Scale) -> str:
    return "".join("M" + "L".join(f"{x(s):g} {y(v):g}" for s, v in run) for run in runs if len(run) > 1)


def _spread_labels(curves: list[Curve]) -> None:
    """Move the labels of last values apart where they would lie on each other."""
    curves.sort(key=lambda curve: curve.label_y)
    floor, ceiling = float(TOP), float(HEIGHT - BOTTOM)
    for curve in curves:
        curve.label_y = max(curve.label_y, floor)
        floor = curve.label_y + LABEL_HEIGHT
    if floor - LABEL_HEIGHT > ceiling:
        for curve in reversed(curves):
            curve.label_y = min(curve.label_y, ceiling)
            ceiling = curve.label_y - LABEL_HEIGHT
    for curve in curves:
        curve.label_y = round(curve.label_y, 1)
