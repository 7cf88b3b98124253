"""Both sides of a pair as tokens: where they end, what they train, and which pairs are dropped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.config import Truncation
from common.data.outcomes import Drop
from common.data.pairs import fit_pair, prompt_length, tokenize_pairs
from common.data.types import IGNORE, Message, Place, Preference, TokenizedExample, TokenizedPair
from common.errors import UserError
from tests.field_templates import CALLS_END_APART
from tests.tiny import CHATML, tiny_tokenizer

HERE = Place("rows.jsonl", 7)

ENDS_LATE = (
    "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ (';' if not loop.last or add_generation_prompt) }}"
    "{{ '<|im_end|>' if loop.last and m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""A template that ends the last turn in another way than those before it."""


def turns(*said: str, first: str = "user") -> tuple[Message, ...]:
    """Turns that take turns, of which the first is the user's or the assistant's."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return tuple(Message(roles[index % 2], content) for index, content in enumerate(said))


def preference(prompt: tuple[Message, ...], chosen: str | tuple[str, ...], rejected: Any) -> Preference:
    sides = [
        turns(*([side] if isinstance(side, str) else side), first="assistant") for side in (chosen, rejected)
    ]
    return Preference(prompt, sides[0], sides[1], "s", HERE, 0.25)


def tokenized(row: Preference, template: str = CHATML) -> TokenizedPair | Drop:
    return tokenize_pairs([row], tiny_tokenizer(template))[0]


def pair(row: Preference, template: str = CHATML) -> TokenizedPair:
    result = tokenized(row, template)
    assert isinstance(result, TokenizedPair), result
    return result


def trained(side: TokenizedExample) -> str:
    return tiny_tokenizer().decode(side.labels[side.labels != IGNORE])


def test_each_token_and_label_of_a_pair_is_the_one_worked_out_by_hand() -> None:
    found = pair(preference(turns("a"), "hello", "ok hello"))
    tokenizer = tiny_tokenizer()
    prompt = ["<|im_start|>", *"user", "Ċ", "a", "<|im_end|>", "Ċ", "<|im_start|>", *"assistant", "Ċ"]
    chosen = tokenizer.convert_ids_to_tokens(found.chosen.input_ids.tolist())
    rejected = tokenizer.convert_ids_to_tokens(found.rejected.input_ids.tolist())
    # the line break that the template writes behind the terminator is cut
    assert chosen == [*prompt, "hello", "<|im_end|>"]
    assert rejected == [*prompt, "ok", "Ġhello", "<|im_end|>"]
    hello, ok, after, end = tokenizer.convert_tokens_to_ids(["hello", "ok", "Ġhello", "<|im_end|>"])
    assert found.chosen.labels.tolist() == [IGNORE] * 19 + [hello, end, IGNORE]
    assert found.rejected.labels.tolist() == [IGNORE] * 19 + [ok, after, end, IGNORE]
    assert prompt_length(found.chosen) == prompt_length(found.rejected) == len(prompt) == 20
    assert found.margin == 0.25 and found.chosen.source == "s"
    assert found.chosen.input_ids.dtype == found.chosen.labels.dtype == np.int32


def test_answers_in_the_prompt_are_not_trained_and_those_behind_it_all_are() -> None:
    found = pair(preference(turns("a", "earlier", "b"), ("hello", "more?", "ok"), "no"))
    assert trained(found.chosen) == "hello<|im_end|>ok<|im_end|>"
    assert trained(found.rejected) == "no<|im_end|>"


def test_prompts_whose_tokens_differ_between_the_sides_are_legal() -> None:
    row = preference(turns("a"), ("hello", "b", "ok"), "hello")
    found = pair(replace(row, chosen=(replace(row.chosen[0], trained=False), *row.chosen[1:])), ENDS_LATE)
    assert prompt_length(found.chosen) > prompt_length(found.rejected)
    assert trained(found.chosen) == "ok<|im_end|>"
    assert trained(found.rejected) == "hello<|im_end|>"


def test_a_response_whose_turns_need_prompts_of_their_own_is_dropped_with_the_reason() -> None:
    result = tokenized(preference(turns("a"), ("hello", "b", "ok"), "hello"), ENDS_LATE)
    assert isinstance(result, Drop) and result.reason.startswith(
        "chosen: several turns to compare, and the chat"
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("hello", "hello", "chosen and rejected are the same"),
        (" ", "hello", "chosen is empty"),
        ("hello", "", "rejected is empty"),
        ("", "\n", "both sides are empty"),
    ],
)
def test_sides_that_cannot_be_compared_drop_the_pair(chosen: str, rejected: str, reason: str) -> None:
    assert tokenized(preference(turns("a"), chosen, rejected)) == Drop(reason, HERE)


def test_sides_that_the_template_makes_equal_are_the_same() -> None:
    strips = CHATML.replace("message['content'] + '<|im_end|>' }}{% endgen", "message['content'] | trim "
                            "}}{{ '<|im_end|>' }}{% endgen")  # fmt: skip
    assert strips != CHATML
    result = tokenized(preference(turns("a"), "hello", " hello"), strips)
    assert result == Drop("chosen and rejected are the same", HERE)


def test_a_side_that_the_template_does_not_end_has_no_terminator() -> None:
    # an answer that begins with "cut" is written without its end
    unended = CHATML.replace(
        "message['content'] + '<|im_end|>' }}{% endgen",
        "message['content'] }}{{ '' if message['content'].startswith('cut') else '<|im_end|>' }}{% endgen",
    )
    assert unended != CHATML
    rows = [preference(turns("a"), "cut", "ok"), preference(turns("a"), "hello", "ok")]
    results = tokenize_pairs(rows, tiny_tokenizer(unended))
    assert results[0] == Drop("no terminator", HERE) and isinstance(results[1], TokenizedPair)


def test_a_call_is_compared_with_an_answer_though_they_end_with_other_tokens() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    row = preference(turns("a"), "ok", "ok")
    row = replace(row, chosen=(Message("assistant", "", {"tool_calls": [call]}),))
    made = pair(row, CALLS_END_APART)
    ends = [int(side.input_ids[-1]) for side in (made.chosen, made.rejected)]
    assert tiny_tokenizer().convert_ids_to_tokens(ends) == ["<|eot_id|>", "<|im_end|>"]


def test_a_template_that_refuses_a_side_makes_the_row_bad_and_names_the_side() -> None:
    picky = "{% if 'bad' in messages[-1].content %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    result = tokenized(preference(turns("a"), "hello", "bad"), picky)
    assert result == Drop("rejected: the chat template refuses it: not this", HERE, faulty=True)


def test_a_template_whose_turns_do_not_end_in_one_token_is_refused() -> None:
    endless = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ ' END\n' }}{% endfor %}"
    with pytest.raises(UserError, match="not one token"):
        tokenized(preference(turns("a"), "hello", "ok"), endless)


# fitting: the prompt is 0 to 4, a side's last token is 9


def side(*response: int, prompt: int = 5, bos: bool = False) -> TokenizedExample:
    """`prompt` tokens 10, 11, ..., of which the first is 1 with `bos`; then the response."""
    ids = [*range(10, 10 + prompt), *response]
    if bos:
        ids[0] = 1
    labels = [IGNORE] * (prompt - 1) + [*response, IGNORE]
    return TokenizedExample(np.array(ids, np.int32), np.array(labels, np.int32), "s")


def fitted(long: TokenizedExample, short: TokenizedExample, length: int, how: Truncation) -> Any:
    result = fit_pair(TokenizedPair(long, short, 0.5), HERE, length, how, bos_id=1)
    turned = fit_pair(TokenizedPair(short, long, 0.5), HERE, length, how, bos_id=1)
    assert isinstance(result, Drop) == isinstance(turned, Drop)  # whichever side is the longer one
    return result


LONG, SHORT = side(7, 8, 9), side(6, 9)  # 8 and 7 tokens


@pytest.mark.parametrize("how", list(Truncation))
def test_a_pair_that_fits_is_left_alone(how: Truncation) -> None:
    found = fitted(LONG, SHORT, 8, how)
    assert found.chosen is LONG and found.rejected is SHORT


def test_a_pair_with_one_side_too_long_is_dropped() -> None:
    assert fitted(LONG, SHORT, 7, Truncation.drop) == Drop("longer than data.max_length=7", HERE)


def test_a_cut_on_the_right_would_take_the_terminator() -> None:
    assert fitted(LONG, SHORT, 7, Truncation.right) == Drop("cut by truncation", HERE)


def test_a_cut_on_the_left_takes_as_much_from_both_sides() -> None:
    found = fitted(LONG, SHORT, 6, Truncation.left)
    assert found.chosen.input_ids.tolist() == [12, 13, 14, 7, 8, 9]
    assert found.chosen.labels.tolist() == [IGNORE, IGNORE, 7, 8, 9, IGNORE]
    assert found.rejected.input_ids.tolist() == [12, 13, 14, 6, 9]
    assert found.rejected.labels.tolist() == [IGNORE, IGNORE, 6, 9, IGNORE]
    assert found.margin == 0.5


def test_a_cut_on_the_left_keeps_the_bos() -> None:
    found = fitted(side(7, 8, 9, bos=True), side(6, 9, bos=True), 6, Truncation.left)
    assert found.chosen.input_ids.tolist() == [1, 13, 14, 7, 8, 9]
    assert found.rejected.input_ids.tolist() == [1, 13, 14, 6, 9]


def test_a_cut_never_takes_the_last_token_before_a_response() -> None:
    assert fitted(LONG, SHORT, 4, Truncation.left).chosen.input_ids.tolist() == [14, 7, 8, 9]
    assert fitted(LONG, SHORT, 3, Truncation.left) == Drop("cut by truncation", HERE)
    # behind a BOS there is one token less to take
    begun = side(7, 8, 9, bos=True), side(6, 9, bos=True)
    assert fitted(*begun, 5, Truncation.left).chosen.input_ids.tolist() == [1, 14, 7, 8, 9]
    assert fitted(*begun, 4, Truncation.left) == Drop("cut by truncation", HERE)


def test_a_cut_counts_the_prompt_of_either_side() -> None:
    # the longer side could lose four tokens, the other has only two before its response
    assert fitted(LONG, side(6, 9, prompt=2), 6, Truncation.left) == Drop("cut by truncation", HERE)
