"""From files to pairs on disk: split, ledger, and real preferences where they are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import OnBadRow, SourceConfig, Truncation
from common.data.stored import PairDataset
from common.data.types import IGNORE
from common.errors import UserError
from tests.common.data.built import Said, made, made_pairs, pairs, preferences, prompts, write
from tests.tiny import CHATML, tiny_tokenizer


def test_pairs_come_back_as_they_were_tokenized(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", preferences(1500))
    train, evaluation, ledger = made_pairs(tmp_path)
    assert evaluation is not None and len(train) == 1425 and len(evaluation) == 75
    index = 1300  # beyond the first block of the file
    pair, decode = train[index], tiny_tokenizer().decode
    number = int(train.place(index).removeprefix("rows:")) - 1
    prompt = f"<|im_start|>user\nquestion {number}<|im_end|>\n<|im_start|>assistant\n"
    assert decode(pair.chosen.input_ids) == f"{prompt}good {number}<|im_end|>"
    assert decode(pair.rejected.input_ids) == f"{prompt}bad {number}<|im_end|>"
    assert decode(pair.rejected.labels[pair.rejected.labels != IGNORE]) == f"bad {number}<|im_end|>"
    assert pair.margin == number / 4 and pair.chosen.source == "rows"
    assert train.lengths[index] == len(pair.chosen.input_ids) + len(pair.rejected.input_ids)
    assert train.trained[index] == pair.chosen.trained + pair.rejected.trained
    assert train.lengths.dtype == np.int32 and train.sources == ["rows"]
    entry = ledger.sources[0]
    assert (entry.path, entry.format, entry.rows_read, entry.rows_kept) == (path, "preference", 1500, 1500)
    assert entry.tokens == train.lengths.sum() + evaluation.lengths.sum()
    with pytest.raises(IndexError):
        train[1425]


def test_pairs_from_the_cache_are_the_same(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", preferences(40))
    first, _, ledger = made_pairs(tmp_path)
    said = Said()
    again, _, same = made_pairs(tmp_path, said)
    assert said == [] and again.fingerprint == first.fingerprint and same == ledger
    assert again[3].rejected.labels.tolist() == first[3].rejected.labels.tolist()


def test_pairs_with_one_prompt_never_sit_on_both_sides(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {n % 50}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(200)
    ]
    write(tmp_path / "rows.jsonl", rows)
    train, evaluation, _ = made_pairs(tmp_path, eval_fraction=0.2)
    assert evaluation is not None and len(train) == 160 and len(evaluation) == 40
    assert len(prompts(train)) == 40 and not prompts(train) & prompts(evaluation)


def test_pairs_whose_prompt_is_in_the_evaluation_file_are_kept_out_of_training(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", preferences(20))
    other_answers = [{"prompt": f"question {n}", "chosen": "x", "rejected": "y"} for n in (18, 19, 30)]
    held = write(tmp_path / "held.jsonl", other_answers)
    train, evaluation, ledger = made_pairs(tmp_path, eval_path=held)
    assert len(train) == 18 and evaluation is not None and len(evaluation) == 3
    assert ledger.sources[0].dropped["also in data.eval_path"].count == 2


def transcripts(first_questions: list[str]) -> list[dict[str, Any]]:
    """Pairs whose prompts are all different, by what follows the first question."""
    return [
        {
            "chosen": f"\n\nHuman: {asked}\n\nAssistant: yes\n\nHuman: more {n}\n\nAssistant: good",
            "rejected": f"\n\nHuman: {asked}\n\nAssistant: yes\n\nHuman: more {n}\n\nAssistant: bad",
        }
        for n, asked in enumerate(first_questions)
    ]


def test_transcripts_that_begin_with_one_question_never_sit_on_both_sides(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", transcripts([f"question {n % 20}" for n in range(100)]))
    train, evaluation, _ = made_pairs(tmp_path, eval_fraction=0.2)
    assert evaluation is not None and len(train) == 80 and len(evaluation) == 20
    assert len(prompts(train)) == 16 and not prompts(train) & prompts(evaluation)


def test_white_space_around_a_question_makes_no_other_question(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {n}{end}", "chosen": f"good {n}", "rejected": f"bad {n}"}
        for n in range(20)
        for end in ("", " ", "\n")
    ]
    write(tmp_path / "rows.jsonl", rows)
    train, evaluation, _ = made_pairs(tmp_path, eval_fraction=0.25)
    trained, held = ({prompt.strip() for prompt in prompts(side)} for side in (train, evaluation))
    assert len(train) == 45 and len(held) == 5 and not trained & held


def test_transcripts_whose_question_is_in_the_evaluation_file_are_kept_out_of_training(
    tmp_path: Path,
) -> None:
    write(tmp_path / "rows.jsonl", transcripts([f"question {n}" for n in range(20)]))
    held = write(tmp_path / "held.jsonl", preferences(3, 18))
    train, evaluation, ledger = made_pairs(tmp_path, eval_path=held)
    assert len(train) == 18 and evaluation is not None and len(evaluation) == 3
    assert ledger.sources[0].dropped["also in data.eval_path"].count == 2


def test_dropped_pairs_are_counted_by_reason(tmp_path: Path) -> None:
    rows = preferences(8)
    rows[1] |= {"chosen": "same", "rejected": "same"}
    rows[2] |= {"chosen": ""}
    rows[3] |= {"rejected": "x" * 100}
    rows[4] |= {"margin": "wide"}
    path = write(tmp_path / "rows.jsonl", rows)
    _, _, ledger = made_pairs(
        tmp_path, max_length=100, truncation=Truncation.right, on_bad_row=OnBadRow.skip, eval_fraction=0.0
    )
    entry = ledger.sources[0]
    assert (entry.rows_read, entry.rows_kept, entry.bad_rows) == (8, 4, 1)
    assert {reason: drop.places for reason, drop in entry.dropped.items()} == {
        "chosen and rejected are the same": [f"{path}:2"],
        "chosen is empty": [f"{path}:3"],
        "cut by truncation": [f"{path}:4"],
    }
    assert f"skipped from rows: {path}:5: margin is not a finite number ('wide')" in ledger.lines()


def test_pairs_cut_on_the_left_are_counted(tmp_path: Path) -> None:
    rows = [*preferences(9), {"prompt": "q" * 100, "chosen": "good", "rejected": "bad", "margin": 0}]
    write(tmp_path / "rows.jsonl", rows)
    train, _, ledger = made_pairs(tmp_path, max_length=100, truncation=Truncation.left, eval_fraction=0.0)
    assert ledger.sources[0].truncated == 1 and len(train) == 10
    assert len(train[9].chosen.input_ids) == 100 and len(train[9].rejected.input_ids) == 99


def test_rows_of_graded_answers_account_for_all_their_pairs(tmp_path: Path) -> None:
    def row(question: str, *grades: bool) -> dict[str, Any]:
        graded = [{"is_correct": grade, "solution": f"{index}"} for index, grade in enumerate(grades)]
        return {"question": question, **{f"model{index}": answer for index, answer in enumerate(graded)}}

    rows = [row("a", True, False, False), row("b", True, True, True), row("c", True, True, False)]
    write(tmp_path / "rows.jsonl", rows)
    train, evaluation, ledger = made_pairs(tmp_path, eval_fraction=0.5)
    assert evaluation is not None and len(train) == len(evaluation) == 2  # both pairs of one question each
    assert prompts(train) | prompts(evaluation) == {"a", "c"}
    entry = ledger.sources[0]
    assert (entry.rows_read, entry.rows_kept, entry.dropped["no wrong answer"].count) == (3, 4, 1)
    assert "rows: a row can give several pairs; read counts rows, the others pairs" in ledger.lines()


def test_a_column_that_is_mapped_and_missing_is_named_with_the_mapping(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", preferences(4))
    with pytest.raises(UserError, match="data.sources.columns reads chosen from nope, and .*:1 has no such"):
        made_pairs(tmp_path, sources=[SourceConfig(path=path, columns={"chosen": "nope"})])


def test_the_way_out_depends_on_why_no_row_is_left(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", preferences(10))
    with pytest.raises(UserError) as too_long:
        made_pairs(tmp_path, max_length=4, eval_fraction=0.0)
    assert "data.max_length" in str(too_long.value.hint)
    with pytest.raises(UserError) as also_held_out:
        made_pairs(tmp_path, eval_path=path)
    assert "another data.eval_path" in str(also_held_out.value.hint)


def test_the_preferred_side_alone_can_be_a_demonstration(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", preferences(10))
    with pytest.raises(UserError, match="preference rows"):
        made(tmp_path)
    train, _, _ = made(tmp_path, sources=[SourceConfig(path=path, format="chosen")], eval_fraction=0.0)
    labels = train[4].labels
    assert tiny_tokenizer().decode(labels[labels != IGNORE]) == "good 4<|im_end|>"


def test_demonstrations_are_no_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", pairs(10))
    with pytest.raises(UserError, match=f"{path}:1: this step needs preferences.* completion, prompt"):
        made_pairs(tmp_path)


# real preferences, where they are at hand

REAL = Path(__file__).parents[4] / "shared" / "data"


@pytest.mark.skipif(not REAL.exists(), reason="needs the real data beside the project")
def test_real_transcripts_are_all_understood(tmp_path: Path) -> None:
    train, evaluation, ledger = made_pairs(
        tmp_path, path=str(REAL / "hh_rlhf" / "harmless_a.jsonl.gz"), max_length=8192
    )
    entry = ledger.sources[0]
    assert evaluation is not None and len(train) + len(evaluation) == entry.rows_kept == 1596
    assert {reason: drop.count for reason, drop in entry.dropped.items()} == {"chosen is empty": 4}
    assert entry.rows_read == 1600 and entry.bad_rows == 0


@pytest.mark.skipif(not REAL.exists(), reason="needs the real data beside the project")
def test_real_transcripts_keep_a_first_question_on_one_side(tmp_path: Path) -> None:
    path, tokenizer = str(REAL / "hh_rlhf" / "harmless_a.jsonl.gz"), tiny_tokenizer(CHATML)
    train, evaluation, _ = made_pairs(tmp_path, path=path, max_length=8192, eval_fraction=0.2)

    def first_questions(side: PairDataset | None) -> list[str]:
        assert side is not None
        every = (tokenizer.decode(side[index].chosen.input_ids) for index in range(len(side)))
        return [text.partition("user\n")[2].partition("<|im_end|>")[0].strip() for text in every]

    asked = first_questions(train) + first_questions(evaluation)
    assert len(asked) == 1596 and len(set(asked)) < 1596  # some are asked more than once
    assert not set(first_questions(train)) & set(first_questions(evaluation))


@pytest.mark.skipif(not REAL.exists(), reason="needs the real data beside the project")
def test_real_graded_answers_keep_a_question_on_one_side(tmp_path: Path) -> None:
    train, evaluation, ledger = made_pairs(
        tmp_path, path=str(REAL / "gsm8k" / "model_solutions.jsonl"), max_length=8192
    )
    assert not prompts(train) & prompts(evaluation)
    assert len(prompts(train) | prompts(evaluation)) == 731  # questions with a right and a wrong answer
    entry = ledger.sources[0]
    assert {reason: drop.count for reason, drop in entry.dropped.items()} == {
        "no right answer": 432,
        "no wrong answer": 156,
    }
    assert entry.rows_read == 1319
