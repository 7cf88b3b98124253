"""The shipped files are what the program makes, and what is held out is held out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from demo.gold import mean, score
from demo.make_data import FOLDER, as_jsonl, make
from demo.tasks import understand

NAMES = [
    *("preferences.jsonl", "preferences_eval.jsonl", "prompts.jsonl", "prompts_train.jsonl"),
    *("sft.jsonl", "sft_eval.jsonl"),
]


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict[str, Any]]]:
    return {
        name: [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()] for name in NAMES
    }


def test_the_shipped_files_are_what_the_program_makes() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == NAMES
    for name, rows in make().items():
        assert (FOLDER / name).read_bytes() == as_jsonl(rows).encode(), (
            f"run: python -m demo.make_data ({name})"
        )


def test_the_files_are_small_and_not_empty(shipped: dict[str, list[dict[str, Any]]]) -> None:
    assert sum((FOLDER / name).stat().st_size for name in NAMES) < 2_000_000
    assert len(shipped["sft.jsonl"]) > 1500
    assert len(shipped["preferences.jsonl"]) > 800
    assert len(shipped["prompts.jsonl"]) > 120


def test_held_out_prompts_occur_nowhere_else(shipped: dict[str, list[dict[str, Any]]]) -> None:
    held_out = {row["prompt"] for row in shipped["prompts.jsonl"]}
    of_training = ("sft.jsonl", "preferences.jsonl", "prompts_train.jsonl")
    trained = {row["prompt"] for name in of_training for row in shipped[name]}
    assert held_out and not held_out & trained
    assert {row["prompt"] for row in shipped["sft_eval.jsonl"]} == held_out
    assert {row["prompt"] for row in shipped["preferences_eval.jsonl"]} == held_out


def test_training_prompts_are_those_of_the_demonstrations_and_pairs_each_once(
    shipped: dict[str, list[dict[str, Any]]],
) -> None:
    prompts = [row["prompt"] for row in shipped["prompts_train.jsonl"]]
    assert len(prompts) == len(set(prompts)) > 600
    assert (
        set(prompts)
        == {row["prompt"] for row in shipped["sft.jsonl"]}
        == {row["prompt"] for row in shipped["preferences.jsonl"]}
    )


def test_what_a_held_out_prompt_asks_about_is_trained_in_other_words(
    shipped: dict[str, list[dict[str, Any]]],
) -> None:
    def asked(row: dict[str, Any]) -> tuple[str, str]:
        question = understand(row["prompt"])
        return question.task.kind, question.subject

    held_out = {asked(row) for row in shipped["prompts.jsonl"]}
    assert held_out <= {asked(row) for row in shipped["sft.jsonl"]}
    assert {kind for kind, _ in held_out} == {row["kind"] for row in shipped["sft.jsonl"]}


def test_references_are_the_answers_that_the_scorer_wants(shipped: dict[str, list[dict[str, Any]]]) -> None:
    for row in shipped["prompts.jsonl"] + shipped["prompts_train.jsonl"]:
        assert score(row["prompt"], row["reference"]).correct == 1.0
        assert understand(row["prompt"]).task.kind == row["kind"]


def test_demonstrations_leave_room_above_them(shipped: dict[str, list[dict[str, Any]]]) -> None:
    gold = mean(score(row["prompt"], row["completion"]) for row in shipped["sft.jsonl"])
    assert 0.3 < gold.total < 0.7
    assert 0.9 < gold.correct < 0.97
    assert 0.3 < gold.style < 0.5


def test_the_chosen_answer_is_better_than_the_rejected_one(shipped: dict[str, list[dict[str, Any]]]) -> None:
    for row in shipped["preferences.jsonl"] + shipped["preferences_eval.jsonl"]:
        assert score(row["prompt"], row["chosen"]).total > score(row["prompt"], row["rejected"]).total, row
