"""Turns -> text: what the chat template writes for them, and how it ends an assistant turn.

Renders with the tools and variables of the row (`TemplateContext`). `read_template` tries a template under
`chat_template.limit`; callers of `render` use that limit, too. Knows nothing of tokens and nothing of the
loss mask.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from common import chat_template
from common.chat_template import TEMPLATE_HINT, RenderError, Span
from common.data import forms
from common.data.forms import Forms, Turn
from common.data.types import NO_CONTEXT, Message, TemplateContext
from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template: Jinja text, the special tokens it may write, whether it has `{% generation %}`
    tags, and how it ends an assistant turn.

    name: the template's name in errors, with its origin. added: the tokenizer's added tokens, as text.
    terminator: the text that ends a turn, through its special tokens; may be empty. behind: the text after
    the terminator of the last turn. call_end: the added token that ends a turn with a call; empty when no
    added token does, or when such a turn is not trained. around: the template's text for short turns. forms:
    how it wants contents and calls.
    """

    name: str
    text: str
    special: tuple[tuple[str, str], ...]
    tagged: bool
    added: tuple[str, ...]
    terminator: str = ""
    behind: str = ""
    call_end: str = ""
    around: str = ""
    forms: Forms = field(default_factory=Forms)

    def through_terminator(self, turn: str) -> str:
        """A rendered turn without what follows its terminator, which may be another than the usual one
        (of a tool call, say)."""
        if turn.endswith(self.terminator + self.behind):
            return turn[: len(turn) - len(self.behind)]
        stripped = turn.rstrip()
        return stripped if stripped.endswith(self.added) else turn.removesuffix(self.behind)


def read_template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """The tokenizer's chat template and how it ends turns; UserError when it cannot be used."""
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets",
            hint="use one that ships a tokenizer.json",
        )
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            hint="name one: model.chat_template=chatml (or alpaca, plain)",
        )
    try:
        text = tokenizer.get_chat_template()
    except ValueError as error:  # several named templates, none of them the default
        raise UserError(
            f"the tokenizer's chat template cannot be chosen: {error}", hint=TEMPLATE_HINT
        ) from error
    if not isinstance(text, str):
        raise UserError(f"the tokenizer's chat template is no text: {text!r:.100}", hint=TEMPLATE_HINT)
    origin = getattr(tokenizer, "chat_template_file", tokenizer.name_or_path)
    name = f"the chat template of {origin}" if origin else "the chat template"
    tagged = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None
    special = tuple((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
    added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
    found = _tried(ChatTemplate(name, text, special, tagged, added))
    if isinstance(found, UserError):
        raise UserError(found.message, hint=found.hint)
    return found


@functools.lru_cache(maxsize=16)
def _tried(bare: ChatTemplate) -> ChatTemplate | UserError:
    """The template with what rendering shows; an error is kept as well, which may have taken seconds."""
    try:
        return chat_template.limit(_try, [bare], bare.name)[0]
    except UserError as error:
        return error


def _try(bare: ChatTemplate) -> ChatTemplate:
    template = replace(bare, forms=forms.find(lambda turns: _attempt(turns, bare)))
    question, answer = Message("user", "b"), Message("assistant", PROBE)
    try:
        answered, _ = render([question, answer], template)
    except RenderError as error:
        raise UserError(f"one question and one answer: {error}", hint=TEMPLATE_HINT) from error
    if PROBE not in answered:
        raise UserError("the chat template does not write the assistant's content", hint=TEMPLATE_HINT)
    tail = answered.rpartition(PROBE)[2]
    try:
        inner = render([question, answer, question], template)[0].rpartition(PROBE)[2]
    except RenderError:
        inner = None
    terminator = _terminator(tail, inner, bare.added)
    behind = tail[tail.find(terminator) + len(terminator) :]
    template = replace(template, terminator=terminator, behind=behind)
    short = [template.forms.turn(Message(role, "a")) for role in ("user", "assistant", "user")]
    return replace(template, call_end=_call_end(template), around=_attempt(short, template, prompt=True))


def _call_end(template: ChatTemplate) -> str:
    """The added token that ends a turn with a call; some templates end it with another one than an answer."""
    turns = forms.a_call(template.forms)
    prompt, text = _attempt(turns[:1], template, prompt=True), _attempt(turns, template)
    if forms.NAME not in text or not text.startswith(prompt):
        return ""
    turn = template.through_terminator(text[len(prompt) :])
    return max((token for token in template.added if turn.endswith(token)), key=len, default="")


def _attempt(turns: list[Turn], template: ChatTemplate, *, prompt: bool = False) -> str:
    """The turns as they are; the empty string when the template refuses them."""
    try:
        return _render(turns, template, NO_CONTEXT, prompt=prompt)[0]
    except RenderError:
        return ""


PROBE = "\ue000a\ue001"
"""Content of a made-up turn: private-use characters, which no template writes itself."""


def _terminator(tail: str, inner: str | None, added: Sequence[str]) -> str:
    """Special tokens that end a turn (those that follow each other without a gap, if inner turns have
    them all, else the first); without a special token everything but the last white space."""
    special = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))
    first = re.search(special, tail) if special else None
    if first is None:
        return tail.rstrip()
    run = re.compile(f"(?:{special})+").match(tail, first.start())
    whole = tail[: run.end()] if run else ""
    return whole if inner is None or inner.startswith(whole) else tail[: first.end()]


def render(
    messages: Sequence[Message],
    template: ChatTemplate,
    context: TemplateContext = NO_CONTEXT,
    *,
    prompt: bool = False,
) -> tuple[str, list[Span]]:
    """The text of some turns, and the parts of it that stand in `{% generation %}` tags.

    prompt: through the generation prompt, where an assistant's turn would begin. Raises RenderError when
    the template refuses the turns, UserError when it is not valid.
    """
    return _render([template.forms.turn(message) for message in messages], template, context, prompt=prompt)


def _render(
    turns: list[Turn], template: ChatTemplate, context: TemplateContext, *, prompt: bool
) -> tuple[str, list[Span]]:
    options = {
        **dict(template.special),
        **context.variables,
        "tools": [dict(tool) for tool in context.tools] or None,
        "add_generation_prompt": prompt,
        "return_assistant_tokens_mask": template.tagged and not prompt,
    }
    return chat_template.fill_in(template.name, template.text, turns, options)
