"""The cache of tokenized rows: what is a hit, what is a miss that says why, and what is never half there."""

from __future__ import annotations

import ast
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import DataConfig, SourceConfig, TrainOn, Truncation
from common.data import cache, chat
from common.data.dataset_types import DEMONSTRATIONS
from common.data.ledger import Ledger
from common.data.types import IGNORE
from common.errors import UserError
from common.fields import as_schema
from tests.common.data.built import Said, made, made_pairs, pairs, preferences, texts, write
from tests.tiny import CHATML, tiny_tokenizer


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
    with pytest.raises(UserError, match=f"sft.data.chat_template_kwargs=.*{name}"):
        as_schema(DataConfig, {"chat_template_kwargs": {name: 1}}, "sft.data.")


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


def test_all_code_that_decides_tokens_is_known_by_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what lies outside of the package: all that it imports, but for what bounds, reads and spreads."""
    read: set[Path] = set()
    plain = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.add(path) or plain(path))
    cache._code_version()
    folder = Path(str(cache.__file__)).parent
    found = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common"):
                names = [alias.name for alias in node.names] if node.module == "common" else [node.module[7:]]
                found |= {name for name in names if not name.startswith("data")}
    bounds = {"artifacts", "config", "download", "errors", "files", "hub_data", "limited", "listing", "paths"}
    spreads = {"cores", "pool"}
    decides = found - bounds - spreads
    assert decides == {"chat_template", "text"}
    assert {folder.parent / f"{name}.py" for name in decides} <= read
    assert {path for path in folder.glob("*.py") if path.name not in cache.NOT_OF_ROWS} <= read


def test_weights_and_the_pad_token_do_not_cost_a_new_build(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", pairs(40))
    first, _, _ = made(tmp_path, sources=[SourceConfig(path=path)])
    padded = tiny_tokenizer(CHATML)
    padded.pad_token = "</s>"
    said = Said()
    second, _, _ = made(tmp_path, padded, said, sources=[SourceConfig(path=path, weight=3.0)])
    assert said == [] and first.fingerprint == second.fingerprint


def test_an_interrupted_build_goes_on_and_leaves_nothing_half(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(3000))
    calls = []

    def interrupted(rows: Any, tokenizer: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return chat.tokenize(rows, tokenizer)

    kind = replace(DEMONSTRATIONS, tokenize=interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, kind=kind, processes=1)
    (left,) = (tmp_path / "cache").iterdir()
    assert [path.name for path in left.glob("*.npz")] == ["0_000000000.npz"]
    assert len(made(tmp_path, kind=kind, processes=1)[0]) == 2850
    # the first block tells the format; the second is there; the third was never made
    assert calls == [1024, 1024, 952, 1024, 952]
    assert not left.exists() and len(list((tmp_path / "cache").iterdir())) == 1


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


def overwrite(folder: Path) -> None:
    """Other token ids in place of the cached ones, in a file of the same size."""
    (file,) = folder.glob(f"cache/*/{cache.ROWS_FILE}")
    content = bytearray(file.read_bytes())
    middle = content.index(np.array(made(folder)[0][0].input_ids[:4]).tobytes())
    content[middle : middle + 4] = np.array([7], np.int32).tobytes()
    file.unlink()  # those who have it open go on reading the old one
    file.write_bytes(content)


def test_rows_that_were_overwritten_in_the_same_size_are_built_again(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(40))
    before = texts(made(tmp_path)[0])
    overwrite(tmp_path)
    said = Said()
    after, _, _ = made(tmp_path, said=said)
    assert said[0] == "tokenizing; the cached rows are damaged"
    assert texts(after) == before


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(40))
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write .*cache/.*: a file is in .*\n.*data.cache_dir"):
        made(tmp_path)


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
