"""The pairs that both sides of a comparison read, and what TRL gets of ours."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import dpo_parity, pair_cpu, pair_parity, pair_sides, pairs_workload
from benchmarks.pair_sides import PairTokens
from common.data.types import IGNORE, TokenizedExample


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def solved(*correct: bool) -> dict[str, object]:
    writers = zip(pairs_workload.WRITERS, correct, strict=True)
    return {"question": "1 + 1?", **{w: {"is_correct": c, "solution": f"by {w}"} for w, c in writers}}


def test_a_right_solution_stands_against_a_wrong_one() -> None:
    (row,) = pairs_workload.right_and_wrong(solved(False, True, True, False))
    assert row == {
        "prompt": [user("1 + 1?")],
        "chosen": [assistant("by 6b_verification")],
        "rejected": [assistant("by 6b_finetuning")],
    }


@pytest.mark.parametrize("correct", [True, False])
def test_a_question_that_all_solve_alike_gives_no_pair(correct: bool) -> None:
    assert list(pairs_workload.right_and_wrong(solved(*[correct] * 4))) == []


def test_transcripts_become_turns() -> None:
    talk = "\n\nHuman: Hi.\nThere.\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: "
    (row,) = pairs_workload.transcripts({"chosen": talk + "Bye!", "rejected": talk + "No."})
    begin = [user("Hi.\nThere."), assistant("Hello"), user("Bye")]
    assert row == {"chosen": [*begin, assistant("Bye!")], "rejected": [*begin, assistant("No.")]}


@pytest.mark.parametrize("rejected", ["Bye", "", "Yes\n\nHuman: And?"])
def test_transcripts_that_are_no_pair_are_left_out(rejected: str) -> None:
    talk = "\n\nHuman: Hi\n\nAssistant: "
    assert list(pairs_workload.transcripts({"chosen": talk + "Bye", "rejected": talk + rejected})) == []


def document(*ids: int, prompt: int) -> TokenizedExample:
    labels = [IGNORE if t + 1 < prompt else i for t, i in enumerate(ids[1:])]
    return TokenizedExample(np.array(ids, np.int32), np.array([*labels, IGNORE], np.int32), "")


def test_a_pair_is_split_where_its_answers_begin() -> None:
    tokens = pair_sides.split(document(1, 5, 6, 7, 2, prompt=3), document(1, 5, 6, 2, prompt=3))
    assert tokens == PairTokens(prompt=[1, 5, 6], chosen=[7, 2], rejected=[2])
    assert pair_sides.reward_columns([tokens]) == {
        "chosen_ids": [[1, 5, 6, 7, 2]],
        "rejected_ids": [[1, 5, 6, 2]],
    }
    assert pair_sides.dpo_columns([tokens]) == {
        "prompt_ids": [[1, 5, 6]],
        "chosen_ids": [[7, 2]],
        "rejected_ids": [[2]],
    }


def test_a_pair_with_two_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="different prompts"):
        pair_sides.split(document(1, 5, 7, 2, prompt=2), document(1, 6, 7, 2, prompt=2))


@pytest.mark.parametrize(
    "prepared",
    [
        {"chosen_ids": [[9, 2], [5, 7, 2, 3]], "rejected_ids": [[9, 2], [5, 8, 2]]},
        {
            "prompt_ids": [[9], [5]],
            "chosen_ids": [[2], [7, 2, 3]],
            "rejected_ids": [[2], [8, 2]],
        },
    ],
)
def test_what_stands_behind_our_documents_is_counted(prepared: dict[str, list[list[int]]]) -> None:
    ours = [PairTokens([5], [7, 2], [8, 2])]
    assert pair_parity.surplus(prepared, ours) == Counter({(3,): 1, (): 1})


def test_a_document_that_trl_does_not_have_is_an_error() -> None:
    prepared = {"chosen_ids": [[5, 6, 2]], "rejected_ids": [[5, 8, 2]]}
    with pytest.raises(ValueError, match="begins like"):
        pair_parity.surplus(prepared, [PairTokens([5], [7, 2], [8, 2])])


def test_tied_pairs_count_half_only_where_nothing_has_moved() -> None:
    first = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/accuracies": 0.0}
    later = {"rewards/chosen": 0.1, "rewards/rejected": 0.1, "rewards/accuracies": 0.25}
    counted = dpo_parity.with_ties_as_half([first, later])
    assert [step["rewards/accuracies"] for step in counted] == [0.5, 0.25]


def test_every_candidate_has_the_same_pairs_in_a_step() -> None:
    from benchmarks import dpo_cpu, reward_cpu

    settings = [pair_cpu.DEFAULT, *reward_cpu.CANDIDATES.values(), *dpo_cpu.CANDIDATES.values()]
    for program in (reward_cpu.PROGRAM, dpo_cpu.PROGRAM):
        settings += [chosen for named in program.best.values() for chosen in named.values()]
    sizes = {s["per_device_train_batch_size"] * s["gradient_accumulation_steps"] for s in settings}
    assert sizes == {pair_cpu.PAIRS_PER_STEP}
    assert pair_cpu.batch_sizes(4, 8) == {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="8 pairs per step are no whole number"):
        pair_cpu.batch_sizes(3, 8)


def test_pairs_are_counted_by_steps(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text('{"step": 1, "loss": 1}\n{"step": 1, "eval/accuracy": 1}\n{"step": 2, "loss": 1}\n')
    assert pair_cpu.running_pairs(file) == [32, 64]
