"""SFT, reward, DPO and PPO read a row's prompt as the same tokens, under every kind of template."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.chat_templates import _MARKERS, trl_templates
from common.config import DataConfig
from common.data.dataset_types import DEMONSTRATIONS, PREFERENCES, PROMPTS
from common.data.outcomes import Drop, RowRecords
from common.data.pairs import prompt_length
from common.data.reader import with_options
from common.data.types import Place, RawExample
from common.errors import UserError
from tests.field_templates import EVERY
from tests.tiny import CHATML, tiny_tokenizer, wordpiece_tokenizer

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "clock", "arguments": {"zone": "x"}}}

SYSTEM = {"role": "system", "content": "name"}
ASKED, ANSWERED = {"role": "user", "content": "name a river"}, {"role": "assistant", "content": "the elbe"}
AGAIN = {"role": "user", "content": "hello\n\n"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "a river", "tool_call_id": "abcdefghi", "name": "clock"}

PROMPTS_OF_ROWS: dict[str, list[dict[str, Any]]] = {
    "one turn": [ASKED],
    "system": [SYSTEM, ASKED],
    "several turns": [ASKED, ANSWERED, AGAIN],
    "system, several turns": [SYSTEM, ASKED, ANSWERED, AGAIN],
    "call": [ASKED, CALLED, RESULT],
    "reasoning": [ASKED, {**ANSWERED, "reasoning_content": "a a"}, AGAIN],
}
ANSWERS = ({}, {"reasoning_content": "river"})
TEMPLATES = {"chatml": CHATML, **EVERY, **trl_templates()}


def made_of(kind: Any, columns: dict[str, Any], tokenizer: Any, data: DataConfig) -> Any:
    """The last record of the row, or why there is none."""
    raw = RawExample(columns, "s", Place("rows.jsonl", 1))
    format = kind.recognise(columns, name=None, origin="rows")
    found = kind.read(raw, format, {})
    (row,) = found if isinstance(found, list) else [found]
    try:
        (result,) = kind.tokenize([with_options(row, data)], tokenizer)
    except UserError as error:
        return Drop(str(error), raw.place)
    return result.records[-1] if isinstance(result, RowRecords) else result


def prompts_of(
    turns: list[dict[str, Any]], more: dict[str, Any], given: dict[str, Any], tokenizer: Any
) -> Any:
    """The prompt's tokens as PPO, SFT, and reward and DPO on both sides read them; or why they cannot."""
    answer, other = {**ANSWERED, **more}, {**ANSWERED, **more, "content": "elbe"}
    data = DataConfig(chat_template_kwargs={"enable_thinking": False})
    sampled = made_of(PROMPTS, {"prompt": turns, **given}, tokenizer, data)
    shown = made_of(DEMONSTRATIONS, {"messages": [*turns, answer], **given}, tokenizer, data)
    pair = made_of(
        PREFERENCES, {"prompt": turns, "chosen": [answer], "rejected": [other], **given}, tokenizer, data
    )
    if any(isinstance(result, Drop) for result in (sampled, shown, pair)):
        return (sampled, shown, pair)
    last = np.flatnonzero(np.diff((shown.labels != -100).astype(int)) == 1)
    begin = int(last[-1]) + 2 if len(last) else prompt_length(shown)
    sides = (pair.chosen, pair.rejected)
    return [
        sampled.input_ids.tolist(),
        shown.input_ids[:begin].tolist(),
        *(side.input_ids[: prompt_length(side)].tolist() for side in sides),
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_step_reads_a_rows_prompt_as_the_same_tokens(name: str) -> None:
    tokenizer, compared = tiny_tokenizer(TEMPLATES[name], adds_bos=True), 0
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted(set(_MARKERS.findall(TEMPLATES[name])))}
    )
    for row, turns in PROMPTS_OF_ROWS.items():
        for more in ANSWERS:
            for given in ({}, {"tools": [TOOL]}):
                found = prompts_of(turns, more, given, tokenizer)
                if isinstance(found, list):
                    compared += 1
                    assert found == [found[0]] * 4, (row, more, given)
    assert compared or name == "glm4moe"  # which ends its turns with nothing, so that pairs are refused


def test_so_it_is_where_the_tokenizer_drops_spaces() -> None:
    for turns in ([ASKED], [ASKED, ANSWERED, ASKED]):
        found = prompts_of(turns, {}, {}, wordpiece_tokenizer())
        assert isinstance(found, list) and found == [found[0]] * 4
