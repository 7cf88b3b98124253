"""Control tokens inside contents: found, and written so that they become ordinary text.

A control token is an added token that steers: EOS, BOS, role markers, terminators. The template writes them
around contents; one inside a content (`</s>` in an answer, a role's header in a tool's result) becomes the
real token all the same, unless it is guarded. A guarded content has a run of one private-use character in its
place, as long as the token is, so that templates, spans and offsets see a text of the same length;
`text_backend` then encodes the run as the text that it stands for. Does not decide what becomes of the row.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.data.render import read_template
from common.data.types import Conversation, Message, Preference, Prompt, Row, TemplateContext
from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REASONING_TAGS = ("<think>", "</think>")
"""Control tokens that an assistant writes in its own content."""

GUARD, REAL, END = 0x108000, 0x10A000, 0x10C000
"""Private-use characters: token number n is GUARD + n as text, REAL + n where the template wrote it."""

_RESERVED = re.compile(f"[{chr(GUARD)}-{chr(END)}]")
_GUARDED = re.compile(f"([{chr(GUARD)}-{chr(REAL - 1)}])\\1*")


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a tokenizer with its chat template, by number."""

    tokens: tuple[str, ...]

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.tokens, key=len, reverse=True))) or r"(?!)")

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    def found(self, row: Conversation | Preference | Prompt) -> list[str]:
        """The control tokens inside the row's contents, each once, and characters that are reserved here."""
        seen: dict[str, None] = {}

        def look(text: str, own: bool) -> str:
            for match in self._pattern.finditer(text):
                if not (own and match[0] in REASONING_TAGS):
                    seen[match[0]] = None
            for character in _RESERVED.findall(text):
                seen[f"U+{ord(character):X}"] = None
            return text

        _changed(row, look)
        return list(seen)

    def is_reserved(self, found: str) -> bool:
        """Whether something that was found is no token but a character that is reserved here."""
        return found not in self._number

    def guarded(self, row: Row) -> Row:
        """The row with control tokens inside contents as runs of private-use characters."""

        def guard(text: str, own: bool) -> str:
            return self._pattern.sub(
                lambda match: match[0] if own and match[0] in REASONING_TAGS else self._run(GUARD, match[0]),
                text,
            )

        return _changed(row, guard)

    def _run(self, base: int, token: str) -> str:
        return chr(base + self._number[token]) * len(token)

    def real(self, text: str) -> str:
        """For `TextBackend`: what the template wrote as runs of its own, and what is guarded as it reads."""
        marked = self._pattern.sub(lambda match: self._run(REAL, match[0]), text)

        def literal(match: re.Match[str]) -> str:
            token = self.tokens[ord(match[1]) - GUARD]
            return token * (len(match[0]) // len(token))

        return _GUARDED.sub(literal, marked)


def is_guarded(text: str) -> bool:
    """Whether something in the text is to be encoded as text."""
    return _GUARDED.search(text) is not None


def spelled(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast, *, marked: bool) -> str:
    """Tokens as text for a reader; marked: each control token between stars, so that it can be told from text
    that reads the same."""
    if not marked:
        return str(tokenizer.decode(list(ids)))
    real = {tokenizer.convert_tokens_to_ids(token) for token in control_tokens(tokenizer).tokens}
    written: list[str] = []
    for is_control, group in itertools.groupby(ids, key=real.__contains__):
        run = list(group)
        alone = [[token] for token in run] if is_control else [run]
        star = "*" if is_control else ""
        written += [f"{star}{tokenizer.decode(tokens)}{star}" for tokens in alone]
    return "".join(written)


@functools.lru_cache(maxsize=4)
def control_tokens(tokenizer: PreTrainedTokenizerFast) -> ControlTokens:
    """The tokenizer's special tokens, and other added tokens with which its template surrounds contents."""
    added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    try:
        around = read_template(tokenizer).around
    except UserError:  # there is none, or its use says what is wrong with it
        around = ""
    found = [token for token, special in added.items() if token.strip() and (special or token in around)]
    return ControlTokens(tuple(found))


@functools.lru_cache(maxsize=4)
def text_backend(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The tokenizer's backend with runs of private-use characters as its control tokens, under the same ids.

    It encodes text that reads like a control token as ordinary text, whatever the model's vocabulary holds.
    """
    from tokenizers import Tokenizer

    control = control_tokens(tokenizer)
    names = {token: control._run(REAL, token) for token in control.tokens}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"post_processor": None, "truncation": None, "padding": None}
    for token in state["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    backend = Tokenizer.from_str(json.dumps(state))
    for token, name in names.items():
        if backend.token_to_id(name) != tokenizer.backend_tokenizer.token_to_id(token):
            raise UserError(
                f"this tokenizer cannot write {token} as text",
                hint="data.special_tokens_in_content=refuse leaves such rows out, keep takes them as is",
            )
    return backend


Change = Callable[[str, bool], str]
"""A text and whether an assistant wrote it -> the text to stand in its place."""


def _changed(row: Row, change: Change) -> Row:
    """The row with every text of its contents changed."""
    if isinstance(row, Conversation):
        text = None if row.text is None else change(row.text, False)
        parts: dict[str, Any] = {"text": text, "messages": _turns(row.messages, change)}
    elif isinstance(row, Preference):
        parts = {name: _turns(getattr(row, name), change) for name in ("prompt", "chosen", "rejected")}
    else:
        parts = {"messages": _turns(row.messages, change)}
    tools = tuple(_texts(tool, change, False) for tool in row.context.tools)
    context = TemplateContext(tools, _texts(row.context.variables, change, False))
    return dataclasses.replace(row, **parts, context=context)


def _turns(turns: tuple[Message, ...], change: Change) -> tuple[Message, ...]:
    return tuple(
        dataclasses.replace(
            turn,
            content=change(turn.content, turn.role == "assistant"),
            extra=_texts(turn.extra, change, turn.role == "assistant"),
        )
        for turn in turns
    )


def _texts(value: Any, change: Change, own: bool) -> Any:
    if isinstance(value, str):
        return change(value, own)
    if isinstance(value, Mapping):
        return {change(key, own): _texts(inner, change, own) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_texts(inner, change, own) for inner in value]
    return value
