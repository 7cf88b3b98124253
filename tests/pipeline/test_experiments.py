"""Rows of the user's own take the place of an experiment's, with all that belongs to those; it is said."""

from __future__ import annotations

import pytest

from pipeline.compose import compose, prepare

ROWS = "ppo.data.path=mine.jsonl"


def test_own_prompts_leave_out_what_belongs_to_the_demos_rows() -> None:
    prepared = prepare(["experiment=demo", ROWS])
    ppo = compose(prepared.overrides).ppo
    assert (ppo.data.path, ppo.data.eval_path, ppo.data.held_out_fraction()) == ("mine.jsonl", None, 0.05)
    assert ppo.evaluation.functions == {} and not ppo.ptx_weight and not ppo.ptx_data.all_sources()
    assert prepared.notes == [
        "ppo.data.path is yours: ppo.data.eval_path, ppo.evaluation.functions (gold, correct, style), "
        "ppo.ptx_data of experiment=demo is left out"
    ]
    assert compose(prepared.overrides).sft.data.eval_path is not None  # its rows are the demo's


def test_what_the_user_names_beside_own_prompts_stays() -> None:
    typed = ["experiment=demo", ROWS, "ppo.data.eval_path=held.jsonl", "ppo.ptx_weight=0.2"]
    prepared = prepare([*typed, "ppo.evaluation.functions.gold=demo.gold:gold"])
    ppo = compose(prepared.overrides).ppo
    assert prepared.notes == [] and ppo.data.eval_path == "held.jsonl" and ppo.ptx_weight == 0.2
    assert set(ppo.evaluation.functions) == {"gold", "correct", "style"} and ppo.ptx_data.all_sources()


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=demo"],
        ["experiment=demo", "sft.optim.lr=1e-3"],
        ["experiment=hh", "sft.data.path=x"],  # it holds out a share of its rows
        ["sft.data.path=x", "model=llama_4m"],
    ],
)
def test_nothing_is_left_out_where_nothing_belongs_to_other_rows(overrides: list[str]) -> None:
    assert prepare(overrides).notes == []


def test_held_out_rows_of_an_experiment_go_with_its_rows_whatever_form_the_new_ones_have() -> None:
    for own in ("sft.data.path=x", "sft.data.sources=[{path: x}]", "data@sft.data=gsm8k", "sft.data=gsm8k"):
        prepared = prepare(["experiment=demo", "steps=sft", own])
        assert compose(prepared.overrides).sft.data.eval_path is None, own
        assert prepared.notes[0].endswith("sft.data.eval_path of experiment=demo is left out")


def test_a_share_of_the_rows_takes_the_place_of_an_experiments_held_out_file() -> None:
    data = compose(prepare(["experiment=demo", "sft.data.eval_fraction=0.1"]).overrides).sft.data
    assert (data.eval_path, data.held_out_fraction()) == (None, 0.1)
