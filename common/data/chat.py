"""Conversation -> TokenizedExample: which tokens there are, and which of them are trained.

A conversation is rendered once and the whole text is tokenized once, so the tokens are exactly those
the model sees in use. What an assistant turn trains is a span of characters: everything the model
has to write itself, from the end of the generation prompt through the terminator that ends the turn;
not the header before it, not the line break after it. Spans come from the template's
`{% generation %}` tags, from the offsets of the rendered turns, or from both, which then must agree.
Assistant turns of a prompt (`Conversation.first_trained`) have no span.
A token is trained if and only if its first character lies in a span; a token that begins in the
header and reaches into the answer is not, because the model is never asked to write it.

Labels are shifted here, and nowhere else. Nothing here depends on the pad id, and no EOS is added
except at the end of plain text, where a document really ends. Does not read files or pack.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config import Truncation
from common.data.types import IGNORE, Conversation, Message, Place, TokenizedExample
from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]
"""Characters [start, end) of a rendered conversation."""

TEMPLATE_HINT = (
    "mark the assistant's part in the template with {% generation %} tags, or set model.chat_template=chatml"
)

NOTHING_TRAINED = "no trained token"


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that is not used. `faulty`: the row is to blame, so `data.on_bad_row` decides."""

    reason: str
    place: Place
    faulty: bool = False


class RenderError(ValueError):
    """The template refuses a conversation; the text says why."""


@dataclass(frozen=True)
class Turns:
    """How a template writes an assistant turn, found by rendering a made-up conversation.

    header: the last characters before what the model writes (its generation prompt).
    lead: what the template puts between header and content, such as a space.
    terminator: what ends a turn, through its special tokens; empty when there is nothing.
    """

    header: str
    lead: str
    terminator: str


@dataclass(frozen=True, slots=True)
class Written:
    """Where a turn's content stands in the text; not exact where more than the content differs."""

    start: int
    end: int
    exact_start: bool = True
    exact_end: bool = True


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template: Jinja text, the special tokens it may write, whether it has
    `{% generation %}` tags, and how it writes turns."""

    text: str
    special: tuple[tuple[str, str], ...]
    tagged: bool
    turns: Turns


def tokenize(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerFast
) -> list[TokenizedExample | Drop]:
    """One result per conversation, in order, with labels shifted; not yet cut to a length.

    Raises UserError when the template's spans cannot be told, or are told in two different ways.
    """
    template: ChatTemplate | None = None
    results: list[TokenizedExample | Drop | None] = [None] * len(conversations)
    texts: list[str] = []
    spans: list[list[Span]] = []
    rendered: list[int] = []
    for index, conversation in enumerate(conversations):
        if conversation.text is not None:
            text, found = conversation.text, [(0, len(conversation.text))]
        else:
            template = template or read_template(tokenizer)
            try:
                text, found = render(conversation, template)
            except RenderError as error:
                results[index] = Drop(str(error), conversation.place, faulty=True)
                continue
        texts.append(text)
        spans.append(found)
        rendered.append(index)
    for index, encoding, found in zip(rendered, _encode(texts, tokenizer), spans, strict=True):
        results[index] = _example(conversations[index], encoding, found, tokenizer)
    return [result for result in results if result is not None]


def tokenize_questions(
    questions: Sequence[tuple[Sequence[Message], Place]], tokenizer: PreTrainedTokenizerFast
) -> list[np.ndarray | Drop]:
    """Turns that end where an assistant's would begin, through the generation prompt: int32 [T] each.

    These are the tokens with which a document begins that has the assistant's turn, before its first trained
    one. UserError when there is no chat template.
    """
    template = read_template(tokenizer)
    results: list[np.ndarray | Drop | None] = [None] * len(questions)
    texts: list[str] = []
    for index, (turns, place) in enumerate(questions):
        try:
            texts.append(_render(turns, template, prompt=True)[0])
        except RenderError as error:
            results[index] = Drop(str(error), place, faulty=True)
    encodings = iter(_encode(texts, tokenizer))
    for index, result in enumerate(results):
        if result is None:
            ids = np.array(next(encodings).ids, np.int32)
            results[index] = _one_bos(ids, np.zeros(len(ids), bool), tokenizer.bos_token_id)[0]
    return [result for result in results if result is not None]


def fit(
    example: TokenizedExample,
    place: Place,
    max_length: int,
    truncation: Truncation,
    bos_id: int | None = None,
) -> TokenizedExample | Drop:
    """The example in at most `max_length` tokens, or why it is dropped.

    `left` keeps the end (behind the BOS, when the example begins with `bos_id`), `right` the
    beginning; neither adds a token, so a cut answer has no terminator and none is trained.
    """
    ids, labels = example.input_ids, example.labels
    if len(ids) <= max_length:
        return example
    if truncation is Truncation.drop:
        return Drop(f"longer than data.max_length={max_length}", place)
    if truncation is Truncation.right:
        ids, labels = ids[:max_length], labels[:max_length].copy()
        labels[-1] = IGNORE
    elif bos_id is not None and ids[0] == bos_id:
        tail = max_length - 1
        ids = np.concatenate([ids[:1], ids[-tail:]])
        # what followed the BOS is gone, so it must not learn to predict the middle of a document
        labels = np.concatenate([np.array([IGNORE], labels.dtype), labels[-tail:]])
    else:
        ids, labels = ids[-max_length:], labels[-max_length:]
    if not (labels != IGNORE).any():
        return Drop(f"{NOTHING_TRAINED} left after truncation", place)
    return TokenizedExample(ids, labels, example.source)


def find_terminators(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ids of the tokens with which the chat template really ends an assistant turn.

    Raises UserError when there is no template or its turns have no one-token terminator.
    """
    terminator = read_template(tokenizer).turns.terminator
    ids = tokenizer.backend_tokenizer.encode(terminator, add_special_tokens=False).ids
    special = [token for token in ids if token in tokenizer.added_tokens_decoder]
    if not special and len(ids) != 1:
        raise UserError(
            f"the chat template ends an assistant turn with {terminator!r}, which is not one token:"
            " a model trained on it would never stop",
            hint="use a template that ends turns with a special token, e.g. model.chat_template=chatml",
        )
    return ((special or ids)[-1],)


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer that cannot be trained with: slow, no template, no span, no terminator."""
    terminators = find_terminators(tokenizer)
    probe = (Message("user", "a"), Message("assistant", "b"))
    conversation = Conversation(probe, None, "probe", Place("chat template", 1))
    result = tokenize([conversation], tokenizer)[0]
    if isinstance(result, Drop):
        raise UserError(f"the chat template trains nothing: {result.reason}", hint=TEMPLATE_HINT)
    trained = result.labels[result.labels != IGNORE]
    if int(trained[-1]) not in terminators:
        last = tokenizer.convert_ids_to_tokens(int(trained[-1]))
        raise UserError(
            f"the chat template trains {last!r} as the last token of a turn, not the terminator",
            hint=TEMPLATE_HINT,
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of everything that decides which tokens a text becomes; not of pad token or template."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)  # set by whoever called last
    state.pop("padding", None)
    state["special"] = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    state["special"].pop("pad_token", None)
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()


def template_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of the chat template; of the empty string when there is none."""
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# from text to tokens


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    if not texts:
        return []
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend.encode_batch(texts, add_special_tokens=False)


def _example(
    conversation: Conversation, encoding: Any, spans: list[Span], tokenizer: PreTrainedTokenizerFast
) -> TokenizedExample | Drop:
    ids, offsets = encoding.ids, encoding.offsets
    trained = np.zeros(len(ids), bool)
    for start, end in spans:
        trained[_first_token(offsets, start) : _first_token(offsets, end)] = True
    tokens = np.array(ids, np.int32)
    if conversation.text is not None:
        tokens, trained = _whole_document(tokens, trained, tokenizer)
    tokens, trained = _one_bos(tokens, trained, tokenizer.bos_token_id)
    labels = np.full(len(tokens), IGNORE, np.int32)
    labels[:-1][trained[1:]] = tokens[1:][trained[1:]]
    if not trained[1:].any():
        return Drop(NOTHING_TRAINED, conversation.place)
    return TokenizedExample(tokens, labels, conversation.source)


def _first_token(offsets: list[Span], character: int) -> int:
    """Index of the first token that begins at `character` or later."""
    index = bisect.bisect_left(offsets, (character, 0))
    if 0 < index < len(offsets):
        # byte-level tokenizers report " word" without its space: the token begins where the last one ended
        previous_end, reported = offsets[index - 1][1], offsets[index][0]
        if previous_end < character and previous_end < reported:
            return index + 1
    return index


def _whole_document(
    tokens: np.ndarray, trained: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> tuple[np.ndarray, np.ndarray]:
    """Plain text: the BOS this tokenizer writes, if any, and one EOS where the document ends."""
    before = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "the tokenizer has no EOS token, so plain text cannot end",
            hint="set its eos_token, or use messages",
        )
    after = [] if len(tokens) and tokens[-1] == end else [end]
    tokens = np.concatenate([np.array(before, np.int32), tokens, np.array(after, np.int32)])
    trained = np.concatenate([np.zeros(len(before), bool), trained, np.ones(len(after), bool)])
    return tokens, trained


def _adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    bos = tokenizer.bos_token_id
    # asked of the backend at each call: settings such as add_bos_token change its post-processor
    return bos is not None and tokenizer.backend_tokenizer.encode("a").ids[:1] == [bos]


def _one_bos(tokens: np.ndarray, trained: np.ndarray, bos: int | None) -> tuple[np.ndarray, np.ndarray]:
    while bos is not None and len(tokens) > 1 and tokens[0] == bos and tokens[1] == bos:
        tokens, trained = tokens[1:], trained[1:]
    return tokens, trained


# from turns to text and spans


def render(conversation: Conversation, template: ChatTemplate) -> tuple[str, list[Span]]:
    """The conversation's whole text and the spans its assistant turns train.

    Raises RenderError when the template refuses the row, UserError when it shows no usable spans.
    """
    text, blocks = _render(conversation.messages, template, tagged=template.tagged)
    turns = _spans_of_turns(text, conversation.messages, template)
    if turns is None and not template.tagged:
        raise UserError(
            f"{conversation.place}: the chat template rewrites this conversation, so that its assistant"
            " turns cannot be found in the text",
            hint=TEMPLATE_HINT,
        )
    terminator = template.turns.terminator
    if turns is None:
        return text, _tidy(_behind_prompt(blocks, conversation), text, terminator)
    _refuse_lost_calls(text, conversation.messages, turns, terminator)
    if template.tagged:
        different = _first_difference(text, _tidy(blocks, text, terminator), _joined(turns))
        if different is not None:
            raise UserError(
                f"{conversation.place}: {different}",
                hint="the tags must hold what follows the generation prompt, through the turn's terminator",
            )
    return text, _joined(_behind_prompt(turns, conversation))


def _behind_prompt(spans: list[Span], conversation: Conversation) -> list[Span]:
    """Without the spans of assistant turns that belong to the prompt. spans: one per assistant turn."""
    if not conversation.first_trained:
        return spans
    is_answer = [message.role == "assistant" for message in conversation.messages]
    if len(spans) != sum(is_answer):
        raise UserError(
            f"{conversation.place}: the chat template's {{% generation %}} tags mark {len(spans)} parts of"
            f" {sum(is_answer)} assistant turns, so that the prompt's cannot be told from the response's",
            hint="tag each assistant turn once, through its terminator",
        )
    return spans[sum(is_answer[: conversation.first_trained]) :]


def _refuse_lost_calls(
    text: str, messages: Sequence[Message], spans: Sequence[Span], terminator: str
) -> None:
    """A template that leaves out tool calls would teach the model to say nothing."""
    answers = [message for message in messages if message.role == "assistant"]
    for number, (message, (start, end)) in enumerate(zip(answers, spans, strict=True), start=1):
        if message.extra.get("tool_calls") and text[start:end].strip() == terminator.strip():
            raise RenderError(f"the chat template leaves out the tool calls of assistant turn {number}")


def read_template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """The tokenizer's chat template and how it writes turns; UserError when it cannot be used."""
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
    special = tuple((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
    added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
    tagged = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None
    return ChatTemplate(text, special, tagged, _turns_of(text, special, added))


def _render(
    messages: Sequence[Message], template: ChatTemplate, *, prompt: bool = False, tagged: bool = False
) -> tuple[str, list[Span]]:
    turns = [{**message.extra, "role": message.role, "content": message.content} for message in messages]
    return _render_turns(turns, template.text, template.special, prompt=prompt, tagged=tagged)


def _render_turns(
    turns: list[dict[str, Any]],
    template: str,
    special: Sequence[tuple[str, str]],
    *,
    prompt: bool = False,
    tagged: bool = False,
) -> tuple[str, list[Span]]:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {
        **dict(special),
        "chat_template": template,
        "add_generation_prompt": prompt,
        "return_assistant_tokens_mask": tagged,
    }
    rendered: Any
    try:
        rendered = render_jinja_template([turns], **options)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",
            hint="correct the template, or set model.chat_template=chatml",
        ) from error
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise RenderError(f"the chat template refuses it: {error}") from error
    texts, blocks = rendered
    return texts[0], blocks[0] if blocks else []


_USER, _ASSISTANT = "\ue000u\ue001", "\ue000a\ue001"
"""Contents of made-up turns: private-use characters, which no template writes itself."""


@functools.lru_cache(maxsize=16)
def _turns_of(template: str, special: tuple[tuple[str, str], ...], added: tuple[str, ...]) -> Turns:
    user, assistant = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}
    try:
        asked, _ = _render_turns([user], template, special)
        prompted, _ = _render_turns([user], template, special, prompt=True)
        answered, _ = _render_turns([user, assistant], template, special)
    except RenderError as error:
        raise UserError(f"one question and one answer: {error}", hint=TEMPLATE_HINT) from error
    content, user_end = answered.find(_ASSISTANT), answered.find(_USER) + len(_USER)
    if content < 0:
        raise UserError("the chat template does not write the assistant's content", hint=TEMPLATE_HINT)
    common = _common_prefix(prompted, answered[:content])
    # the generation prompt alone is best; templates that end the question with it show more
    start = len(asked) if prompted.startswith(asked) and len(asked) < common else min(user_end, common)
    tail = answered[content + len(_ASSISTANT) :]
    inner = _tail_before_question(template, special)
    return Turns(answered[start:common], answered[common:content], _terminator(tail, inner, added))


def _tail_before_question(template: str, special: tuple[tuple[str, str], ...]) -> str | None:
    """What follows the assistant's content when another question comes; None when that fails."""
    turns = [("user", "b"), ("assistant", _ASSISTANT), ("user", _USER)]
    try:
        text, _ = _render_turns([{"role": r, "content": c} for r, c in turns], template, special)
    except RenderError:
        return None
    return text.partition(_ASSISTANT)[2]


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


def _common_prefix(left: str, right: str) -> int:
    limit = min(len(left), len(right))
    low, high = 0, limit
    while low < high:  # string slices compare in C; a loop over characters would not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low


def _common_suffix(left: str, right: str) -> int:
    return _common_prefix(left[::-1], right[::-1])


# spans from the offsets of the rendered turns


def _spans_of_turns(text: str, messages: Sequence[Message], template: ChatTemplate) -> list[Span] | None:
    """The spans without help from tags, or None when they cannot be told from the text."""
    turns = template.turns
    contents = None
    if not any(message.extra for message in messages):
        contents = _contents_by_outline(text, messages, template)
    if contents is None:
        contents = _contents_by_difference(text, messages, template)
    if contents is None:
        return None
    spans: list[Span] = []
    floor = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        ceiling = len(text)
        if message.extra and index + 1 < len(messages):
            ceiling = contents[index + 1].start
        span = _whole_turn(text, contents[index], floor, ceiling, turns, bool(message.extra))
        if span is None:
            return None
        spans.append(span)
        floor = span[1]
    return spans


def _whole_turn(
    text: str, content: Written, floor: int, ceiling: int, turns: Turns, has_extra: bool
) -> Span | None:
    """From the end of the header before `content` through the terminator after it.

    None when something beside the content was rewritten and no header or terminator gives a hold.
    """
    start, end = content.start, content.end
    header = text.rfind(turns.header, floor, start) if turns.header else -1
    if header >= 0:
        start = header + len(turns.header)
    elif not content.exact_start:
        return None
    elif turns.lead and text.endswith(turns.lead, floor, start):
        start -= len(turns.lead)
    if turns.terminator and text.startswith(turns.terminator, end):
        return start, end + len(turns.terminator)
    if not has_extra:
        # a template may end only its last turn
        return (start, end) if content.exact_end else None
    after = text.find(turns.terminator, end, ceiling) if turns.terminator else -1
    return None if after < 0 else (start, after + len(turns.terminator))


def _contents_by_outline(
    text: str, messages: Sequence[Message], template: ChatTemplate
) -> list[Written] | None:
    """Fast way: fill the contents into the template's outline for these roles and compare.

    None unless outline and contents (as they are, or stripped) make up the whole text.
    """
    roles = tuple(message.role for message in messages)
    outline = _outline(roles, template.text, template.special)
    if outline is None:
        return None
    literals, order = outline
    contents = [Written(0, 0)] * len(messages)
    position = len(literals[0])
    if not text.startswith(literals[0]):
        return None
    for index, literal in zip(order, literals[1:], strict=True):
        content = messages[index].content
        for written in (content, content.strip()):
            end = position + len(written)
            if text.startswith(written, position) and text.startswith(literal, end):
                contents[index], position = Written(position, end), end + len(literal)
                break
        else:
            return None
    return contents if position == len(text) else None


@functools.lru_cache(maxsize=1024)
def _outline(
    roles: tuple[str, ...], template: str, special: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """The text a template writes around contents, and the order in which it writes them."""
    turns = [{"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)]
    try:
        text, _ = _render_turns(turns, template, special)
    except RenderError:
        return None
    parts = re.split("\ue000(\\d+)\ue001", text)
    order = tuple(int(part) for part in parts[1::2])
    if sorted(order) != list(range(len(roles))):
        return None  # a turn is left out or written twice
    return tuple(parts[0::2]), order


def _contents_by_difference(
    text: str, messages: Sequence[Message], template: ChatTemplate
) -> list[Written] | None:
    """Slow way, for templates that rewrite contents: put a mark in place of one content at a time
    and see where the text changes. Only assistant turns and what follows them are looked for."""
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text) * 3
    contents = [Written(0, 0)] * len(messages)
    for index, message in enumerate(messages):
        follows = index > 0 and messages[index - 1].role == "assistant"
        if message.role != "assistant" and not follows:
            continue
        marked = [*messages[:index], Message(message.role, mark, message.extra), *messages[index + 1 :]]
        try:
            changed, _ = _render(marked, template)
        except RenderError:
            return None
        at = changed.find(mark)
        if at < 0 or changed.count(mark) != 1:
            return None
        before, after = changed[:at], changed[at + len(mark) :]
        start, rest = _common_prefix(text, before), _common_suffix(text, after)
        end = max(start, len(text) - rest)
        contents[index] = Written(start, end, start == len(before), rest == len(after))
    return contents


# spans from {% generation %} tags


def _tidy(blocks: Sequence[Span], text: str, terminator: str) -> list[Span]:
    """Tagged spans, joined where they touch, without the white space behind a terminator."""
    tidy = []
    for start, end in _joined(blocks):
        stop = len(text[:end].rstrip())
        tidy.append((start, stop if terminator and text.endswith(terminator, start, stop) else end))
    return tidy


def _joined(spans: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif end > start:
            joined.append((start, end))
    return joined


def _first_difference(text: str, tags: list[Span], spans: list[Span]) -> str | None:
    """Where tags and rendered turns disagree. White space at the beginning is left to the turns: it
    belongs to the header or to the answer according to the generation prompt, not to the tags."""
    for number in range(max(len(tags), len(spans))):
        tag = tags[number] if number < len(tags) else (0, 0)
        span = spans[number] if number < len(spans) else (0, 0)
        between = text[min(tag[0], span[0]) : max(tag[0], span[0])]
        if tag[1] != span[1] or between.strip():
            return (
                "the chat template's {% generation %} tags and its rendered turns differ in assistant turn"
                f" {number + 1}: the tags train {text[slice(*tag)]!r}, the turn is {text[slice(*span)]!r}"
            )
    return None
