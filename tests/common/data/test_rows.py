"""Rows as people bring them, from the file to what is trained: whole texts, with the trained part marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import DataConfig
from common.data.dataset import build
from common.data.dataset_types import DEMONSTRATIONS, PREFERENCES, PROMPTS
from common.data.pairs import prompt_length
from common.data.types import IGNORE, TokenizedExample
from common.errors import UserError
from tests.field_templates import DROPS_EARLIER_REASONING, TEXT_ARGUMENTS
from tests.tiny import tiny_tokenizer

CHATML = (Path(__file__).parents[3] / "conf" / "chat_template" / "chatml.jinja").read_text()

RIVER, ANOTHER = {"role": "user", "content": "Name a river."}, {"role": "user", "content": "Another?"}
ELBE, ODER = {"role": "assistant", "content": "The Elbe."}, {"role": "assistant", "content": "The Oder."}
ASKED = {"role": "user", "content": "Cold in Oslo?"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
AS_TEXT = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "3 degrees"}
WAIT = {"role": "assistant", "content": "Wait.", "tool_calls": [CALL]}
COLD = {"role": "assistant", "content": "Yes."}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city"}}

USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOLD = "<|im_start|>tool\n<tool_response>\n3 degrees\n</tool_response><|im_end|>\n"
PIRATE = "<s><|im_start|>system\nArr.<|im_end|>\n"


def marked(example: TokenizedExample, tokenizer: Any) -> str:
    """The document as text, what is trained between `[[` and `]]`."""
    trained = np.concatenate([[False], example.labels[:-1] != IGNORE, [False]])
    text = ""
    for index, token in enumerate(example.input_ids.tolist()):
        text += "[[" * int(trained[index] and not trained[index - 1]) + tokenizer.decode([token])
        text += "]]" * int(trained[index] and not trained[index + 1])
    return text


def documents(row: dict[str, Any], folder: Path, template: str = CHATML) -> list[str]:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = DataConfig(path=str(folder / "rows.jsonl"), eval_fraction=0.0)
    tokenizer = tiny_tokenizer(template)
    train, _, _ = build(data, tokenizer, DEMONSTRATIONS, seed=0, cache_dir=folder / "cache")
    return [marked(train[index], tokenizer) for index in range(len(train))]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (  # two questions, one document
            {"messages": [RIVER, ELBE, ANOTHER, ODER]},
            f"<s>{USER}Name a river.<|im_end|>\n{ASSISTANT}[[The Elbe.<|im_end|>]]\n"
            f"{USER}Another?<|im_end|>\n{ASSISTANT}[[The Oder.<|im_end|>]]\n",
        ),
        (  # a turn of weight 0
            {"messages": [RIVER, {**ELBE, "weight": 0}, ANOTHER, {**ODER, "weight": 1}]},
            f"<s>{USER}Name a river.<|im_end|>\n{ASSISTANT}The Elbe.<|im_end|>\n"
            f"{USER}Another?<|im_end|>\n{ASSISTANT}[[The Oder.<|im_end|>]]\n",
        ),
        (  # an assistant turn inside the prompt
            {"prompt": [RIVER, ELBE, ANOTHER], "completion": [ODER]},
            f"<s>{USER}Name a river.<|im_end|>\n{ASSISTANT}The Elbe.<|im_end|>\n"
            f"{USER}Another?<|im_end|>\n{ASSISTANT}[[The Oder.<|im_end|>]]\n",
        ),
        (  # Alpaca's history
            {
                "instruction": "Another?",
                "input": "",
                "output": "The Oder.",
                "history": [["Name a river.", "The Elbe."]],
                "system": "Arr.",
            },
            f"{PIRATE}{USER}Name a river.<|im_end|>\n{ASSISTANT}The Elbe.<|im_end|>\n"
            f"{USER}Another?<|im_end|>\n{ASSISTANT}[[The Oder.<|im_end|>]]\n",
        ),
        (
            {"system": "Arr.", "messages": [RIVER, ELBE]},
            f"{PIRATE}{USER}Name a river.<|im_end|>\n{ASSISTANT}[[The Elbe.<|im_end|>]]\n",
        ),
        (
            {"system": "Arr.", "prompt": [RIVER], "completion": [ELBE]},
            f"{PIRATE}{USER}Name a river.<|im_end|>\n{ASSISTANT}[[The Elbe.<|im_end|>]]\n",
        ),
        (  # words beside a call
            {"messages": [ASKED, WAIT, RESULT, COLD]},
            f"<s>{USER}Cold in Oslo?<|im_end|>\n{ASSISTANT}[[Wait.\n{CALLED}<|im_end|>]]\n{TOLD}"
            f"{ASSISTANT}[[Yes.<|im_end|>]]\n",
        ),
        (  # arguments that are JSON text
            {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [AS_TEXT]}]},
            f"<s>{USER}Cold in Oslo?<|im_end|>\n{ASSISTANT}[[{CALLED}<|im_end|>]]\n",
        ),
        (
            {"messages": [RIVER, {**ELBE, "reasoning_content": "Long."}]},
            f"<s>{USER}Name a river.<|im_end|>\n{ASSISTANT}"
            "[[<think>\nLong.\n</think>\n\nThe Elbe.<|im_end|>]]\n",
        ),
    ],
)  # fmt: skip
def test_a_row_is_one_document_of_which_the_asked_turns_are_trained(
    tmp_path: Path, row: dict[str, Any], text: str
) -> None:
    assert documents(row, tmp_path) == [text]


@pytest.mark.parametrize("written", [[TOOL], json.dumps([TOOL]), [TOOL["function"]]])
def test_definitions_of_tools_stand_in_the_prompt_as_the_template_writes_them(
    tmp_path: Path, written: Any
) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": written}
    (text,) = documents(row, tmp_path)
    before, _, rest = text.partition(USER)
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in before
    assert rest == f"Cold in Oslo?<|im_end|>\n{ASSISTANT}[[{CALLED}<|im_end|>]]\n"


@pytest.mark.parametrize("call", [CALL, AS_TEXT])
def test_a_template_that_wants_arguments_as_text_gets_them_once(tmp_path: Path, call: dict[str, Any]) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    (text,) = documents(row, tmp_path, TEXT_ARGUMENTS)
    assert text == (
        '<s><|user|>Cold in Oslo?<|assistant|>[[<|call|>weather\n```json\n{"city": "Oslo"}\n```</s>]]'
    )


def test_where_history_loses_its_reasoning_each_turn_stands_behind_its_own_prompt(tmp_path: Path) -> None:
    thought = {**ELBE, "content": "<think>\nLong.\n</think>\n\nThe Elbe."}
    again = {**ODER, "content": "<think>\nNear.\n</think>\n\nThe Oder."}
    assert documents({"messages": [RIVER, thought, ANOTHER, again]}, tmp_path, DROPS_EARLIER_REASONING) == [
        f"{USER}Name a river.<|im_end|>\n{ASSISTANT}[[<think>\nLong.\n</think>\n\nThe Elbe.<|im_end|>]]",
        f"{USER}Name a river.<|im_end|>\n{ASSISTANT}The Elbe.<|im_end|>\n{USER}Another?<|im_end|>\n"
        f"{ASSISTANT}[[<think>\nNear.\n</think>\n\nThe Oder.<|im_end|>]]",
    ]


@pytest.mark.parametrize(
    ("turn", "lost"),
    [
        (WAIT, "tool calls"),
        ({**ELBE, "reasoning_content": "Long."}, "reasoning"),
    ],
)
def test_a_template_without_a_place_for_a_part_refuses_the_row(
    tmp_path: Path, turn: dict[str, Any], lost: str
) -> None:
    bare = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    )
    bare += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    with pytest.raises(UserError, match=f"leaves out an assistant turn's {lost}.*model.chat_template=chatml"):
        documents({"messages": [RIVER, turn]}, tmp_path, bare)


GIVEN: list[dict[str, Any]] = [
    {},
    {"system": "Arr."},
    {"tools": [TOOL]},
    {"system": "Arr.", "tools": json.dumps([TOOL])},
    {"chat_template_kwargs": {"enable_thinking": False}},
]
PROMPT: list[Any] = [
    "Name a river.",
    [RIVER, ELBE, ANOTHER],
    "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("asked", PROMPT)
def test_every_step_reads_a_rows_prompt_as_the_same_tokens(
    tmp_path: Path, given: dict[str, Any], asked: Any
) -> None:
    """SFT, reward and DPO, PPO."""
    tokenizer = tiny_tokenizer(DROPS_EARLIER_REASONING)
    sides = {"completion": "ok", "chosen": "ok", "rejected": "no"}
    prompts = []
    for kind, names in (
        (DEMONSTRATIONS, ["completion"]),
        (PREFERENCES, ["chosen", "rejected"]),
        (PROMPTS, []),
    ):
        row = {"prompt": asked, **given, **{name: sides[name] for name in names}}
        path = tmp_path / f"{kind.name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        data = DataConfig(path=str(path), eval_fraction=0.0)
        train, _, _ = build(
            data, tokenizer, kind=kind, seed=0, cache_dir=tmp_path / "cache", report=lambda line: None
        )
        of_row = {DEMONSTRATIONS: train[0], PREFERENCES: getattr(train[0], "chosen", None), PROMPTS: None}[
            kind
        ]
        prompts.append((of_row.input_ids[: prompt_length(of_row)] if of_row else train[0].input_ids).tolist())
    assert prompts[0] == prompts[1] == prompts[2]
    text = tokenizer.decode(prompts[0])
    assert text.endswith(
        f"{ASSISTANT}<think>\n\n</think>\n\n" if "chat_template_kwargs" in given else ASSISTANT
    )
    assert ("Arr." in text) == ("system" in given) and ("Weather of a city" in text) == ("tools" in given)
