from __future__ import annotations

import numpy as np

from common.data.types import IGNORE, TokenizedExample
from step1_sft.preview import runs
from tests.tiny import tiny_tokenizer


def test_a_document_is_shown_as_stretches_of_trained_and_other_tokens() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ab hello ok", add_special_tokens=False).input_ids
    assert [tokenizer.decode([token]) for token in ids] == ["a", "b", " hello", " ", "ok"]
    # labels say what comes next: " hello" and "ok" are trained
    labels = [IGNORE, ids[2], IGNORE, ids[4], IGNORE]
    example = TokenizedExample(np.array(ids, np.int32), np.array(labels, np.int32), "only")
    assert runs(example, tokenizer) == [("ab", False), (" hello", True), (" ", False), ("ok", True)]
