"""Conversations and templates that tests of chat templates share, and what is trained of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.data.chat import tokenize
from common.data.outcomes import RowRecords
from common.data.types import IGNORE, Conversation, Message, Place, TokenizedExample
from tests.tiny import CHATML, tiny_tokenizer

HERE = Place("rows.jsonl", 7)
TEMPLATES = Path(__file__).parents[3] / "conf" / "chat_template"

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# the question's markers are the answer's header, a space stands before the answer, and the system
# text is written into the last question
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content ~ '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant have to take turns') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{{ '[INST] ' ~ (first if m == (turns | selectattr('role', 'equalto', 'user') | list)[-1] else '')"
    " ~ m.content ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('there is no system turn here') }}{% endif %}"
    "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ (m.content | trim) }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# earlier answers lose their reasoning; the last one keeps it, or gets an empty block
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}{{ '<think>' ~ (parts[0] | replace('<think>', '') if parts | length > 1 else '') }}"
    "{{ '</think>\n\n' }}{% endif %}{{ parts[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SYSTEM_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_WITHOUT_TAGS = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns), None, "s", HERE)


def made(row: Conversation, template: str | None, **options: bool) -> RowRecords[TokenizedExample]:
    result = tokenize([row], tiny_tokenizer(template, **options))[0]
    assert isinstance(result, RowRecords), result
    return result


def documents(row: Conversation, template: str | None, **options: bool) -> tuple[TokenizedExample, ...]:
    return made(row, template, **options).records


def example(row: Conversation, template: str | None, **options: bool) -> TokenizedExample:
    (document,) = documents(row, template, **options)
    return document


def trained(row: Conversation, template: str | None, **options: bool) -> list[str]:
    """What is trained, run by run, document by document."""
    return [run for document in documents(row, template, **options) for run in runs(document)]


def runs(document: TokenizedExample) -> list[str]:
    """What a document trains, run by run."""
    found: list[list[int]] = [[]]
    for label in document.labels.tolist():
        if label != IGNORE:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [tiny_tokenizer().decode(run) for run in found if run]


def stretches(document: TokenizedExample) -> tuple[str, str]:
    """Prompt and trained turn of a document with one turn, which ends with it."""
    begin = int(np.argmax(document.labels != IGNORE)) + 1
    tokenizer = tiny_tokenizer()
    return tokenizer.decode(document.input_ids[:begin]), tokenizer.decode(document.input_ids[begin:])


TWO_TURNS = conversation(("user", "hi"), ("assistant", "hello"), ("user", "more?"), ("assistant", "ok"))
WITH_SYSTEM = conversation(("system", "S"), *((m.role, m.content) for m in TWO_TURNS.messages))
