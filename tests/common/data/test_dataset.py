"""From files to documents on disk: split, ledger, and data that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import DataConfig, OnBadRow, SourceConfig, Truncation
from common.data.dataset import build, source_weights, training_texts
from common.data.dataset_types import DEMONSTRATIONS
from common.data.ledger import Ledger
from common.data.splits import held_out
from common.data.types import IGNORE
from common.errors import UserError
from tests.common.data.built import Said, made, made_pairs, pairs, preferences, prompts, texts, write
from tests.tiny import CHATML, tiny_tokenizer


def test_documents_come_back_as_they_were_tokenized(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(3000))
    train, evaluation, ledger = made(tmp_path)
    assert evaluation is not None and len(train) == 2850 and len(evaluation) == 150
    index = 2700  # beyond the second block of the file
    document = train[index]
    text = tiny_tokenizer().decode(document.input_ids)
    number = text.partition("question ")[2].partition("<")[0]
    assert text == (
        f"<|im_start|>user\nquestion {number}<|im_end|>\n<|im_start|>assistant\nanswer {number}<|im_end|>\n"
    )
    trained = document.labels[document.labels != IGNORE]
    assert tiny_tokenizer().decode(trained) == f"answer {number}<|im_end|>"
    assert train.lengths[index] == len(document.input_ids) and train.trained[index] == len(trained)
    assert train.lengths.dtype == np.int32 and document.input_ids.dtype == np.int32
    assert train.sources == ["rows"] and document.source == "rows" and not train.source_ids.any()
    assert ledger.sources[0].tokens == train.lengths.sum() + evaluation.lengths.sum()
    with pytest.raises(IndexError):
        train[2850]


# the held-out part


def test_equal_rows_never_sit_on_both_sides(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", pairs(60) * 3)
    second = write(tmp_path / "b.jsonl", pairs(60, 30))
    sources = [SourceConfig(path=first), SourceConfig(path=second)]
    train, evaluation, _ = made(tmp_path, sources=sources, eval_fraction=0.2)
    assert evaluation is not None
    assert len(train) + len(evaluation) == 240
    assert not set(texts(train)) & set(texts(evaluation))
    assert set(evaluation.source_ids.tolist()) == {0, 1}


def test_the_share_is_held_out_of_each_source_and_follows_the_seed() -> None:
    hashes = np.arange(1000, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    source_ids = np.array([0] * 900 + [1] * 100)
    chosen = held_out(hashes, source_ids, 0.05)
    mask = np.isin(hashes, np.array(sorted(chosen), np.uint64))
    assert mask[:900].sum() == 45 and mask[900:].sum() == 5
    assert held_out(hashes, source_ids, 0.0) == set()
    assert held_out(np.array([7, 7], np.uint64), np.array([0, 0]), 0.5) == set()  # nothing would be left


def test_another_seed_holds_out_other_rows(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(200))
    first, second = made(tmp_path, seed=0)[1], made(tmp_path, seed=1)[1]
    assert first is not None and second is not None and len(first) == len(second) == 10
    assert texts(first) != texts(second)


def test_nothing_is_held_out_when_not_wanted(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(20))
    train, evaluation, _ = made(tmp_path, eval_fraction=0.0)
    assert evaluation is None and len(train) == 20


def test_a_file_of_its_own_for_evaluation_is_kept_out_of_training(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(20))
    held = write(tmp_path / "held.jsonl", pairs(5, 18))
    train, evaluation, ledger = made(tmp_path, eval_path=held)
    assert evaluation is not None
    assert len(train) == 18 and len(evaluation) == 5
    assert ledger.sources[0].dropped["also in data.eval_path"].places == [
        f"{tmp_path / 'rows.jsonl'}:19",
        f"{tmp_path / 'rows.jsonl'}:20",
    ]
    assert evaluation.sources == ["rows", "held"] and set(evaluation.source_ids.tolist()) == {1}


def renamed(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"q": row["prompt"], "a": row["completion"]} for row in pairs(count, first)]


NAMES = {"prompt": "q", "completion": "a"}


def test_a_file_for_evaluation_is_read_by_the_columns_of_the_sources(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.jsonl", renamed(10, 10 * n)) for n in range(2)]
    held = write(tmp_path / "held.jsonl", renamed(5, 18))
    sources = [SourceConfig(path=path, columns=NAMES) for path in paths]
    for used, kept in ((sources[1:], 8), (sources, 18)):
        train, evaluation, _ = made(tmp_path, sources=used, eval_path=held)
        assert len(train) == kept and evaluation is not None and len(evaluation) == 5
        assert "question 18<" in texts(evaluation)[0]


def test_a_file_for_evaluation_with_other_columns_is_recognised_by_itself(tmp_path: Path) -> None:
    source = SourceConfig(path=write(tmp_path / "rows.jsonl", renamed(10)), columns=NAMES)
    held = write(tmp_path / "held.jsonl", [{"question": "q", "answer": "a"}])
    _, evaluation, ledger = made(tmp_path, sources=[source], eval_path=held)
    assert evaluation is not None and len(evaluation) == 1
    assert ledger.sources[1].format == "question/answer"


def test_a_file_for_evaluation_is_read_in_the_format_of_the_sources(tmp_path: Path) -> None:
    source = SourceConfig(path=write(tmp_path / "rows.jsonl", preferences(10)), format="chosen")
    held = write(tmp_path / "held.jsonl", preferences(2, first=10))
    _, evaluation, _ = made(tmp_path, sources=[source], eval_path=held)
    assert evaluation is not None and "good 10<" in texts(evaluation)[0]


def test_a_file_for_evaluation_that_nothing_says_how_to_read_is_named(tmp_path: Path) -> None:
    sources = [
        SourceConfig(path=write(tmp_path / "rows.jsonl", renamed(10)), columns=NAMES),
        SourceConfig(path=write(tmp_path / "more.jsonl", pairs(10))),
    ]
    held = write(tmp_path / "held.jsonl", renamed(5, 18))
    named = f"data.eval_path, {held}:1: no known format has the columns a, q"
    with pytest.raises(UserError, match=named) as error:
        made(tmp_path, sources=sources, eval_path=held)
    assert "is read by those too when all of data.sources have the same" in str(error.value.hint)


def test_texts_for_a_tokenizer_leave_out_what_is_held_out(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(40))
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.25)
    found = list(training_texts(data, seed=0, report=Said()))
    train, _, _ = made(tmp_path, eval_fraction=0.25)
    assert (
        len(found) == 4 * len(train) == 120
    )  # the role of each message, which templates write, and its content
    assert set(found[::2]) == {"user", "assistant"}
    assert all(any(text in row for row in texts(train)) for text in found[1::2])


# the ledger


def test_the_ledger_accounts_for_every_row(tmp_path: Path) -> None:
    rows: list[Any] = pairs(20)
    rows[3] = {"prompt": "q"}  # line 4: no completion
    rows[5] = {"prompt": "q" * 200, "completion": "a"}  # line 6: too long
    rows[7] = {"prompt": "q" * 300, "completion": "a"}  # line 8: too long
    path = write(tmp_path / "rows.jsonl", rows)
    with open(path, "a") as file:
        file.write("{broken\n")  # line 21
    said = Said()
    train, evaluation, ledger = made(tmp_path, said=said, max_length=100, on_bad_row=OnBadRow.skip)
    entry = ledger.sources[0]
    assert entry.format == "prompt/completion"
    assert (entry.rows_read, entry.rows_kept, entry.rows_held_out, entry.bad_rows) == (21, 17, 1, 2)
    assert entry.dropped["longer than data.max_length=100"].places == [f"{path}:6", f"{path}:8"]
    assert evaluation is not None and len(train) + len(evaluation) == 17
    assert [line for line in said if line.startswith("skipped")] == [
        f"skipped {path}:4: no completion (the source's format is prompt/completion)",
        f"skipped {path}:21: not valid JSON: Expecting property name enclosed in double quotes at column 2",
    ]
    lines = ledger.lines()
    assert lines[0].split() == [
        *["source", "format", "read", "kept", "held", "out", "tokens", "trained", "cut", "bad", "dropped"]
    ]
    assert lines[1].split()[:5] == ["rows", "prompt/completion", "21", "17", "1"]
    assert (
        lines[2] == f"skipped from rows: {path}:4: no completion (the source's format is prompt/completion)"
    )
    assert lines[3].startswith(f"skipped from rows: {path}:21: not valid JSON")
    assert lines[4] == f"dropped from rows: 2 × longer than data.max_length=100 ({path}:6, {path}:8)"
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


def test_cut_rows_are_counted(tmp_path: Path) -> None:
    rows = [*pairs(9), {"prompt": "q", "completion": "a" * 200}]
    write(tmp_path / "rows.jsonl", rows)
    train, _, ledger = made(tmp_path, max_length=100, truncation=Truncation.right, eval_fraction=0.0)
    assert ledger.sources[0].truncated == 1 and len(train) == 10
    assert train.lengths.max() == 100
    assert tiny_tokenizer().eos_token_id not in train[9].input_ids


def test_sources_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    first = write(tmp_path / "rows.jsonl", pairs(10))
    second = write(tmp_path / "x" / "rows.jsonl", [{"text": f"text {n}"} for n in range(10)])
    train, _, ledger = made(tmp_path, sources=[SourceConfig(path=first), SourceConfig(path=second)])
    assert train.sources == ["rows", "rows-2"]
    weighted = [SourceConfig(path=first, weight=2.0), SourceConfig(path=second)]
    assert source_weights(DataConfig(sources=weighted)) == {"rows": 2.0, "rows-2": 1.0}
    assert [entry.format for entry in ledger.sources] == ["prompt/completion", "text"]


# data that cannot be used


def test_a_row_the_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", pairs(5))
    template = (
        "{% if 'question 2' in messages[0].content %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    )
    with pytest.raises(UserError, match=f"{path}:3: the chat template refuses it: not this"):
        made(tmp_path, tiny_tokenizer(template))
    _, _, ledger = made(tmp_path, tiny_tokenizer(template), on_bad_row=OnBadRow.skip)
    assert ledger.sources[0].bad_rows == 1 and ledger.sources[0].rows_kept == 4


def test_bad_rows_of_reading_and_rendering_share_one_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*pairs(5), {"prompt": "q"}])
    template = (
        "{% if 'question 2' in messages[0].content %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    )
    with pytest.raises(UserError, match="more than data.max_bad_rows=1"):
        made(tmp_path, tiny_tokenizer(template), on_bad_row=OnBadRow.skip, max_bad_rows=1)
    assert Path(path).exists()


def test_an_unknown_role_is_named_by_place(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": [{"role": "alien", "content": "x"}]}])
    with pytest.raises(UserError, match=f"{path}:1: messages, turn 1: unknown role 'alien'"):
        made(tmp_path)


def test_a_missing_assistant_turn_is_named_by_place(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(UserError, match=f"{path}:1: no assistant turn"):
        made(tmp_path)


def test_columns_of_no_known_format_are_named_by_place(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"body": "x"}])
    with pytest.raises(UserError, match=f"{path}:1: no known format has the columns body"):
        made(tmp_path)


def test_a_data_set_without_a_row_left_says_why(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(20))
    with pytest.raises(UserError, match="no row is left to train on: .*20 × longer than data.max_length=8"):
        made(tmp_path, max_length=8)
    with pytest.raises(UserError, match="no row is left to train on"):
        made(tmp_path, max_length=8)  # also from the cache


def test_no_data_at_all_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data is named\n.*data.path"):
        made(tmp_path, path=None)


# one data set for several steps

SHARES = {"sft": 2.0, "reward": 4.0, "ppo": 4.0}


def test_steps_that_share_a_file_see_other_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", preferences(200))
    options: dict[str, Any] = {"eval_fraction": 0.0, "stage_split": SHARES}
    reward, _, ledger = made_pairs(tmp_path, stage="reward", **options)
    ppo, _, _ = made_pairs(tmp_path, stage="ppo", **options)
    # demonstrations of the same questions belong to the step that the preferences of them belong to
    source = SourceConfig(path=path, format="chosen")
    sft, _, _ = build(
        DataConfig(sources=[source], **options),
        tiny_tokenizer(CHATML),
        DEMONSTRATIONS,
        stage="sft",
        seed=0,
        cache_dir=tmp_path / "cache",
        report=Said(),
    )
    asked = {text.partition("user\n")[2].partition("<")[0] for text in texts(sft)}
    assert asked | prompts(reward) | prompts(ppo) == {f"question {n}" for n in range(200)}
    assert len(sft) + len(reward) + len(ppo) == 200
    entry = ledger.sources[0]
    assert entry.dropped["of another step (data.stage_split)"].count == 200 - len(reward)
    assert (entry.rows_read, entry.rows_kept) == (200, len(reward))


def test_texts_for_a_tokenizer_are_those_of_the_steps_rows(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(100))
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.0, stage_split=SHARES)
    roles = {"user", "assistant"}
    found = {stage: set(training_texts(data, stage=stage, seed=0, report=Said())) - roles for stage in SHARES}
    assert set().union(*found.values()) == {text for row in pairs(100) for text in row.values()}
    assert sum(map(len, found.values())) == 200 and all(found.values())


def test_another_split_is_a_miss_that_says_so(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", preferences(60))
    first, _, _ = made_pairs(tmp_path, stage="reward", stage_split=SHARES)
    said = Said()
    second, _, _ = made_pairs(tmp_path, said, stage="reward", stage_split={**SHARES, "ppo": 1.0})
    assert said[0] == "tokenizing; changed since the last time: options.stage_split.ppo 4.0 -> 1.0"
    assert len(second) > len(first)


def test_a_step_without_a_share_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", preferences(10))
    with pytest.raises(UserError, match="no share for this step, dpo"):
        made_pairs(tmp_path, stage="dpo", stage_split=SHARES)


def test_rows_for_evaluation_are_not_shared_out(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", preferences(40))
    held = write(tmp_path / "held.jsonl", preferences(20, first=40))
    _, evaluation, ledger = made_pairs(tmp_path, stage="sft", stage_split=SHARES, eval_path=held)
    assert evaluation is not None and len(evaluation) == 20 and not ledger.sources[1].dropped
