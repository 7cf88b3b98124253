"""RawExample -> Prompt -> TokenizedPrompt: the prompt of a row, without its answer.

Reads prompts alone, and the formats of demonstrations (`formats.py`) and of preferences (`preferences.py`) up
to the answer. Keeps the row's other columns for reward functions. Renders a prompt through the generation
prompt, so that a training document of the same row begins with the same tokens. Raises `RowError` for what is
wrong with one row, `UserError` for a source that cannot be understood at all. Does not read files and does
not sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.config import Truncation
from common.data import chat, formats, preferences
from common.data import columns as cells
from common.data.columns import Columns
from common.data.outcomes import Drop, RowError
from common.data.types import Message, Place, Prompt, RawExample, TemplateContext, TokenizedPrompt
from common.errors import UserError
from common.text import plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Turns = tuple[Message, ...]

SAME = "the same prompt as an earlier row"
CUT = "cut by truncation"

NO_PROMPT_IN_TEXT = "plain text has no prompt that a policy could answer"


class Asked(NamedTuple):
    """The turns of a prompt, and the string that the row wrote it as; None for a list of messages."""

    turns: Turns
    text: str | None


@dataclass(frozen=True)
class PromptFormat:
    """A way to write a row: columns it needs, those that say the prompt and nothing else, how it is read."""

    name: str
    required: tuple[str, ...]
    asks: tuple[str, ...]
    read: Callable[[Columns], Asked]

    def unused(self, columns: Columns) -> list[str]:
        """Columns of a row (already renamed) that neither this format nor a reward function is given."""
        return [name for name, value in columns.items() if name not in self.asks and _holds_bytes(value)]


def recognise(columns: Columns, *, name: str | None = None, origin: str = "data") -> PromptFormat:
    """The format of rows like this one (already renamed), or the one asked for by `name`.

    Raises UserError naming `origin` and the columns found when none fits, and for plain text.
    """
    if name == "text":
        raise UserError(f"data.sources.format=text: {NO_PROMPT_IN_TEXT}", hint=_TEXT_HINT)
    if name is not None:
        return formats.by_name(name, (*FORMATS, *BY_NAME_ONLY), columns, origin, " to have a prompt")
    for candidate in FORMATS:
        if all(column in columns for column in candidate.required):
            return candidate
    listed = ", ".join(sorted(columns)) or "none"
    if "text" in columns:
        raise UserError(f"{origin}: {NO_PROMPT_IN_TEXT} (columns {listed})", hint=_TEXT_HINT)
    raise UserError(
        f"{origin}: this step needs prompts; found the columns {listed}",
        hint="expected prompt, question, instruction, messages, conversations, or chosen and rejected. Map"
        " other names with data.sources.columns, e.g. {prompt: query}",
    )


_TEXT_HINT = "name rows that ask something; if the text is the prompt: data.sources.columns={prompt: text}"


def to_prompt(raw: RawExample, format: PromptFormat, columns_map: Mapping[str, str] | None = None) -> Prompt:
    """The prompt of the row, with its other columns as JSON values.

    Columns that hold only the prompt are left out; columns with an answer stay. Raises RowError: a missing
    column, a cell of another type, no user turn, an empty question, a prompt that ends with an assistant
    turn.
    """
    columns = cells.of_row(raw, columns_map or {})
    cells.require(columns, format.required, format.name)
    turns, text = format.read(columns)
    _check(turns)
    as_given: Any = text
    if text is None:
        as_given = [plain({"role": turn.role, "content": turn.content, **turn.extra}) for turn in turns]
    others = {
        name: plain(value)
        for name, value in columns.items()
        if name not in format.asks and not _holds_bytes(value)
    }
    return Prompt(turns, as_given, others, raw.source, raw.place, cells.context(columns))


def with_system(prompt: Prompt, system: str) -> Prompt:
    """The prompt with a system message, unless it has one; what the row called its prompt stays."""
    if prompt.messages[0].role == "system":
        return prompt
    return replace(prompt, messages=(Message("system", system), *prompt.messages))


def has_system(prompt: TokenizedPrompt) -> bool:
    """Whether the row itself has a system message."""
    first = prompt.prompt[0] if isinstance(prompt.prompt, list) else {}
    return first.get("role") == "system" or bool(prompt.columns.get("system"))


def turns_again(
    as_given: str | list[dict[str, object]], others: Mapping[str, object]
) -> tuple[Turns, TemplateContext]:
    """The turns and the template context of a `Prompt`, made again from what it kept of its row.

    others: its other columns, None for those that the row does not have.
    """
    columns = {**others, "prompt": as_given}
    if isinstance(as_given, str) and columns.get("history"):
        turns = (*cells.history(columns), Message("user", as_given))
        return cells.behind_system(columns, turns), cells.context(columns)
    return cells.asked(columns, "prompt", empty=False), cells.context(columns)


def tokenize_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerFast
) -> list[TokenizedPrompt | Drop]:
    """One result per prompt, in order; not yet cut to a length. UserError when there is no chat template."""
    questions = [(prompt.messages, prompt.context, prompt.place) for prompt in prompts]
    return [
        ids if isinstance(ids, Drop) else TokenizedPrompt(ids, row.as_given, row.columns, row.source)
        for row, ids in zip(prompts, chat.tokenize_questions(questions, tokenizer), strict=True)
    ]


def fit_prompt(
    prompt: TokenizedPrompt,
    place: Place,
    max_length: int,
    truncation: Truncation,
    bos_id: int | None = None,
    *,
    room: int = 0,
) -> TokenizedPrompt | Drop:
    """The prompt in at most `max_length - room` tokens, or why it is dropped.

    room: tokens left to the response. `left` keeps the end (behind the BOS, when the prompt begins with
    `bos_id`). `right` would remove the place where the answer begins, so it drops what is too long.
    """
    ids = prompt.input_ids
    excess = len(ids) - (max_length - room)
    if excess <= 0:
        return prompt
    if truncation is Truncation.drop:
        less = f" less the {room} tokens kept for a response (max_new_tokens)" if room else ""
        return Drop(f"longer than data.max_length={max_length}{less}", place)
    kept = 1 if bos_id is not None and ids[0] == bos_id else 0
    if truncation is Truncation.right or kept + excess >= len(ids):
        return Drop(CUT, place)
    ids = np.delete(ids, slice(kept, kept + excess))
    return TokenizedPrompt(ids, prompt.prompt, prompt.columns, prompt.source)


def _check(turns: Turns) -> None:
    if not any(turn.role == "user" for turn in turns):
        raise RowError("no user turn")
    if turns[-1].role == "assistant":
        raise RowError("the prompt ends with an assistant turn")
    if cells.says_nothing(turns[-1]):
        raise RowError(f"turn {len(turns)}, which is to be answered, is empty")
    cells.check_turns(turns)


def _holds_bytes(value: Any) -> bool:
    """Whether it is a picture, sound or the like, as it is stored: reward functions are not given that."""
    if isinstance(value, Mapping):
        return any(map(_holds_bytes, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_bytes, value))
    return isinstance(value, bytes | bytearray | memoryview)


# the formats


def _without_answer(turns: Turns) -> Asked:
    """The turns without the assistant turns at their end."""
    end = len(turns)
    while end and turns[end - 1].role == "assistant":
        end -= 1
    return Asked(turns[:end], None)


def _instruction(columns: Columns) -> Asked:
    turns = formats.instruction(columns)
    return Asked(turns, turns[-1].content)


def _preference(columns: Columns) -> Asked:
    turns, of_prompt = preferences.chosen_side(columns)
    return Asked(turns[:of_prompt], _string(columns.get("prompt")))


def _column(name: str) -> Callable[[Columns], Asked]:
    """A reader of the prompt in a column, as in demonstrations with that column."""
    return lambda columns: Asked(cells.asked(columns, name, empty=False), _string(columns[name]))


def _string(value: object) -> str | None:
    return value if isinstance(value, str) else None


FORMATS: tuple[PromptFormat, ...] = (
    PromptFormat("messages", ("messages",), (), lambda row: _without_answer(formats.messages(row))),
    PromptFormat("conversations", ("conversations",), (), lambda row: _without_answer(formats.sharegpt(row))),
    PromptFormat("preference", ("chosen", "rejected"), ("prompt",), _preference),
    PromptFormat("instruction", ("instruction",), ("instruction", "input"), _instruction),
    PromptFormat("prompt/completion", ("prompt", "completion"), ("prompt",), _column("prompt")),
    PromptFormat("prompt/response", ("prompt", "response"), ("prompt",), _column("prompt")),
    PromptFormat("question/answer", ("question", "answer"), ("question",), _column("question")),
    PromptFormat("prompt", ("prompt",), ("prompt",), _column("prompt")),
    PromptFormat("question", ("question",), ("question",), _column("question")),
)
"""Tried in this order."""

BY_NAME_ONLY: tuple[PromptFormat, ...] = (
    PromptFormat("chosen", ("chosen", "rejected"), ("prompt",), _preference),
    PromptFormat("graded answers", ("question",), ("question",), _column("question")),
)
"""Names that other steps use for rows; here such rows are recognised as one of the formats above."""
