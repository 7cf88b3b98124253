"""From files to documents on disk: cache, split, ledger, and data that cannot be used."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import DataConfig, OnBadRow, SourceConfig, TrainOn, Truncation
from common.data import cache, chat
from common.data.cache import wait_for
from common.data.dataset import (
    DEMONSTRATIONS,
    PREFERENCES,
    Kind,
    Ledger,
    PairDataset,
    TokenizedDataset,
    build,
    source_weights,
    training_texts,
)
from common.data.splits import held_out
from common.data.types import IGNORE
from common.errors import UserError
from tests.tiny import CHATML, tiny_tokenizer


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(first, first + count)]


class Said(list[str]):
    """What was reported."""

    def __call__(self, line: str) -> None:
        self.append(line)


def made(
    tmp_path: Path,
    tokenizer: Any = None,
    said: Said | None = None,
    seed: int = 0,
    kind: Kind[TokenizedDataset] = DEMONSTRATIONS,
    **options: Any,
) -> tuple[TokenizedDataset, TokenizedDataset | None, Ledger]:
    if "sources" not in options:
        options.setdefault("path", str(tmp_path / "rows.jsonl"))
    return build(
        DataConfig(**options),
        tiny_tokenizer(CHATML) if tokenizer is None else tokenizer,
        kind,
        seed=seed,
        cache_dir=tmp_path / "cache",
        report=Said() if said is None else said,
    )


def texts(documents: TokenizedDataset) -> list[str]:
    tokenizer = tiny_tokenizer()
    return [tokenizer.decode(documents[index].input_ids) for index in range(len(documents))]


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


# the cache


def test_the_same_again_is_a_hit(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(40))
    first, _, ledger = made(tmp_path)
    said = Said()
    again, _, same = made(tmp_path, said=said)
    assert said == []
    assert first.fingerprint == again.fingerprint and ledger == same


def changed(tmp_path: Path, *, tokenizer: Any = None, **options: Any) -> str:
    """Build once plainly and once changed; the line that says why the second was a miss."""
    write(tmp_path / "rows.jsonl", pairs(40))
    first, _, _ = made(tmp_path)
    said = Said()
    second, _, _ = made(tmp_path, tokenizer, said, **options)
    assert first.fingerprint != second.fingerprint
    return said[0]


def test_another_tokenizer_is_a_miss_that_says_so(tmp_path: Path) -> None:
    other = tiny_tokenizer(CHATML)
    other.add_tokens(["question"])
    assert changed(tmp_path, tokenizer=other) == "tokenizing; changed since the last time: tokenizer"


FORGETS = (
    "{% for m in messages %}{{ m.role ~ ':' }}{% if m.role != 'assistant' %}{{ m.content }}"
    "{% else %}{{ ('quiet ' if quiet) ~ (m.content if loop.last else m.content[:9]) }}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""Earlier turns are cut short: each answer needs a document of its own."""


def two_turns(count: int) -> list[dict[str, Any]]:
    said = (
        ("user", "question {}"),
        ("assistant", "answer no. {}"),
        ("user", "more"),
        ("assistant", "another {}"),
    )
    return [
        {"messages": [{"role": role, "content": content.format(n)} for role, content in said]}
        for n in range(10, 10 + count)
    ]


def test_a_row_that_is_split_counts_once_and_stays_on_one_side(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", two_turns(40))
    said = Said()
    train, evaluation, ledger = made(tmp_path, tiny_tokenizer(FORGETS), said, eval_fraction=0.1)
    assert evaluation is not None and (len(train), len(evaluation)) == (72, 8)
    for rows in (train, evaluation):
        places = [rows.place(index) for index in range(len(rows))]
        assert places[0::2] == places[1::2] and len(set(places)) == len(rows) / 2
        assert [rows.part_of_row(index) for index in (0, 1)] == [(1, 2), (2, 2)]
    (entry,) = ledger.sources
    assert (entry.rows_read, entry.rows_kept, entry.further_documents) == (40, 80, 40)
    assert Ledger.from_json(ledger.to_json()) == ledger
    lines = ledger.lines()
    assert "rows: a row can give several documents; read counts rows, the others documents" in lines
    assert any(
        line.startswith("split in rows: 40 × the chat template writes earlier turns") for line in lines
    )
    assert texts(train)[:2] == [
        "user:question 10<|im_end|>assistant:answer no. 10<|im_end|>",
        "user:question 10<|im_end|>assistant:answer no<|im_end|>"
        "user:more<|im_end|>assistant:another 10<|im_end|>",
    ]


def test_a_part_of_a_split_row_that_is_too_long_is_dropped_alone(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", two_turns(4))
    longest = 60
    train, _, ledger = made(tmp_path, tiny_tokenizer(FORGETS), max_length=longest, eval_fraction=0.0)
    assert len(train) == 4 and train.lengths.max() <= longest
    (entry,) = ledger.sources
    assert (entry.rows_read, entry.rows_kept, sum(drop.count for drop in entry.dropped.values())) == (4, 4, 4)


def test_only_the_last_turn_is_trained_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", two_turns(3))
    train, _, ledger = made(tmp_path, train_on=TrainOn.last_turn, eval_fraction=0.0)
    decode = tiny_tokenizer().decode
    labels = [document.labels for document in (train[0], train[1], train[2])]
    assert [decode(label[label != IGNORE]) for label in labels] == [
        f"another {n}<|im_end|>" for n in (10, 11, 12)
    ]
    assert not ledger.sources[0].split and not ledger.sources[0].untrained
    line = changed(tmp_path, train_on=TrainOn.last_turn)
    assert line == "tokenizing; changed since the last time: options.train_on all_turns -> last_turn"


def test_variables_of_the_template_are_the_runs_unless_the_row_has_its_own(tmp_path: Path) -> None:
    rows = pairs(2)
    rows[1]["chat_template_kwargs"] = {"quiet": False}
    write(tmp_path / "rows.jsonl", rows)
    tokenizer = tiny_tokenizer(FORGETS.replace("'assistant:'", "'assistant:' ~ ('quiet ' if quiet)"))
    train, _, _ = made(tmp_path, tokenizer, chat_template_kwargs={"quiet": True}, eval_fraction=0.0)
    assert texts(train) == [
        "user:question 0<|im_end|>assistant:quiet answer 0<|im_end|>",
        "user:question 1<|im_end|>assistant:answer 1<|im_end|>",
    ]


def test_turns_that_are_not_trained_are_counted_with_their_place(tmp_path: Path) -> None:
    opens = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")
    rows = two_turns(2)
    for row in rows:
        row["messages"][3]["content"] = "<think>so</think>" + row["messages"][3]["content"]
    path = write(tmp_path / "rows.jsonl", rows)
    train, _, ledger = made(tmp_path, tiny_tokenizer(opens), eval_fraction=0.0)
    assert len(train) == 2
    reason = "turn that does not begin with '<think>', in which its prompt ends"
    assert f"not trained in rows: 2 × {reason} ({path}:1, {path}:2)" in ledger.lines()


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_what_a_template_is_given_anyway_is_no_variable(name: str) -> None:
    with pytest.raises(UserError, match=f"data.chat_template_kwargs=.*{name}"):
        DataConfig(chat_template_kwargs={name: 1})


def test_another_template_is_a_miss_that_says_so(tmp_path: Path) -> None:
    other = tiny_tokenizer(CHATML + " ")
    assert changed(tmp_path, tokenizer=other) == "tokenizing; changed since the last time: chat_template"


def test_another_option_is_a_miss_that_says_which_and_how(tmp_path: Path) -> None:
    line = changed(tmp_path, max_length=512, truncation=Truncation.left)
    changes = "options.max_length 2048 -> 512; options.truncation drop -> left"
    assert line == f"tokenizing; changed since the last time: {changes}"


def test_another_seed_is_a_miss_that_says_so(tmp_path: Path) -> None:
    assert changed(tmp_path, seed=1).endswith("options.seed 0 -> 1")


def test_other_rows_are_a_miss_that_says_so(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(40))
    made(tmp_path)
    write(tmp_path / "rows.jsonl", pairs(41))
    said = Said()
    made(tmp_path, said=said)
    assert said[0] == "tokenizing; changed since the last time: rows.rows"


def test_changed_code_is_a_miss_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl", pairs(40))
    made(tmp_path)
    monkeypatch.setattr(cache, "_code_version", lambda: "newer")
    said = Said()
    made(tmp_path, said=said)
    assert said[0] == "tokenizing; changed since the last time: code"


def test_weights_and_the_pad_token_do_not_cost_a_new_build(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", pairs(40))
    first, _, _ = made(tmp_path, sources=[SourceConfig(path=path)])
    padded = tiny_tokenizer(CHATML)
    padded.pad_token = "</s>"
    said = Said()
    second, _, _ = made(tmp_path, padded, said, sources=[SourceConfig(path=path, weight=3.0)])
    assert said == [] and first.fingerprint == second.fingerprint


def test_an_interrupted_build_leaves_nothing_half(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(3000))
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return chat.tokenize(*arguments)

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, kind=replace(DEMONSTRATIONS, tokenize=interrupted))
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(made(tmp_path)[0]) == 2850


def test_what_a_killed_builder_left_is_cleared_away_and_never_used(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(40))
    train, _, _ = made(tmp_path)
    folder = next((tmp_path / "cache").iterdir())
    child = multiprocessing.get_context("spawn").Process(target=int)
    child.start()
    child.join()
    left = folder.with_name(f"{folder.name}.tmp-{os.uname().nodename}-{child.pid}")
    folder.rename(left)
    (left / cache.KEY_FILE).unlink()
    again, _, _ = made(tmp_path)
    assert again.fingerprint == train.fingerprint
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_cache_whose_rows_were_cut_short_is_built_again(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(40))
    before = texts(made(tmp_path)[0])
    rows = next((tmp_path / "cache").iterdir()) / cache.ROWS_FILE
    rows.write_bytes(rows.read_bytes()[:-100])
    said = Said()
    assert texts(made(tmp_path, said=said)[0]) == before
    assert said[0] == "tokenizing; the cached rows are damaged"


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(40))
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"data.cache_dir=.*cache: .*\n.*data.cache_dir"):
        made(tmp_path)


def test_others_wait_for_the_builder_without_building(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(40))
    data, tokenizer = DataConfig(path=str(tmp_path / "rows.jsonl")), tiny_tokenizer(CHATML)
    options: dict[str, Any] = {
        "kind": DEMONSTRATIONS,
        "seed": 0,
        "cache_dir": tmp_path / "cache",
        "report": Said(),
    }
    found: list[TokenizedDataset] = []
    waiter = threading.Thread(target=lambda: found.append(build(data, tokenizer, wait=True, **options)[0]))
    waiter.start()
    waiter.join(0.3)
    assert waiter.is_alive() and not (tmp_path / "cache").exists()
    train, _, _ = build(data, tiny_tokenizer(CHATML), **options)
    waiter.join(10)
    assert not waiter.is_alive() and found[0].fingerprint == train.fingerprint


def test_waiting_ends_with_an_error_when_nobody_builds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none did"):
        wait_for(tmp_path / "never", report=Said(), silence=0.05, poll=0.01)


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
    assert len(found) == 2 * len(train) == 60
    assert all(any(text in row for row in texts(train)) for text in found)


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


# pairs


def preferences(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}", "margin": n / 4}
        for n in range(first, first + count)
    ]


def made_pairs(
    tmp_path: Path, said: Said | None = None, seed: int = 0, stage: str | None = None, **options: Any
) -> tuple[PairDataset, PairDataset | None, Ledger]:
    if "sources" not in options:
        options.setdefault("path", str(tmp_path / "rows.jsonl"))
    return build(
        DataConfig(**options),
        tiny_tokenizer(CHATML),
        kind=PREFERENCES,
        stage=stage,
        seed=seed,
        cache_dir=tmp_path / "cache",
        report=Said() if said is None else said,
    )


def prompts(pairs: PairDataset | None) -> set[str]:
    """The questions, without what the template writes around them."""
    assert pairs is not None
    every = (tiny_tokenizer().decode(pairs[index].chosen.input_ids) for index in range(len(pairs)))
    return {text.partition("user\n")[2].partition("<")[0] for text in every}


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


def test_a_miss_is_explained_by_the_last_data_set_of_the_same_kind(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", preferences(40))
    made_pairs(tmp_path)
    path = write(tmp_path / "answers.jsonl", pairs(40))
    said = Said()
    made(tmp_path, said=said, path=path)
    assert said[0] == f"tokenizing; nothing of this step is cached yet in {tmp_path / 'cache'}"
    made_pairs(tmp_path, said, max_length=512)
    assert "tokenizing; changed since the last time: options.max_length 2048 -> 512" in said


def test_other_sources_are_not_listed_key_by_key(tmp_path: Path) -> None:
    made(tmp_path, path=write(tmp_path / "one.jsonl", pairs(40)))
    said = Said()
    made(tmp_path, said=said, path=write(tmp_path / "other.jsonl", pairs(41)))
    assert said[0] == "tokenizing; changed since the last time: other sources"


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
    found = {stage: set(training_texts(data, stage=stage, seed=0, report=Said())) for stage in SHARES}
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
