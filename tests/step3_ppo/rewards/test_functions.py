"""Python functions: found before training, called with what they name, not believed blindly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from step3_ppo.rewards.functions import finite_scores, load_function, load_functions

KEY = "ppo.rewards[0].function"
PROMPTS, COMPLETIONS = ["a", "b"], ["yes", "no"]


@pytest.fixture(autouse=True)
def module_of_the_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`reward_functions` beside this file, as if it lay in the working directory."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    yield
    for name in ("reward_functions", "fails", "needs_more", "misspelt"):
        sys.modules.pop(name, None)


def refused(reference: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_function(reference, KEY)
    assert KEY in caught.value.message and reference in caught.value.message
    return caught.value


def test_a_function_gets_prompts_completions_and_the_columns() -> None:
    function = load_function("reward_functions:lengths", KEY)
    scores = function(PROMPTS, COMPLETIONS, {"answer": ["x", "y"]})
    assert scores.dtype == np.float64 and scores.tolist() == [3.0, 2.0]


def test_a_function_without_columns_in_its_signature_gets_only_those_that_it_names() -> None:
    function = load_function("reward_functions:right", KEY)
    columns = {"answer": ["yes", "yes"], "kind": ["k", "k"]}
    function.check(columns)
    assert function(PROMPTS, COMPLETIONS, columns).tolist() == [1.0, 0.0]


def test_a_column_that_the_rows_do_not_have_is_said_before_training() -> None:
    function = load_function("reward_functions:right", KEY)
    with pytest.raises(UserError) as caught:
        function.check(["answers", "kind"])
    assert "takes answer, which is neither" in caught.value.message
    assert caught.value.hint == "did you mean answers? the rows have the columns answers, kind"
    with pytest.raises(UserError, match="by position only"):
        load_function("reward_functions:by_position", KEY).check([])


def test_a_parameter_with_a_default_needs_no_column_but_takes_one() -> None:
    function = load_function("reward_functions:with_default", KEY)
    function.check([])
    assert function(PROMPTS, COMPLETIONS, {}).tolist() == [1.0, 1.0]


def test_a_method_of_a_class_can_be_named() -> None:
    assert load_function("reward_functions:Judge.fair", KEY)(PROMPTS, COMPLETIONS, {}).tolist() == [0.5, 0.5]


def test_a_function_that_empties_its_lists_empties_nobody_elses() -> None:
    prompts, completions, columns = ["a", "b"], ["yes", "no"], {"answer": ["x", "y"]}
    scores = load_function("reward_functions:meddling", KEY)(prompts, completions, columns)
    assert scores.tolist() == [1.0, 2.0]
    assert (prompts, completions, columns) == (["a", "b"], ["yes", "no"], {"answer": ["x", "y"]})


def test_several_functions_are_loaded_by_name() -> None:
    functions = load_functions({"right": "reward_functions:right"}, "ppo.evaluation.functions")
    assert functions["right"].key == "ppo.evaluation.functions.right"


@pytest.mark.parametrize(
    ("reference", "hint"),
    [
        ("reward_functions.lengths", "did you mean reward_functions:lengths?"),
        ("lengths", "expected: package.module:function"),
        ("a:b:c", "expected: package.module:function"),
        ("reward functions:lengths", "expected: package.module:function"),
        (":lengths", "expected: package.module:function"),
        ("reward_functions:", "expected: package.module:function"),
        ("reward_functions:length", "did you mean reward_functions:lengths?"),
        ("reward_function:lengths", "did you mean reward_functions?"),
        ("common.artefacts:verify", "did you mean common.artifacts?"),
        ("reward_functions:NUMBER", "expected: package.module:function"),
        ("nowhere_at_all_xyz:f", "modules are looked for in the working directory"),
    ],
)
def test_a_function_that_is_not_there_is_refused_with_the_way_out(reference: str, hint: str) -> None:
    assert hint in (refused(reference).hint or "")


def test_a_module_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fails.py").write_text("def f():\n    return 1 / 0\nf()\n")
    (tmp_path / "needs_more.py").write_text("import not_installed_xyz\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    assert "SystemExit: 0" in refused("script:f").message
    (tmp_path / "misspelt.py").write_text("def f(:\n")
    failing = refused("fails:f").message
    assert "ZeroDivisionError" in failing and "fails.py:2, in f" in failing
    assert "needs the module not_installed_xyz" in refused("needs_more:f").message
    assert "SyntaxError" in refused("misspelt:f").message


@pytest.mark.parametrize(
    ("name", "completions", "said"),
    [
        (
            "broken",
            ["a", ""],
            ["ZeroDivisionError: division by zero", "reward_functions.py:", "in <listcomp>"],
        ),
        ("leaving", ["a", "b"], ["SystemExit: 3", "reward_functions.py:"]),
        ("nan_for_empty", ["a", ""], ["returned nan as score 1, for the completion ''"]),
        ("too_few", ["a", "b"], ["returned 1 scores for 2 completions"]),
        ("nothing", ["a", "b"], ["returned None where a list"]),
        ("none_for_some", ["a", ""], ["returned None as score 1, for the completion ''"]),
        ("texts", ["a", "b"], ["returned '1.0' as score 0, for the completion 'a'"]),
    ],
)
def test_what_goes_wrong_in_a_function_is_said_with_its_name(
    name: str, completions: list[str], said: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_function(f"reward_functions:{name}", KEY)(["p"] * 2, completions, {})
    assert f"{KEY}: reward_functions:{name}" in caught.value.message
    if sys.version_info >= (3, 12):  # comprehensions have no frame of their own any more
        said = [text.replace("in <listcomp>", f"in {name}") for text in said]
    assert all(text in caught.value.message for text in said)


@pytest.mark.parametrize(
    "values",
    [
        np.array([1, 2]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1.0], [2.0]]),
        (1, 2),
        iter([1, np.float32(2)]),
    ],
    ids=["numpy", "torch", "torch, a column", "tuple", "iterator"],
)
def test_numbers_of_any_library_count(values: object) -> None:
    assert finite_scores(values, COMPLETIONS, "it").tolist() == [1.0, 2.0]


@pytest.mark.parametrize("value", [None, "1", float("inf"), 10**400, [1], np.nan, True, 1j])
def test_what_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="as score 1"):
        finite_scores([0.0, value], COMPLETIONS, "it")
