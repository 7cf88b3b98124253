"""Lays out line charts: series of numbers in, coordinates and labels for one inline SVG out.

A chart shows everything that was logged. A few hundred values are drawn one by one, with their moving mean
when there are many; of more, each bucket of steps is drawn as a band from its lowest to its highest value and
a line through the means, so that no spike is lost. What is not a number is a gap, marked below it and counted
in a note. Draws nothing itself: colours and fonts are the page's.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
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


class _Curve:
    """A line on its way: what was measured, what is drawn of it, and what must be said about it."""

    def __init__(self, line: Line, x_name: str) -> None:
        self.line, self.x_name = line, x_name
        self.finite = [(step, value) for step, value in line.series if _drawable(value)]
        self.values = [value for _, value in self.finite]
        self.gaps = [step for step, value in line.series if not _drawable(value)]
        self.notes: list[str] = []
        self.runs, self.faint = _unbroken(line.series), Runs()
        self.band: list[list[tuple[float, float, float]]] = []
        if self.gaps:
            said = "1 value is" if len(self.gaps) == 1 else f"{len(self.gaps):,} values are"
            where = f"first at {x_name} {self.gaps[0]:,}"
            self.notes.append(f"{line.name}: {said} not a finite number, {where}; left out.")
        if len(self.finite) > 2 * BUCKETS:
            self._thin(math.ceil(len(self.finite) / BUCKETS))
        elif len(self.finite) >= SMOOTHED_FROM and not line.sparse:
            self._smooth(max(2, len(self.finite) // 40))

    def _thin(self, size: int) -> None:
        """The mean and the ends of every `size` values."""
        cut = [[run[at : at + size] for at in range(0, len(run), size)] for run in self.runs]
        self.runs = [[(fmean(s for s, _ in b), fmean(v for _, v in b)) for b in run] for run in cut]
        self.band = [[(b[0][0], min(v for _, v in b), max(v for _, v in b)) for b in run] for run in cut]
        self.notes.append(f"Line: the mean of every {size} values. Band: from their lowest to their highest.")

    def _smooth(self, half: int) -> None:
        """The moving mean before every value, where values scatter about it."""
        smooth = [_moving_mean(run, half) for run in self.runs]
        if _is_noisy(self.runs, smooth):
            self.faint, self.runs = self.runs, smooth
            self.notes.append(f"Thin: every value. Thick: the mean of {2 * half + 1}.")

    @functools.cached_property
    def intervals(self) -> list[tuple[int, float, float]]:
        """95 % intervals by step, where a standard error was logged."""
        found = []
        for step, value in self.finite if len(self.finite) <= DOTS_UP_TO else ():
            half = Z * self.line.errors.get(step, 0.0)
            if half > 0 and _drawable(value - half) and _drawable(value + half):
                low, high = self.line.limits
                found.append((step, max(value - half, low), min(value + half, high)))
        return found

    def drawn(self, x: Scale, y: Scale, text: Callable[[float], str]) -> Drawn:
        """Laid out on the axes. text: how a value is written."""
        line, last = self.line, self.finite[-1] if self.finite else None
        end = None if last is None else (x(last[0]), y(last[1]))
        lone = [run[0] for run in self.runs if len(run) == 1]
        return Drawn(
            line.name,
            line.style,
            path=_path(self.runs, x, y),
            faint=_path(self.faint, x, y),
            band="".join(_band(run, x, y) for run in self.band if len(run) > 1),
            dots=[(x(s), y(v)) for s, v in (self.finite if self._as_dots else lone)],
            whiskers=[] if y.log else [(x(step), y(low), y(high)) for step, low, high in self.intervals],
            gaps=[x(step) for step in self.gaps][:BUCKETS],
            end=end,
            label="" if last is None else text(last[1]),
            label_y=0.0 if end is None else end[1],
        )

    @property
    def _as_dots(self) -> bool:
        return self.line.sparse and len(self.finite) <= DOTS_UP_TO

    def in_words(self) -> str:
        """What a reader who does not see the chart is told."""
        (begin, first), (end, last) = self.finite[0], self.finite[-1]
        return (
            f"{self.line.name}: {shown.figure(first)} at {self.x_name} {begin:,}, {shown.figure(last)} at "
            f"{self.x_name} {end:,}, between {shown.figure(min(self.values))} and "
            f"{shown.figure(max(self.values))}"
        )

    def row(self, text: Callable[[float], str]) -> tuple[str, str, str, str, str]:
        """For the table: name, first, lowest, highest, last."""
        if not self.values:
            return self.line.name, "–", "–", "–", "–"
        found = self.values[0], min(self.values), max(self.values), self.values[-1]
        first, low, high, last = map(text, found)
        return self.line.name, first, low, high, last


def lay_out(
    title: str, lines: Sequence[Line], *, x_name: str = "step", percent: bool = False, unit: str = ""
) -> Chart | None:
    """A chart of the lines that have values; None when none has a single finite one.

    percent: values are shares; they are drawn, and labelled, in percent.
    """
    text = (lambda value: shown.share(value / 100)) if percent else shown.figure
    unit = "%" if percent else unit
    made = [_Curve(_in_percent(line) if percent else line, x_name) for line in lines if line.series]
    values = [value for curve in made for value in curve.values]
    if not values:
        return None
    ends = [end for curve in made for _, *both in curve.intervals for end in both]
    steps = [step for curve in made for step, _ in curve.line.series]
    x = Scale(*_widened(min(steps), max(steps), whole=True), LEFT, WIDTH - RIGHT)
    y, y_ticks = _value_axis(values + ends)
    notes = [note for curve in made for note in curve.notes]
    notes += ["Logarithmic scale."] if y.log else ["Bars: 95% intervals."] if ends else []
    said = "; ".join(curve.in_words() for curve in made if curve.finite)
    return Chart(
        title,
        _spread_labels([curve.drawn(x, y, text) for curve in made]),
        _step_ticks(x),
        y_ticks,
        x_name,
        f"{title}{f' in {unit}' if unit else ''}. {said}.",
        list(dict.fromkeys(notes)),
        [curve.row(text) for curve in made],
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
