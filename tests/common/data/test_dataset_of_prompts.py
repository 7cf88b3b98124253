"""From files to prompts on disk: each kept once, with its columns, and room for a response."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import DataConfig, OnBadRow, SourceConfig, Truncation
from common.data.dataset import build
from common.data.dataset_types import PREFERENCES, PROMPTS, DatasetType, prompts_with_room
from common.data.ledger import Ledger
from common.data.stored import PromptDataset
from common.errors import UserError
from tests.tiny import CHATML, tiny_tokenizer


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"what is {n}?", "answer": f"{n}", "at": [n]} for n in range(first, first + count)]


def made(
    tmp_path: Path, *, kind: DatasetType[PromptDataset] = PROMPTS, stage: str | None = None, **options: Any
) -> tuple[PromptDataset, PromptDataset | None, Ledger]:
    if "sources" not in options:
        options.setdefault("path", str(tmp_path / "rows.jsonl"))
    return build(
        DataConfig(**options), tiny_tokenizer(CHATML), kind=kind, stage=stage, seed=0,
        cache_dir=tmp_path / "cache", report=lambda line: None,
    )  # fmt: skip


def text_of(ids: np.ndarray) -> str:
    return str(tiny_tokenizer().decode(ids))


def asked(prompts: PromptDataset | None) -> list[Any]:
    assert prompts is not None
    return [prompts[index].prompt for index in range(len(prompts))]


def test_prompts_come_back_with_their_tokens_and_columns(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", questions(3000))
    train, held_out, ledger = made(tmp_path)
    assert held_out is not None and (len(train), len(held_out)) == (2850, 150)
    index = 2700  # beyond the second block of the file
    found = train[index]
    number = found.columns["answer"]
    assert found.columns == {"answer": number, "at": [int(str(number))]}
    assert found.prompt == f"what is {number}?"
    assert tiny_tokenizer().decode(found.input_ids) == (
        f"<|im_start|>user\nwhat is {number}?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert train.lengths[index] == len(found.input_ids) and train.lengths.dtype == np.int32
    assert train.place(index) == f"rows:{int(str(number)) + 1}"
    assert train.sources == [found.source] == ["rows"] and not train.source_ids.any()
    assert ledger.sources[0].tokens == train.lengths.sum() + held_out.lengths.sum()
    assert ledger.sources[0].trained_tokens == 0 and not train.trained.any()
    with pytest.raises(IndexError):
        train[2850]


def test_messages_and_letters_beyond_ascii_come_back_as_they_were(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "größer? 你好 🙂"}]
    write(tmp_path / "rows.jsonl", [{"prompt": turns, "reference": "ü"}])
    train, _, _ = made(tmp_path, eval_fraction=0.0)
    assert train[0].prompt == turns and train[0].columns == {"reference": "ü"}


def test_a_prompt_is_kept_once_however_many_rows_and_sources_ask_it(tmp_path: Path) -> None:
    first = write(tmp_path / "one.jsonl", [*questions(3), *questions(3)])
    second = write(tmp_path / "two.jsonl", [{"prompt": "what is 1?"}, {"prompt": "what is 9?"}])
    train, _, ledger = made(
        tmp_path, sources=[SourceConfig(path=first), SourceConfig(path=second)], eval_fraction=0.0
    )
    assert asked(train) == [f"what is {n}?" for n in (0, 1, 2, 9)]
    assert train[1].columns["answer"] == "1"  # of the first row that asks it
    one, two = ledger.sources
    assert (one.rows_read, one.rows_kept, two.rows_read, two.rows_kept) == (6, 3, 2, 1)
    reason = "the same prompt as an earlier row"
    assert one.dropped[reason].count == 3 and one.dropped[reason].places[0] == f"{first}:4"
    assert two.dropped[reason].count == 1


def test_the_same_question_behind_other_turns_is_another_prompt_on_the_same_side(tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        opening = {"role": "user", "content": f"question {number}"}
        reply, more = {"role": "assistant", "content": "ok"}, {"role": "user", "content": "more"}
        rows += [{"messages": [opening]}, {"messages": [opening, reply, more]}]
    write(tmp_path / "rows.jsonl", rows)
    train, held_out, _ = made(tmp_path, eval_fraction=0.2)
    assert held_out is not None and len(train) + len(held_out) == 80
    openings = [{prompt[0]["content"] for prompt in asked(part)} for part in (train, held_out)]
    assert len(openings[1]) == 8 and not openings[0] & openings[1]


def test_prompts_too_long_for_a_response_are_counted_under_their_reason(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "a" * 30}])
    train, _, ledger = made(tmp_path, kind=prompts_with_room(20), max_length=40, eval_fraction=0.0)
    assert asked(train) == ["a"] and train.lengths[0] == 20
    reason = "longer than data.max_length=40 less the 20 tokens kept for a response (max_new_tokens)"
    assert {name: drop.count for name, drop in ledger.sources[0].dropped.items()} == {reason: 1}
    cut, _, ledger = made(
        tmp_path, kind=prompts_with_room(20), max_length=40, truncation=Truncation.left, eval_fraction=0.0
    )
    assert cut.lengths.tolist() == [20, 20] and ledger.sources[0].truncated == 1
    assert text_of(cut[1].input_ids).endswith("a<|im_end|>\n<|im_start|>assistant\n")


def test_what_no_prompt_fits_into_names_the_setting(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", questions(2))
    with pytest.raises(UserError, match="less the 30 tokens kept") as caught:
        made(tmp_path, kind=prompts_with_room(30), max_length=40)
    assert caught.value.hint == "see data.max_length, data.truncation"


def test_a_bad_row_is_skipped_and_counted_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": [{"role": "assistant", "content": "hello"}]}])
    with pytest.raises(UserError, match=r"rows.jsonl:2: no user turn"):
        made(tmp_path, eval_fraction=0.0)
    train, _, ledger = made(tmp_path, eval_fraction=0.0, on_bad_row=OnBadRow.skip)
    assert len(train) == 1 and ledger.sources[0].bad_rows == 1


def test_held_out_prompts_of_a_file_of_their_own_are_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", questions(10))
    held = write(tmp_path / "held.jsonl", [{"question": f"what is {n}?", "kind": "x"} for n in (3, 4, 50)])
    train, held_out, ledger = made(tmp_path, eval_path=held)
    assert asked(held_out) == [f"what is {n}?" for n in (3, 4, 50)]
    assert held_out is not None and held_out[0].columns == {"kind": "x"}
    assert asked(train) == [f"what is {n}?" for n in range(10) if n not in (3, 4)]
    assert ledger.sources[0].dropped["also in data.eval_path"].count == 2


def test_steps_that_share_out_the_rows_share_out_the_questions(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "chosen": "good", "rejected": "bad"} for n in range(200)]
    write(tmp_path / "rows.jsonl", rows)
    shares = {"reward": 1.0, "ppo": 1.0}
    prompts, _, _ = made(tmp_path, stage="ppo", stage_split=shares, eval_fraction=0.0)
    pairs, _, _ = build(
        DataConfig(path=str(tmp_path / "rows.jsonl"), stage_split=shares, eval_fraction=0.0),
        tiny_tokenizer(CHATML), kind=PREFERENCES, stage="reward", seed=0, cache_dir=tmp_path / "cache",
        report=lambda line: None,
    )  # fmt: skip
    assert 60 < len(prompts) < 140 and len(prompts) + len(pairs) == 200
    asked_of_pairs = {text_of(pairs[i].chosen.input_ids).split("\n")[1][:-10] for i in range(len(pairs))}
    assert "question 0" in asked_of_pairs | set(asked(prompts))
    assert not asked_of_pairs & set(asked(prompts))


def fingerprint(tmp_path: Path, **options: Any) -> str:
    return made(tmp_path, **options)[0].fingerprint


def test_all_that_decides_prompts_decides_where_they_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", questions(40))
    plain = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == plain
    others = {
        "room": fingerprint(tmp_path, kind=prompts_with_room(3)),
        "length": fingerprint(tmp_path, max_length=100),
        "truncation": fingerprint(tmp_path, truncation=Truncation.left),
        "fraction": fingerprint(tmp_path, eval_fraction=0.5),
    }
    write(tmp_path / "rows.jsonl", [{**row, "answer": "0"} for row in questions(40)])
    others["column"] = fingerprint(tmp_path)  # the prompts are the same, what rewards read is not
    assert made(tmp_path)[0][0].columns["answer"] == "0"
    assert len({plain, *others.values()}) == 1 + len(others), others
