"""What PPO's settings refuse that no other file's tests do."""

from __future__ import annotations

import pytest

from common.config import DataConfig
from common.errors import UserError
from step3_ppo.config import MEASURED, EvaluationConfig, PPOConfig


@pytest.mark.parametrize("name", [*MEASURED, "gold_se", "greedy/gold"])
def test_a_function_of_the_evaluation_does_not_take_the_name_of_another_number(name: str) -> None:
    with pytest.raises(UserError) as caught:
        EvaluationConfig(functions={"gold": "demo.gold:gold", name: "demo.gold:gold"})
    assert f"ppo.evaluation.functions.{name}" in str(caught.value)
    assert "stop_rate" in str(caught.value)


def test_a_function_of_the_evaluation_has_any_other_name() -> None:
    functions = {"gold": "demo.gold:gold", "rewarded": "demo.gold:gold", "seen": "demo.gold:style"}
    assert EvaluationConfig(functions=functions).functions == functions


def test_no_demonstration_is_held_out_where_nothing_says_so() -> None:
    assert PPOConfig().ptx_data.held_out_fraction() == 0
    assert PPOConfig(ptx_data=DataConfig(path="a.jsonl")).ptx_data.held_out_fraction() == 0
    assert PPOConfig(ptx_data=DataConfig(path="a.jsonl", eval_fraction=0.1)).ptx_data.eval_fraction == 0.1
    assert PPOConfig().data.held_out_fraction() > 0


def test_demonstrations_are_not_evaluated_on_rows_of_their_own() -> None:
    with pytest.raises(UserError, match="ppo.ptx_data.eval_path=b.jsonl has no effect"):
        PPOConfig(ptx_data=DataConfig(path="a.jsonl", eval_path="b.jsonl"))
