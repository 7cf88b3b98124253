"""Where a chat template runs. It is code of a stranger: jinja's sandbox keeps it from files and from Python's
insides, a child process (`limited.py`) from taking all time and memory.

Renders as transformers does. Does not know what is trained.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from common import limited
from common.errors import UserError
from common.text import one_line, told

Span = tuple[int, int]
"""Characters [start, end) of a rendered conversation."""

Item = TypeVar("Item")
Result = TypeVar("Result")

TEMPLATE_HINT = "give another template: model.chat_template=chatml, or a file"
LENGTH, FACTOR = 2**20, 10
"""A template may write this many characters, and this many for each that it is given."""


class RenderError(ValueError):
    """The template refuses a conversation, or fails; the text says why."""


def fill_in(
    name: str, text: str, turns: list[dict[str, Any]], options: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """What the template makes of some turns, and the parts of it that stand in `{% generation %}` tags.

    name, text: of the template. options: of `render_jinja_template`, and the template's variables. Runs in
    what `limit` is given. Raises RenderError when the template refuses the turns or fails, UserError when it
    is not valid.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any
    try:
        rendered = render_jinja_template([turns], **{**options, "chat_template": text})
        ((written,), spans) = rendered
        written.encode()  # half a character is none
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"{name} is not valid Jinja: line {error.lineno}: {error.message}",
            hint="correct the template, or set model.chat_template=chatml",
        ) from error
    except jinja2.TemplateError as error:
        raise RenderError(f"{name} refuses it: {one_line(error)}") from error
    except MemoryError:
        raise
    except Exception as error:  # it fails in as many ways as Python has
        raise RenderError(f"{name} fails: {told(error)}") from error
    if len(written) > LENGTH and len(written) > FACTOR * len(given := str([turns, options])):
        raise RenderError(f"{name} writes {len(written):,} characters for {len(given):,} that it is given")
    return written, spans[0] if spans else []


def limit(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    name: str,
    places: Sequence[object] = (),
    hint: str = TEMPLATE_HINT,
) -> list[Result]:
    """One result per item of a function over a template: UserError where it takes too much time or memory.

    name: of the template. places: where the items stand.
    """
    if not items:
        return []
    importlib.import_module("transformers.utils.chat_template_utils")  # a second; the child has it then
    try:
        return limited.each(function, items)
    except limited.LimitError as error:
        place = f"{places[error.number]}: " if places else ""
        raise UserError(f"{place}{name} {error}", hint=hint) from None
