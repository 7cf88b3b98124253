from __future__ import annotations

import numpy as np

from common.data.pairs import prompt_length
from common.data.types import IGNORE, TokenizedExample, TokenizedPair
from common.training.preview import pair_runs
from tests.tiny import tiny_tokenizer


def side(tokens: list[int], prompt: int, untrained: tuple[int, ...] = ()) -> TokenizedExample:
    """All tokens from `prompt` on are trained but those at the places in `untrained`."""
    after = [*tokens[1:], IGNORE]
    labels = [t if at >= prompt and at not in untrained else IGNORE for at, t in enumerate(after, start=1)]
    return TokenizedExample(np.array(tokens, np.int32), np.array(labels, np.int32), "only")


def test_a_pair_is_shown_as_its_prompt_once_and_both_answers_with_what_is_trained() -> None:
    tokenizer = tiny_tokenizer()
    prompt, good, bad = (
        tokenizer(text, add_special_tokens=False).input_ids for text in ("ab", " hello", "ok")
    )
    pair = TokenizedPair(side([*prompt, *good], 2), side([*prompt, *bad, *good], 2, untrained=(3,)), 0.5)
    assert prompt_length(pair.chosen) == 2
    assert pair_runs(pair, tokenizer) == [
        ("prompt (2 tokens):\n", False),
        ("ab", False),
        ("\nchosen:\n", False),
        (" hello", True),
        ("\nrejected:\n", False),
        ("ok", True),
        (" hello", False),
        ("\nmargin: 0.5", False),
    ]


def test_answers_that_begin_alike_are_not_taken_for_the_prompt() -> None:
    pair = TokenizedPair(side([5, 6, 7, 8], 2), side([5, 6, 7, 9], 2), 0.0)
    assert prompt_length(pair.chosen) == 2
