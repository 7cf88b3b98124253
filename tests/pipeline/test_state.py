"""What may change under a run that goes on."""

from __future__ import annotations

from pipeline.state import config_differences


def test_how_deepspeed_divides_a_run_may_change_and_nothing_else() -> None:
    before = {"seed": 1, "sft": {"train": {"epochs": 1}}, "deepspeed": {"stage": 2}}
    assert config_differences(before, {**before, "deepspeed": {"stage": 3}}) == []
    changed = {**before, "seed": 2, "sft": {"train": {"epochs": 2}}, "deepspeed": {"stage": 3}}
    assert config_differences(before, changed) == ["seed: 1 -> 2", "sft.train.epochs: 1 -> 2"]
