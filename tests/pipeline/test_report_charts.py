"""Charts show what was logged: everything, inside their frame, with round ticks."""

from __future__ import annotations

import math
import re

import pytest

from pipeline.report.charts import (
    BOTTOM,
    BUCKETS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Line,
    lay_out,
    nice_ticks,
)
from pipeline.report.curves import Logged, curves
from pipeline.report.hovers import COLUMNS


def chart(*lines: Line, **more: object) -> Chart:
    found = lay_out("Loss", lines, **more)  # type: ignore[arg-type]
    assert found is not None
    return found


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]


def test_values_lie_where_the_ticks_say() -> None:
    found = chart(Line("training", [(0, 0.0), (50, 2.0), (100, 4.0)]))
    ticks = {label: y for y, label in found.y_ticks}
    assert list(ticks) == ["0", "1", "2", "3", "4"]
    assert points(found.lines[0].path) == [
        (LEFT, ticks["0"]),
        ((LEFT + WIDTH - RIGHT) / 2, ticks["2"]),
        (WIDTH - RIGHT, ticks["4"]),
    ]
    assert [label for _, label in found.x_ticks] == ["0", "25", "50", "75", "100"]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (1.37, 6.2), (-3, 4), (0.018, 0.022), (1e-9, 3e-9), (-1e300, 1e300), (0, 9973)]
)
def test_ticks_are_round_and_cover_the_values(low: float, high: float) -> None:
    marks, step = nice_ticks(low, high, 4)
    assert 3 <= len(marks) <= 8
    assert marks[0] <= low + step * 1e-6 and marks[-1] >= high - step * 1e-6
    assert float(f"{step:.1e}") == pytest.approx(step)  # two digits are enough to write it


def test_a_spike_survives_thinning() -> None:
    series = [(step, 1.0) for step in range(1, 20_001)]
    series[12_345] = (12_346, 50.0)
    found = chart(Line("training", series))
    line = found.lines[0]
    assert len(points(line.path)) <= BUCKETS + 1
    top = found.y_ticks[-1]
    assert top[1] == "60"
    highest = min(y for _, y in points(line.band))
    assert highest < TOP + (HEIGHT - BOTTOM - TOP) * 0.2  # 50 of 60
    assert any("Band: from their lowest to their highest" in note for note in found.notes)
    assert found.table[0][3] == "50.0"


def test_what_is_no_number_is_a_gap_and_is_said() -> None:
    series = [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 2.0), (6, 1.0)]
    found = chart(Line("training", series))
    assert found.lines[0].path.count("M") == 2
    assert len(found.lines[0].gaps) == 2
    assert found.notes == ["training: 2 values are not a finite number, first at step 3; left out."]


def test_intervals_of_evaluations_are_drawn_and_shares_end_at_all() -> None:
    line = Line("sampled", [(0, 0.5), (40, 0.99)], sparse=True, errors={0: 0.05, 40: 0.01})
    found = chart(line, percent=True)
    (_, low, high), (_, last_low, last_high) = found.lines[0].whiskers
    ticks = {label: y for y, label in found.y_ticks}
    per_point = (ticks["40"] - ticks["100"]) / 60
    assert (low - high) / per_point == pytest.approx(2 * 1.96 * 5, abs=0.1)
    assert last_high == ticks["100"] and last_low > last_high
    assert found.notes == ["Bars: 95% intervals."]


def test_a_line_of_no_number_is_still_said() -> None:
    found = chart(Line("training", [(1, math.nan), (2, math.nan)]), Line("held out", [(2, 1.0)], sparse=True))
    assert found.lines[0].path == "" and found.lines[0].end is None
    assert any("training: 2 values" in note for note in found.notes)


def test_a_line_without_any_number_makes_no_chart() -> None:
    assert lay_out("Loss", [Line("training", [(1, math.nan)])]) is None
    assert lay_out("Loss", []) is None


def test_one_value_is_a_dot() -> None:
    found = chart(Line("held out", [(40, 0.3)], sparse=True))
    assert found.lines[0].path == "" and len(found.lines[0].dots) == 1
    assert found.lines[0].label == "0.300"


def test_noise_is_smoothed_and_a_schedule_is_not() -> None:
    noisy = chart(Line("training", [(step, step + 5 * (-1) ** step) for step in range(200)]))
    assert noisy.lines[0].faint and noisy.notes == ["Thin: every value. Thick: the mean of 11."]
    schedule = chart(Line("rate", [(step, min(step / 10, 1) * (1 - step / 200)) for step in range(200)]))
    assert not schedule.lines[0].faint and not schedule.notes
    assert len(points(schedule.lines[0].path)) == 200


def test_values_over_many_magnitudes_get_a_logarithmic_axis() -> None:
    found = chart(Line("before clipping", [(step, 10.0 ** (step / 10)) for step in range(50)]))
    assert "Logarithmic scale." in found.notes
    assert [label for _, label in found.y_ticks] == ["1.00", "10.0", "100", "1,000", "10,000", "100,000"]


def test_labels_of_last_values_do_not_lie_on_each_other() -> None:
    lines = [Line(f"line {index}", [(0, 0.0), (10, 9.9 + index / 1000)], index) for index in range(4)]
    places = sorted(line.label_y for line in chart(*lines).lines)
    assert all(later - earlier >= 11.9 for earlier, later in zip(places, places[1:], strict=False))
    assert places[0] >= TOP and places[-1] <= HEIGHT - BOTTOM


@pytest.mark.parametrize(
    "values",
    [
        [5e-324, 0.0], [0.0, 0.0], [1e299, -1e299], [1e308, 1.0], [-2.0], [1.0, 1.0 + 1e-15], [1e-310, 1e300],
        [123456789.0, 123456789.5],
    ],
)  # fmt: skip
def test_every_finite_series_lies_inside_its_frame(values: list[float]) -> None:
    found = chart(Line("odd", list(enumerate(values)), sparse=True))
    placed = points(found.lines[0].path) + found.lines[0].dots
    assert placed
    for x, y in placed:
        assert LEFT <= x <= WIDTH - RIGHT and TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


@pytest.mark.parametrize(
    ("value", "percent", "ticks"),
    [
        (0.0, True, ["0", "25", "50", "75", "100"]),  # a share of nothing, at the bottom of all
        (0.4, True, ["0", "25", "50", "75", "100"]),
        (0.0, False, ["0", "0.25", "0.50", "0.75", "1.00"]),
        (0.02, False, ["0", "0.01", "0.02", "0.03", "0.04"]),  # in the middle, above zero
        (-3.0, False, ["−6", "−4", "−2", "0"]),
    ],
)
def test_a_constant_curve_lies_on_an_axis_that_shows_its_size(
    value: float, percent: bool, ticks: list[str]
) -> None:
    found = chart(Line("training", [(step, value) for step in range(50)]), percent=percent)
    assert [label for _, label in found.y_ticks] == ticks


def test_a_pointer_meets_the_values_that_were_logged_and_no_means() -> None:
    training = Line("training", [(step, float(step % 7)) for step in range(1, 1001)])
    held_out = Line("held out", [(500, 2.5), (1000, math.nan)], colour=1, sparse=True)
    found = chart(training, held_out)
    assert len(found.hovers) == COLUMNS + 1  # the last step lies on the edge
    (at,) = [hover for hover in found.hovers if hover.title == "step 500"]
    assert at.rows == [(0, "training 3.00"), (1, "held out 2.50")]
    assert found.hovers[-1].rows == [(0, "training 6.00"), (1, "held out not a number")]
    for left, right in zip(found.hovers, found.hovers[1:], strict=False):
        assert left.left + left.width == pytest.approx(right.left, abs=0.11)
        assert left.left <= left.x <= left.left + left.width + 0.1
        assert left.box_x >= 0 and left.box_x + left.box_width <= WIDTH


def test_of_several_runs_a_chart_has_one_metric_and_a_line_for_each_run() -> None:
    one = Logged({"loss": [(1, 2.0)], "eval/loss": [(1, 3.0)]}, name="A first", mark="A", colour=0)
    other = Logged({"loss": [(1, 4.0)], "new": [(1, 5.0)]}, name="B second", mark="B", colour=1)
    main, further = curves("sft", [one, other], is_alone=False)
    drawn = {found.title: [(line.name, line.label) for line in found.lines] for found in [*main, *further]}
    assert drawn == {
        "Loss, training": [("A first", "A 2.00"), ("B second", "B 4.00")],
        "Loss, held out": [("A first", "A 3.00")],
        "new": [("B second", "B 5.00")],
    }


def test_of_many_lines_the_last_values_are_in_the_table_only() -> None:
    lines = [Line(f"line {index}", [(1, 1.0), (2, float(index))], index) for index in range(13)]
    found = chart(*lines)
    assert {line.label for line in found.lines} == {""} and len(found.table) == 13
    assert found.notes == ["The last values of so many lines are in the table below."]
    assert found.hovers[-1].rows[-1] == (-1, "and 2 more")


def test_every_metric_is_drawn_exactly_once() -> None:
    names = ["loss", "eval/loss", "learning_rate", "something/new", "eval/something/new", "eval/alone"]
    metrics = {name: [(1, 1.0), (2, 2.0)] for name in names}
    main, further = curves("sft", [Logged(metrics)])
    drawn = sum(len(found.lines) for found in [*main, *further])
    assert drawn == len(names)
    assert [found.title for found in further] == ["eval/alone", "something/new"]
    ppo = {name: [(1, 1.0)] for name in ("eval/gold", "eval/greedy/gold", "eval/x/y", "scores/a", "kl_coef")}
    main, further = curves("ppo", [Logged(ppo)], ["gold"])
    assert sum(len(found.lines) for found in [*main, *further]) == len(ppo)
    assert main[0].title == "Gold score, held out" and len(main[0].lines) == 2


def test_the_learning_rates_of_policy_and_critic_share_a_chart() -> None:
    names = ("learning_rate", "critic/learning_rate")
    main, further = curves("ppo", [Logged({name: [(1, 1e-5), (2, 2e-5)] for name in names})])
    assert [(found.title, len(found.lines)) for found in main] == [("Learning rate", 2)] and further == []
