"""Comparing what two sides logged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import parity
from benchmarks.parity import Quantity

LOSS = Quantity("loss")
MARGIN = Quantity("margin", signed=True)


def test_a_difference_over_the_tolerance_fails() -> None:
    ours = [{"loss": 2.0}, {"loss": 2.0004}]
    theirs = [{"loss": 2.0}, {"loss": 2.0}]
    result = parity.summary(ours, theirs, [LOSS])
    assert not result["passed"] and result["failed"] == ["loss"]
    assert result["largest_relative_difference"]["loss"] == pytest.approx(2e-4)
    assert parity.verdict(result).startswith("FAILED (loss)")


def test_a_number_that_crosses_zero_is_measured_by_its_largest_size_in_the_run() -> None:
    ours, theirs = [{"margin": 0.00001}, {"margin": -0.5}], [{"margin": 0.0}, {"margin": -0.5}]
    assert parity.differences(ours, theirs, MARGIN) == [pytest.approx(2e-5), 0.0]
    assert parity.differences(ours, theirs, Quantity("margin"))[0] == float("inf")


def test_a_quantity_without_a_tolerance_is_shown_and_not_judged() -> None:
    quantity = Quantity("loss", tolerance=None)
    assert parity.summary([{"loss": 3.0}], [{"loss": 2.0}], [quantity])["passed"]


def test_a_number_that_is_not_one_fails() -> None:
    ours, theirs = [{"loss": 2.0}, {"loss": float("nan")}], [{"loss": 2.0}, {"loss": 2.0}]
    assert not parity.summary(ours, theirs, [LOSS])["passed"]


@pytest.mark.parametrize("steps", [[], [{"loss": 1.0}]])
def test_parity_of_missing_steps_is_refused(steps: list[dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        parity.summary(steps, [], [LOSS])


def test_trls_numbers_get_our_names_and_the_exact_gradient_norm(tmp_path: Path) -> None:
    logs = [{"loss": 0.5, "acc": 1.0, "grad_norm": 2.9}, {"train_runtime": 3.0}]
    (tmp_path / "logs.json").write_text(json.dumps(logs))
    (tmp_path / "grad_norms.json").write_text("[3.0]")
    read = parity.read_trl(tmp_path, [LOSS, Quantity("accuracy", "acc"), parity.GRAD_NORM])
    assert read == [{"loss": 0.5, "accuracy": 1.0, "grad_norm": 3.0, "logged_grad_norm": 2.9}]


def test_our_evaluations_are_not_steps(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 0.5}, {"step": 1, "eval/loss": 0.7}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert parity.read_ours(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
