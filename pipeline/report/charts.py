"""Lays out line charts: series of numbers in, coordinates and labels for one inline SVG out.

A chart shows everything that was logged. A few hundred values are drawn one by one, with their moving mean
when there are many; of more, each bucket of steps is drawn as a band from its lowest to its highest value and
a line through the means, so that no spike is lost. What is not a number is a gap, marked below it and counted
in a note. What a pointer above it is shown is in hovers.py. Draws nothing itself: colours and fonts are the
page's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from common.evidence import Z
from pipeline.report import shown
from pipeline.report.files import Series
from pipeline.report.hovers import Hover, hovers

WIDTH, HEIGHT = 340, 192
LEFT, RIGHT, TOP, BOTTOM = 44, 62, 10, 34
BUCKETS = 240
SMOOTHED_FROM = 60
SCATTER = 0.003
"""Median distance from the moving mean, as a share of the range, from which a line is smoothed."""
DOTS_UP_TO = 40
LABEL_HEIGHT = 12
LABELLED_UP_TO = 12
"""Lines whose last values have room beside each other."""
LOG_RANGE = 1000.0
SMALLEST = 1e-280
"""Below this, logarithms and differences lose themselves in the smallest floats."""

Run = Sequence[tuple[float, float]]
Runs = list[Run]


@dataclass(frozen=True)
class Line:
    """A named series. `colour` and `dash` number those of the page, from 0; no dash is drawn for 0."""

    name: str
    series: Series
    colour: int = 0
    dash: int = 0
    mark: str = ""  # a letter before its last value, where colours alone would not tell lines apart
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
        self.name, self.colour, self.dash, self.mark = line.name, line.colour, line.dash, line.mark
        self.series = [(step, value * factor) for step, value in line.series]
        self.finite = [(step, value) for step, value in self.series if _drawable(value)]
        self.values = [value for _, value in self.finite]
        self.notes: list[str] = []
        self.thinned: int | None = None  # values that a point of the line is the mean of
        self.smoothed: int | None = None  # values that the moving mean is over
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
        self.thinned = size

    def _smooth(self, half: int) -> None:
        """The moving mean before every value, where values scatter about it."""
        smooth = [_moving_mean(run, half) for run in self._runs]
        if _is_noisy(self._runs, smooth):
            self._all, self._runs = self._runs, smooth
            self.smoothed = 2 * half + 1

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
        self.label = "" if last is None else f"{self.mark} {text(last[1])}".strip()
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
    hovers: list[Hover] = field(default_factory=list)


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
    first, last = min(steps), max(steps)
    margin = 0 if last > first else 1  # one step alone lies in the middle
    x = Scale(first - margin, last + margin, LEFT, WIDTH - RIGHT)
    y, y_ticks = _value_axis(values + ends, percent=percent)
    for curve in made:
        curve.place(x, y, text)
    notes = [note for curve in made for note in curve.notes] + list(_notes_on_means(made))
    if len(made) <= LABELLED_UP_TO:
        _spread_labels([curve for curve in made if curve.end is not None])
    else:
        notes.append("The last values of so many lines are in the table below.")
        for curve in made:
            curve.label = ""
    notes += ["Logarithmic scale."] if y.log else ["Bars: 95% intervals."] if ends else []
    said = "; ".join(curve.in_words(x_name) for curve in made if curve.finite)
    description = f"{title}{f' in {unit}' if unit else ''}. {said}."
    table = [curve.row(text) for curve in made]
    return Chart(
        title, made, _step_ticks(x), y_ticks, x_name, description, list(dict.fromkeys(notes)), table, unit,
        hovers(made, x, x_name, text),
    )  # fmt: skip


def _notes_on_means(curves: Sequence[Curve]) -> Iterator[str]:
    """What lines show of many values."""
    thinned, smoothed = (
        " or ".join(str(size) for size in sorted(filter(None, set(sizes))))
        for sizes in ([curve.thinned for curve in curves], [curve.smoothed for curve in curves])
    )
    if thinned:
        yield f"Line: the mean of every {thinned} values. Band: from their lowest to their highest."
    if smoothed:
        yield f"Thin: every value. Thick: the mean of {smoothed}."


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


def _value_axis(values: Sequence[float], *, percent: bool) -> tuple[Scale, list[tuple[float, str]]]:
    """The vertical axis: linear on round numbers, or logarithmic where values span more than 1 to 1000."""
    low, high = min(values), max(values)
    if low > SMALLEST and high / low > LOG_RANGE:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        scale = Scale(10.0**first, 10.0**last, HEIGHT - BOTTOM, TOP, log=True)
        every = max(1, math.ceil((last - first) / 5))
        marks = [10.0**power for power in range(first, last + 1, every)]
        return scale, [(scale(mark), shown.figure(mark)) for mark in marks]
    if high - low <= max(abs(low), abs(high), SMALLEST) * 1e-9:  # all the same but for rounding
        low, high = _about_a_constant(low, percent=percent)
    marks, step = nice_ticks(low, high, 4)
    scale = Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    return scale, [(scale(mark), shown.tick(mark, step)) for mark in marks]


def _about_a_constant(value: float, *, percent: bool) -> tuple[float, float]:
    """The axis of values that are all the same: all of a share; else from zero to twice the value, so that
    its size can be seen.
    """
    if percent and 0 <= value <= 100:
        return 0.0, 100.0
    if abs(value) <= SMALLEST:
        return 0.0, 1.0
    return min(0.0, 2 * value), max(0.0, 2 * value)


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
