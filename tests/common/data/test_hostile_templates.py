"""Templates that fail, or take all they can: each ends with the template's name, and with the row's place."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import limited
from common.config import ModelConfig
from common.data import control
from common.data.chat import check_template, tokenize, tokenize_questions
from common.data.outcomes import Drop, RowRecords
from common.data.render import read_template, render
from common.data.types import NO_CONTEXT, Conversation, Message
from common.errors import UserError
from common.model.tokenizer import load_tokenizer
from tests.common.data.conversations import HERE
from tests.tiny import CHATML, tiny_tokenizer

DOUBLED = "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
RECURSIVE = "{% macro f(x) %}{% if x %}{{ f(x - 1) ~ f(x - 1) }}{% endif %}{% endmacro %}"
NESTED = "{% set n = namespace(s=[]) %}{% for i in range(2000) %}{% set n.s = [n.s] %}{% endfor %}"

FAILS = {
    "{{ 1 // 0 }}": "fails: ZeroDivisionError: integer division or modulo by zero",
    "{{ 2.0 ** 10000 }}": "fails: OverflowError: ",
    RECURSIVE + "{{ f(5000) }}": "fails: RecursionError: maximum recursion depth exceeded",
    NESTED + "{{ n.s | tojson }}": "fails: RecursionError: ",
    "{{ '\\ud800' }}": "fails: UnicodeEncodeError: 'utf-8' codec can't encode",
    "{{ [1, 'a'] | sort }}": "fails: TypeError: ",
    "{{ dict(a=1).popitem() }}": "refuses it: access to attribute 'popitem' of 'dict' object is unsafe.",
    "{{ messages[0].update(content='other') }}": "refuses it: access to attribute 'update' of 'dict'",
    "{% generation %}{{ 1 / 0 }}{% endgeneration %}": "fails: ZeroDivisionError: division by zero",
    "{{ strftime_now('\\ud800') }}": "fails: UnicodeEncodeError: ",
    "{{ raise_exception((messages | length + 8) ** 5000) }}": "refuses it: (cannot be shown)",
    "{{ raise_exception('a' * 10 ** 6) }}": "refuses it: " + "a" * 297 + "...",
    "{{ 'a' * 2 ** 21 }}": "writes 2,097,",
}
USES_UP = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "takes more than 0.3 s",
    RECURSIVE + "{{ f(60) }}": "takes more than 0.3 s",
    "{{ (messages | length + 8) ** (10 ** 9) }}": "takes more than 0.3 s",
    "{{ 'a' * 10 ** 11 }}": "needs more than 0.0625 GiB of memory",
    "{{ 'a' | center(10 ** 11) }}": "needs more than 0.0625 GiB of memory",
    DOUBLED: "needs more than 0.0625 GiB of memory",
}
NAME = "the chat template of models/stranger"


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Time is short only where the test waits for its end."""
    monkeypatch.setattr(limited, "MEMORY", 2**26)
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "takes more" in USES_UP.get(given.get("template", ""), ""):
        monkeypatch.setattr(limited, "SECONDS", 0.3)


def row(question: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", "ok")), None, "s", HERE)


def stranger(template: object, *, only_for: str = "") -> object:
    """A tokenizer with this template, or with one that becomes it for a question."""
    if only_for:
        template = f"{{% if messages[0].content == '{only_for}' %}}{template}{{% endif %}}{CHATML}"
    tokenizer = tiny_tokenizer(template)
    tokenizer.name_or_path = "models/stranger"
    return tokenizer


@pytest.mark.parametrize("template", [*FAILS, *USES_UP])
def test_a_template_that_always_fails_is_refused_by_its_name(template: str) -> None:
    said = (FAILS | USES_UP)[template]
    with pytest.raises(UserError) as error:
        check_template(stranger(template))
    assert f"{NAME} {said}" in error.value.message
    assert error.value.hint is not None and "model.chat_template=chatml" in error.value.hint


@pytest.mark.parametrize("template", FAILS)
def test_where_it_fails_for_a_row_that_row_is_bad_and_the_others_are_not(template: str) -> None:
    tokenizer = stranger(template, only_for="bad")
    before, bad, after = tokenize([row("hi"), row("bad"), row("hi")], tokenizer)
    assert isinstance(before, RowRecords) and isinstance(after, RowRecords)
    assert isinstance(bad, Drop) and bad.faulty and bad.place == HERE
    assert bad.reason.startswith(f"{NAME} {FAILS[template]}")
    (asked,) = tokenize_questions([(row("bad").messages[:1], NO_CONTEXT, HERE)], tokenizer)
    assert isinstance(asked, Drop) and asked.reason.startswith(f"{NAME} {FAILS[template]}")


@pytest.mark.parametrize("template", USES_UP)
def test_where_a_row_takes_too_much_it_is_named(template: str) -> None:
    tokenizer = stranger(template, only_for="bad")
    with pytest.raises(UserError) as error:
        tokenize([row("hi"), row("bad"), row("hi")], tokenizer)
    assert error.value.message == f"rows.jsonl:7: {NAME} {USES_UP[template]}"


def test_a_template_that_cannot_be_compiled_says_so() -> None:
    for template, said in (
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError: "),
        ("{{ " + "9" * 10_000 + " }}", "ValueError: Exceeds the limit"),
        ("{{ raise_exception(10 ** 5000) }}", "ValueError: Exceeds the limit"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader for this environment"),
    ):
        with pytest.raises(UserError, match=f"{NAME} fails: {said}"):
            check_template(stranger(template))


def test_a_template_that_is_no_text_is_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer's chat template is no text: 5"):
        check_template(stranger(5))


def test_what_it_took_to_refuse_a_template_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "SECONDS", 0.3)
    tokenizer = stranger("{{ 10 ** (10 ** 9 + 1) }}")
    with pytest.raises(UserError, match="takes more than"):
        check_template(tokenizer)
    monkeypatch.setattr(limited, "each", lambda *_: pytest.fail("tried again"))
    assert "<|im_start|>" in control.control_tokens(tokenizer).tokens  # special, whatever the template is
    with pytest.raises(UserError, match="takes more than"):
        check_template(tokenizer)


def test_a_long_row_may_become_a_long_text() -> None:
    template = read_template(tiny_tokenizer(CHATML))
    assert len(render(row("hello" * 2**18).messages, template)[0]) > 2**20


def test_a_file_that_was_named_is_named(tmp_path: Path) -> None:
    tiny_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    file = tmp_path / "bad.jinja"
    model = ModelConfig(path=str(tmp_path / "model"), chat_template=str(file))
    file.write_text("{{ 1 // 0 }}")
    with pytest.raises(UserError, match=f"the chat template of {file} fails: ZeroDivisionError"):
        check_template(load_tokenizer(model))
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match=f"model.chat_template={file} cannot be read: 'utf-8' codec"):
        load_tokenizer(model)


def test_a_template_of_a_folder_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer(CHATML).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=f"model.path={tmp_path} cannot be loaded: 'utf-8' codec"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
