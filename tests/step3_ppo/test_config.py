"""What PPO's settings refuse that no other file's tests do."""

from __future__ import annotations

import pytest

from common.errors import UserError
from step3_ppo.config import MEASURED, EvaluationConfig


@pytest.mark.parametrize("name", [*MEASURED, "gold_se", "greedy/gold"])
def test_a_function_of_the_evaluation_does_not_take_the_name_of_another_number(name: str) -> None:
    with pytest.raises(UserError) as caught:
        EvaluationConfig(functions={"gold": "demo.gold:gold", name: "demo.gold:gold"})
    assert f"ppo.evaluation.functions.{name}" in str(caught.value)
    assert "stop_rate" in str(caught.value)


def test_a_function_of_the_evaluation_has_any_other_name() -> None:
    functions = {"gold": "demo.gold:gold", "rewarded": "demo.gold:gold", "seen": "demo.gold:style"}
    assert EvaluationConfig(functions=functions).functions == functions
