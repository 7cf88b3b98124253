"""RawExample -> Preference: what the columns of a row with several answers mean.

A preference has `chosen` and `rejected`, each a string, a list of messages or a transcript
("\\n\\nHuman: ...\\n\\nAssistant: ..."), and its prompt in a column of its own or as what both sides begin
with, turn by turn. Graded answers are a `question` and several columns with answers that are right or
wrong: each right one is preferred to each wrong one. Raises `RowError` for what is wrong with one row,
`RowUnused` for a row that is in order and gives no pair, `UserError` for a source that cannot be
understood at all. Empty and equal sides are read: `pairs.py` drops them. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from common.data import columns as cells
from common.data.columns import Columns
from common.data.outcomes import RowError, RowUnused
from common.data.types import Message, Preference, RawExample
from common.errors import UserError

Turns = tuple[Message, ...]

MOST_PAIRS = 4
"""Pairs that one row of graded answers gives at the most."""


class Sides(NamedTuple):
    """A prompt and the turns that follow it on either side."""

    prompt: Turns
    chosen: Turns
    rejected: Turns


@dataclass(frozen=True)
class PreferenceFormat:
    """A way to write a row: columns it needs, columns it may have, and how it is read."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    fits: Callable[[Columns], bool]  # whether a row that has the columns is written this way
    read: Callable[[Columns], list[Sides]]

    def unused(self, columns: Columns) -> list[str]:
        """Columns of a row (already renamed) that say nothing to this format."""
        read = {*self.required, *self.optional, *cells.CONTEXT_COLUMNS}
        graded = () if "chosen" in self.required else _graded(columns)
        return [name for name in columns if name not in read and name not in graded]


def recognise(columns: Columns, *, name: str | None = None, origin: str = "data") -> PreferenceFormat:
    """The format of rows like this one (already renamed), or the one asked for by `name`.

    Raises UserError naming `origin` and the columns found when none fits.
    """
    known = {candidate.name: candidate for candidate in FORMATS}
    if name is not None and name not in known:
        raise UserError(
            f"data.sources.format={name} is not a format of preferences", hint=f"one of {', '.join(known)}"
        )
    for candidate in FORMATS if name is None else (known[name],):
        if all(column in columns for column in candidate.required) and candidate.fits(columns):
            return candidate
    raise UserError(
        f"{origin}: this step needs preferences, two answers to compare; found the columns"
        f" {', '.join(sorted(columns)) or 'none'}",
        hint="expected chosen and rejected, with or without prompt; or question and two or more columns of"
        " {is_correct, solution}. Map other names with data.sources.columns, e.g. {chosen: better}",
    )


def to_preferences(
    raw: RawExample, format: PreferenceFormat, columns_map: Mapping[str, str] | None = None
) -> list[Preference]:
    """The pairs of one row, at least one.

    Raises RowUnused when graded answers are all right or all wrong, and RowError: a missing column, a
    cell of another type, sides without a common prompt, a prompt that the sides do not begin with, a
    side whose last turn is not an assistant's, a margin that is not a finite number.
    """
    columns = cells.of_row(raw, columns_map or {})
    cells.require(columns, format.required, format.name)
    # columnar files fill what a row does not have with null, CSV files with nothing
    margin = 0.0 if columns.get("margin") in (None, "") else cells.number(columns, "margin")
    if margin < 0:
        raise RowError(f"margin is {margin:g}: chosen is the better answer, so it is 0 or more")
    pairs = format.read(columns)
    for sides in pairs:
        _check(sides)
    context = cells.context(columns)
    return [
        Preference(*sides, source=raw.source, place=raw.place, margin=margin, context=context)
        for sides in pairs
    ]


def chosen_side(columns: Columns) -> tuple[Turns, int]:
    """All turns of a preference's preferred side (columns already renamed), and how many are prompt."""
    sides = _sides(columns)[0]
    _check(sides)
    return sides.prompt + sides.chosen, len(sides.prompt)


def _check(sides: Sides) -> None:
    if sides.prompt[-1].role == "assistant":
        raise RowError("the prompt ends with an assistant turn")
    if all(message.role == "system" for message in sides.prompt):
        raise RowError("chosen and rejected share no question, only the system turn")
    for name, side in (("chosen", sides.chosen), ("rejected", sides.rejected)):
        if not side or side[-1].role != "assistant":
            raise RowError(f"{name} does not end with an assistant turn")
        if side[0].role in ("user", "system"):
            raise RowError(f"{name} goes on with a {side[0].role} turn after the prompt, not with an answer")
        turns = sides.prompt + side
        # an answer that is empty is dropped and counted with its pair, later
        cells.check_turns(turns, may_be_empty=len(turns) - 1)


# prompt, chosen and rejected


def _sides(columns: Columns) -> list[Sides]:
    if columns.get("prompt") is not None:
        return [_with_prompt(columns)]
    return [_without_prompt(columns)]


def _with_prompt(columns: Columns) -> Sides:
    value, whole = columns["prompt"], cells.asked(columns, "prompt", empty=False)
    said = isinstance(value, str) and cells.is_transcript(value)
    if isinstance(value, str) and not said:
        columns = _without_repetition(columns, value)
    chosen, rejected = (
        _after_prompt(_written(columns, name, in_transcript=said), whole, name)
        for name in ("chosen", "rejected")
    )
    return Sides(whole, chosen, rejected)


def _without_repetition(columns: Columns, prompt: str) -> Columns:
    """Without the prompt, and the white space behind it, when both sides are strings that begin with it.

    A single side that does is left as it is: an answer may quote the question. So may both answers to a
    prompt of one or two words ("Hi").
    """
    if len(prompt.split()) < 3:
        return columns
    sides = {name: columns[name] for name in ("chosen", "rejected")}
    texts = {name: side for name, side in sides.items() if isinstance(side, str) and side.startswith(prompt)}
    if len(texts) < len(sides):
        return columns
    return {**columns, **{name: text.removeprefix(prompt).lstrip() for name, text in texts.items()}}


def _written(columns: Columns, name: str, *, in_transcript: bool) -> Turns:
    """The turns of one side as the column has them, which may repeat the prompt.

    in_transcript: the prompt is a transcript, so a plain string continues it.
    """
    if isinstance(columns[name], dict):
        columns = {name: [columns[name]]}
    if isinstance(columns[name], list):
        return cells.messages(columns, name)
    text = cells.text(columns, name)
    if cells.is_transcript(text):
        return cells.transcript(text)
    if in_transcript:
        return cells.transcript(f"Assistant:{text}")
    return (Message("assistant", text),)


def _after_prompt(side: Turns, prompt: Turns, name: str) -> Turns:
    """What follows the prompt in a side, which may repeat all of it, all but its system turn, or nothing."""
    if not side or side[0].role not in ("user", "system"):
        return side
    repeated = prompt[1:] if prompt[0].role == "system" and side[0].role != "system" else prompt
    if side[: len(repeated)] != repeated:
        raise RowError(f"prompt is not a prefix of {name}")
    return side[len(repeated) :]


def _without_prompt(columns: Columns) -> Sides:
    """The prompt is what both sides begin with, turn by turn, up to the last that is not an assistant's."""
    chosen, rejected = (_whole(columns, name) for name in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1].role == "assistant":
        shared -= 1
    if not shared:
        raise RowError(
            "chosen and rejected share nothing: they do not begin with the same turn; a prompt in another"
            " column is read with data.sources.columns={prompt: its name}"
        )
    prompt = cells.behind_system(columns, chosen[:shared])
    return Sides(prompt, chosen[shared:], rejected[shared:])


def _whole(columns: Columns, name: str) -> Turns:
    """One side with its prompt: messages, or a transcript."""
    value = columns[name]
    if isinstance(value, str) and not cells.is_transcript(value):
        raise RowError(
            f"{name} is a plain string, so a column prompt is needed to say what it answers; another column"
            " is read as the prompt with data.sources.columns={prompt: its name}"
        )
    return _written(columns, name, in_transcript=False)


# graded answers


def _graded(columns: Columns) -> dict[str, tuple[bool, str]]:
    """Answers by column, in column order: whether each is right, and what it says."""
    return {
        name: (_flag(value, name), cells.text({name: value["solution"]}, name))
        for name, value in columns.items()
        if isinstance(value, dict) and {"is_correct", "solution"} <= value.keys()
    }


def _flag(answer: Mapping[str, object], name: str) -> bool:
    value = answer["is_correct"]
    if not isinstance(value, bool):
        raise RowError(f"{name}: is_correct is not a boolean ({cells.kind(value)})")
    return value


def _right_and_wrong(columns: Columns) -> list[Sides]:
    """Each right answer with each wrong one, without repetition, `MOST_PAIRS` at the most."""
    prompt = cells.asked(columns, "question", empty=False)
    graded = _graded(columns)
    if len(graded) < 2:
        raise RowError("fewer than two graded answers (the source's format is graded answers)")
    right = [solution for is_correct, solution in graded.values() if is_correct]
    wrong = [solution for is_correct, solution in graded.values() if not is_correct]
    if not right or not wrong:
        raise RowUnused("no right answer" if not right else "no wrong answer")
    pairs = dict.fromkeys((good, bad) for good in right for bad in wrong if good != bad)
    if not pairs:
        raise RowUnused("right and wrong answers are the same")
    return [
        Sides(prompt, (Message("assistant", good),), (Message("assistant", bad),))
        for good, bad in list(pairs)[:MOST_PAIRS]
    ]


FORMATS: tuple[PreferenceFormat, ...] = (
    PreferenceFormat(
        "preference", ("chosen", "rejected"), ("prompt", "system", "margin"), lambda columns: True, _sides
    ),
    PreferenceFormat(
        "graded answers",
        ("question",),
        ("system", "margin"),
        lambda columns: len(_graded(columns)) > 1,
        _right_and_wrong,
    ),
)
"""Tried in this order."""
