from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from common.config import DataConfig
from common.data.dataset import build
from common.data.dataset_types import DEMONSTRATIONS
from common.data.types import IGNORE, TokenizedExample
from common.training.preview import document_runs
from step1_sft.dry_run import which
from tests.tiny import CHATML, tiny_tokenizer


def test_a_document_is_shown_as_stretches_of_trained_and_other_tokens() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ab hello ok", add_special_tokens=False).input_ids
    assert [tokenizer.decode([token]) for token in ids] == ["a", "b", " hello", " ", "ok"]
    # labels say what comes next: " hello" and "ok" are trained
    labels = [IGNORE, ids[2], IGNORE, ids[4], IGNORE]
    example = TokenizedExample(np.array(ids, np.int32), np.array(labels, np.int32), "only")
    assert document_runs(example, tokenizer) == [("ab", False), (" hello", True), (" ", False), ("ok", True)]


def test_a_real_control_token_is_told_from_text_that_reads_the_same() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    real = tokenizer.convert_tokens_to_ids("</s>")
    letters = tokenizer.convert_tokens_to_ids(["<", "/", "s", ">"])
    ids = np.array([*letters, real, real], np.int32)
    example = TokenizedExample(ids, np.array([*[IGNORE] * 3, real, real, IGNORE], np.int32), "only")
    assert document_runs(example, tokenizer, marked=True) == [("</s>", False), ("*</s>**</s>*", True)]
    assert document_runs(example, tokenizer) == [("</s>", False), ("</s></s>", True)]


def test_a_document_of_a_split_row_says_which_it_is(tmp_path: Path) -> None:
    cut = (
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else m.content[:9] }}"
        "{{ '<|im_end|>' }}{% endfor %}"
    )
    said = [{"role": role, "content": "hello hello"} for role in ("user", "assistant", "user", "assistant")]
    rows = [{"messages": said}, {"messages": said[:2]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.0)
    train, _, _ = build(
        data, tiny_tokenizer(cut), DEMONSTRATIONS, seed=0, cache_dir=tmp_path / "cache", report=print
    )
    first, second, alone = (which(train, index) for index in range(3))
    assert first == [("document 1 of 2 of rows:1, behind a prompt of its own:\n", False)]
    assert second == [("document 2 of 2 of rows:1, behind a prompt of its own:\n", False)]
    assert alone == []
