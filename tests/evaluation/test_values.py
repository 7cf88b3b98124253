"""Numbers per row and what becomes of them, by hand."""

from __future__ import annotations

from statistics import fmean, pstdev, stdev

import pytest

from common.estimates import Estimate, on_z_scale, student_quantile
from evaluation.values import by_row, changes, estimates, of_ratio, plain, table


def test_a_ratio_of_sums_is_the_mean_of_what_each_row_has_of_it() -> None:
    # 12 nats over 6 tokens are 2 a token; 3 tokens a row: 2 + (3 - 2)/3, 2 + (9 - 10)/3
    found = of_ratio({"a": 3.0, "b": 9.0}, {"a": 1.0, "b": 5.0})
    assert found == pytest.approx({"a": 7 / 3, "b": 5 / 3})
    assert fmean(found.values()) == pytest.approx(12 / 6)


def test_the_interval_of_a_ratio_is_that_of_resampled_rows() -> None:
    import random

    draw = random.Random(0)
    counts = {str(n): float(draw.randint(5, 40)) for n in range(400)}
    parts = {key: count * draw.gauss(1.5, 0.3) + draw.gauss(0, 3) for key, count in counts.items()}
    interval = estimates({"x": of_ratio(parts, counts)})["x"]
    ratios = []
    for _ in range(2000):
        chosen = draw.choices(list(counts), k=len(counts))
        ratios.append(sum(parts[key] for key in chosen) / sum(counts[key] for key in chosen))
    half = (interval.high - interval.low) / 2
    assert half == pytest.approx(1.96 * stdev(ratios), rel=0.1)  # 2,000 resamples know it to 2 %


def test_shares_have_wilsons_interval_and_lengths_do_not() -> None:
    rows = {"a": 1.0, "b": 1.0, "c": 1.0}
    found = estimates({"stop_rate": rows, "length": rows, "none": {}})
    assert found["stop_rate"].high == 1.0 and 0.4 < found["stop_rate"].low < 0.5
    assert not found["length"].has_interval and "none" not in found


def test_a_change_is_of_the_same_rows() -> None:
    # both are 10 apart from row to row, and the difference is 1, 2 and 3
    ours, theirs = {"a": 11.0, "b": 22.0, "c": 33.0}, {"a": 10.0, "b": 20.0, "c": 30.0}
    change = changes({"x": ours, "only ours": ours}, {"x": theirs})
    assert list(change) == ["x"]
    half = student_quantile(2) * 1.0 / 3**0.5
    assert (change["x"].value, change["x"].low) == pytest.approx((2.0, 2.0 - half))
    assert changes({"x": ours}, {"x": {"a": 1.0}}) == {}


def test_a_table_has_a_line_for_each_metric_and_a_column_for_each_model() -> None:
    first = {"loss": Estimate(1.23456, 1.0, 1.5, 9), "length": Estimate(123.4)}
    assert table(["A", "B"], [first, {"loss": Estimate(-0.00001)}]) == [
        "        A                          B",
        "loss    1.2346 (1.0000 to 1.5000)  0.0000",
        "length  123.4",
    ]


def test_what_is_kept_of_estimates_and_rows() -> None:
    assert plain({"x": Estimate(1.0, 0.5, 1.5, 3)}) == {
        "x": {"value": 1.0, "low": 0.5, "high": 1.5, "count": 3}
    }
    assert by_row({"x": {"b": 2.0, "a": 1.0}, "y": {"a": 3.0}}, ["a", "b"]) == [
        {"row": "a", "x": 1.0, "y": 3.0}, {"row": "b", "x": 2.0},
    ]  # fmt: skip


def test_the_interval_of_a_correlation_is_laid_on_fishers_z_and_stays_between_its_bounds() -> None:
    # 0.9 with half an interval of 0.3: artanh 0.9 = 1.4722, and 0.3 / (1 - 0.81) = 1.5789 on that scale
    found = on_z_scale(Estimate(0.9, 0.6, 1.2, 10), -1, 1)
    assert (found.low, found.high) == pytest.approx((-0.10632, 0.99553), abs=1e-5)
    assert (found.value, found.count) == (0.9, 10)
    assert not on_z_scale(Estimate(1.0, 0.5, 1.5, 10), -1, 1).has_interval
    few = {"a": 3.0, "b": 0.2, "c": -0.5}  # influences of three pairs on a correlation of 0.9
    for name in ("reward_length_correlation", "words/reward_length_correlation"):
        one = estimates({name: few})[name]
        assert -1 <= one.low < one.value < one.high <= 1


def test_the_interval_of_a_correlation_of_many_normal_pairs_is_fishers() -> None:
    import math
    import random

    draw, count, r = random.Random(0), 4_000, 0.6
    pairs = [(x := draw.gauss(0, 1), r * x + math.sqrt(1 - r * r) * draw.gauss(0, 1)) for _ in range(count)]
    sides = [(side, fmean(side), pstdev(side)) for side in zip(*pairs, strict=True)]
    z = [[(value - mean) / deviation for value in side] for side, mean, deviation in sides]
    found = fmean(a * b for a, b in zip(*z, strict=True))
    influence = {
        str(n): a * b - found * (a * a + b * b) / 2 + found for n, (a, b) in enumerate(zip(*z, strict=True))
    }
    interval = estimates({"correlation": influence})["correlation"]
    fisher = [math.tanh(math.atanh(found) + sign * 1.96 / math.sqrt(count - 3)) for sign in (-1, 1)]
    assert (interval.low, interval.high) == pytest.approx(fisher, abs=2e-3)  # their spread is an estimate


def test_the_interval_of_a_share_that_is_none_of_trials_stays_between_0_and_1() -> None:
    found = estimates({"mean_token_accuracy": {"a": 0.9, "b": 0.7, "c": 0.98}})["mean_token_accuracy"]
    assert 0 < found.low < found.value < found.high < 1
    inside = estimates({"mean_token_accuracy": {"a": 0.5, "b": 0.6, "c": 0.55}})["mean_token_accuracy"]
    assert inside.high - inside.value == pytest.approx(inside.value - inside.low)  # Student's
