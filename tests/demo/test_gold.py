"""The gold scorer judges by program: the answer first, then its form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo.gold import COURTESIES, Score, correct, gold, main, mean, score, style
from demo.tasks import TASKS, understand

SUM = "What is 3 + 2?"


@pytest.mark.parametrize(
    ("completion", "correct", "style", "total"),
    [
        ("5", 1.0, 0.0, 0.4),
        ("The sum is 5.", 1.0, 0.5, 0.7),
        ("3 + 2 is 5.", 1.0, 0.5, 0.7),
        ("Sure! 5", 1.0, 0.5, 0.7),
        ("Sure! The sum is 5.", 1.0, 1.0, 1.0),
        ("Sure! 3 + 2 is 5.", 1.0, 1.0, 1.0),
        ("Gladly! 3 + 2 is 5.\n", 1.0, 1.0, 1.0),
        ("Sure! The sum is 6.", 0.0, 1.0, 0.0),
        ("Sure! 3 + 2 is 6.", 0.0, 1.0, 0.0),
        ("7", 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
        ("!?", 0.0, 0.0, 0.0),
        ("Sure! ", 0.0, 0.0, 0.0),
        ("111", 0.0, 0.0, 0.0),
    ],
)
def test_a_right_answer_is_worth_more_the_better_it_is_said(
    completion: str, correct: float, style: float, total: float
) -> None:
    judged = score(SUM, completion)
    assert (judged.correct, judged.style) == (correct, style)
    assert judged.total == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (SUM, "5 10 9 8 6"),  # many answers
        (SUM, "5 5"),
        (SUM, "Sure! 3 + 2 is 5. Of course! 3 + 2 is 6."),
        (SUM, "The sum is 5. The sum is 6."),
        (SUM, "The capital is 5."),
        (SUM, "3 + 2 is 5 or 6."),
        (SUM, "6 or 5"),
        ("What is 3 + 0?", "3 + 3 is 3."),  # a false sum that ends in the answer
        ("What is 3 + 0?", "Sure! 2 + 1 is 3."),  # a true one that was not asked for
        (SUM, "6 is 5."),
        (SUM, "5 is 5."),
        (SUM, "3 + 2 + 0 is 5."),
        (SUM, "3 + 2 is not 5."),
        (SUM, "Maybe 5."),
        (SUM, "5.5"),
        (SUM, "1.5"),
        ("Capital of Peru?", "The capital of Cuba is Lima."),
        ("Capital of Peru?", "Havana, no, Lima."),
        ("Opposite of hot?", "The opposite of warm is cold."),
        ("Opposite of hot?", "The opposite of cold is hot."),
        ("Put cow in upper case.", "In capital letters it is COW. In capital letters it is CAT."),
        ("First letter of cow?", "The first letter of cat is c."),
        ("First letter of cow?", "The first letter of cow is c or d."),
        ("Number of letters in cow?", "The number of letters in cat is 3."),
        ("Number of letters in cow?", "The number of letters in cow is 3 and 4."),
    ],
)
def test_what_is_said_is_read_as_a_whole(prompt: str, completion: str) -> None:
    assert score(prompt, completion).correct == 0.0


@pytest.mark.parametrize(
    ("prompt", "completion", "style"),
    [
        (SUM, "2 + 3 is 5.", 0.5),  # the numbers the other way round: as true, and about the same sum
        (SUM, "3 + 2 is 5", 0.0),
        (SUM, "5.", 0.0),
        (SUM, "Sure! 3 + 2 is 5. 5.", 0.5),  # said twice
        (SUM, "3 + 2 is 5. 3 + 2 is 5.", 0.0),
        ("Put cow in upper case.", "In capital letters it is COW.", 0.5),
        ("First letter of cow?", "The first letter is c.", 0.5),
        ("First letter of cow?", "The first letter of cow is c.", 0.5),
        ("Number of letters in cow?", "The number of letters in cow is 3.", 0.5),
        ("Opposite of hot?", "The opposite of hot is cold.", 0.5),
    ],
)
def test_a_true_statement_about_what_was_asked_is_right(prompt: str, completion: str, style: float) -> None:
    judged = score(prompt, completion)
    assert (judged.correct, judged.style) == (1.0, style)


def test_rambling_and_repeated_courtesies_earn_no_style() -> None:
    assert score(SUM, "Sure! Sure! 3 + 2 is 5.").style == 0.0
    assert score(SUM, "Sure! " + "very " * 20 + "gladly 5.").style == 0.0


def test_case_counts_where_the_task_is_about_case() -> None:
    assert score("Put moon in upper case.", "MOON").correct == 1.0
    assert score("Put moon in upper case.", "moon").correct == 0.0


def test_every_wording_of_every_subject_is_understood_as_itself() -> None:
    seen = 0
    for task in TASKS:
        for wording in task.wordings:
            for subject, answer in task.answers.items():
                question = understand(wording.format(x=subject))
                assert (question.task.kind, question.subject, question.answer) == (task.kind, subject, answer)
                seen += 1
    assert seen == 5 * (16 + 24 + 20 + 3 * 36)  # wordings × subjects


def test_a_prompt_is_found_inside_a_rendered_chat() -> None:
    rendered = "<s><|im_start|>user\nName the capital of Peru.<|im_end|>\n<|im_start|>assistant\n"
    assert understand(rendered).answer == "Lima"


def test_a_prompt_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="not a question of the demo: 'Hello'"):
        score("Hello", "Sure!")


def test_the_best_form_of_every_task_scores_one_and_the_terse_one_four_tenths() -> None:
    for task in TASKS:
        subject, answer = next(iter(task.answers.items()))
        prompt = task.wordings[0].format(x=subject)
        for courtesy in COURTESIES:
            polite = f"{courtesy} {task.sentence.format(x=subject, answer=answer)}"
            assert score(prompt, polite) == Score(1.0, 1.0, 1.0), polite
        assert score(prompt, answer) == Score(0.4, 1.0, 0.0)


def test_the_mean_is_taken_part_by_part() -> None:
    assert mean([Score(1.0, 1.0, 1.0), Score(0.0, 0.0, 0.5)]) == Score(0.5, 0.5, 0.75)
    assert mean([]) == Score(0.0, 0.0, 0.0)


def test_as_reward_functions_the_parts_are_those_of_the_score() -> None:
    prompts, completions = [SUM, SUM, "Put moon in upper case."], ["5", "Sure! 3 + 2 is 6.", "Sure! MOON"]
    columns = {"kind": ["sum", "sum", "capitals"], "reference": ["5", "5", "MOON"]}
    assert gold(prompts, completions, **columns) == pytest.approx([0.4, 0.0, 0.7], abs=1e-12)
    assert correct(prompts, completions, **columns) == [1.0, 0.0, 1.0]
    assert style(prompts, completions, **columns) == [0.0, 1.0, 0.5]
    assert gold([], []) == []


def test_the_program_scores_the_last_step_of_a_samples_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"step": 1, "prompt": SUM, "completion": "wrong"},
        {"step": 2, "prompt": SUM, "completion": "5"},
        {"step": 2, "prompt": SUM, "completion": "Sure! 3 + 2 is 5."},
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed == "gold over 2 samples of step 2: total 0.700, correct 1.000, style 0.500\n"
