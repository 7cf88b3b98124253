"""Conversation -> documents: their tokens, and the loss mask, which says what is trained.

The prompt rule: an assistant turn is trained only behind its own prompt, that is the turns before it as the
template renders them with the generation prompt. Chat, sampling and PPO give the model just these tokens.
What is trained is everything the model has to write itself there: what the template writes for the turn
behind that prompt, through the terminator that ends it; not the line break after it.

Where the whole conversation begins with each prompt and goes on with its turn, it is one document. Where the
template writes earlier turns in another way than it wrote them as the last ones (takes out reasoning, moves
the system text), or where tokens merge across the end of a prompt, the row is split: each trained turn stands
in a document of its own, behind its own prompt. A turn that the template does not write behind its prompt is
not trained. `{% generation %}` tags, where the template has them, must agree.

Labels are shifted here, and nowhere else. Nothing here depends on the pad id, and no EOS is added
except at the end of plain text, where a document really ends. Does not read files or pack.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from common.config import Truncation
from common.data import control, parts
from common.data.render import (
    PROBE,
    TEMPLATE_HINT,
    ChatTemplate,
    RenderError,
    Span,
    read_template,
    render,
)
from common.data.types import IGNORE, Conversation, Message, Place, TemplateContext, TokenizedExample
from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Record = TypeVar("Record")

NOTHING_TRAINED = "no trained token"

HISTORY_DIFFERS = "the chat template writes earlier turns in another way than it wrote them as the last ones"
TOKENS_MERGE = "tokens merge across the end of a prompt"


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that is not used. `faulty`: the row is to blame, so `data.on_bad_row` decides."""

    reason: str
    place: Place
    faulty: bool = False


@dataclass(frozen=True, slots=True)
class Made(Generic[Record]):
    """What became of a row: at least one record.

    split: why each of its trained turns stands in a document of its own; empty when it is one document.
    untrained: of each turn that is not trained though the row asks for it, why not.
    """

    records: tuple[Record, ...]
    split: str = ""
    untrained: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """An assistant turn that is trained: the text of its prompt, and what the model writes behind it."""

    prompt: str
    text: str
    rendered: str = ""
    """prompt and turn as the template writes them, which may go on; empty where it does not"""
    tags: tuple[Span, ...] = ()
    header: int = 0
    """where the header begins with which the prompt ends: behind the content of the turn before"""

    @property
    def span(self) -> Span:
        return len(self.prompt), len(self.prompt) + len(self.text)


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the spans of it that are trained, each of which stands behind its own prompt."""

    text: str
    spans: tuple[Span, ...]


class _NotTrained(Exception):
    """The template does not write a turn behind its prompt; the text says why."""


def tokenize(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerFast
) -> list[Made[TokenizedExample] | Drop]:
    """One result per conversation, in order, with labels shifted; not yet cut to a length.

    Raises UserError when the template cannot be used, or its tags differ from the turns it writes.
    """
    template: ChatTemplate | None = None
    results: list[Made[TokenizedExample] | Drop | None] = [None] * len(conversations)
    written: list[tuple[int, Made[Document]]] = []
    for index, conversation in enumerate(conversations):
        if conversation.text is not None:
            whole = Document(conversation.text, ((0, len(conversation.text)),))
            written.append((index, Made((whole,))))
            continue
        template = template or read_template(tokenizer)
        documents = write(conversation, template)
        if isinstance(documents, Drop):
            results[index] = documents
        else:
            written.append((index, documents))
    encoder = _Encoder(tokenizer)
    encodings = iter(encoder.batch([document.text for _, made in written for document in made.records]))
    for index, made in written:
        of_row = [next(encodings) for _ in made.records]
        results[index] = _examples(conversations[index], made, of_row, encoder)
    return [result for result in results if result is not None]


def tokenize_questions(
    questions: Sequence[tuple[Sequence[Message], TemplateContext, Place]], tokenizer: PreTrainedTokenizerFast
) -> list[np.ndarray | Drop]:
    """Turns that end where an assistant's would begin, through the generation prompt: int32 [T] each.

    These are the tokens with which a document begins that has the assistant's turn, before what it trains
    there. UserError when there is no chat template.
    """
    template = read_template(tokenizer)
    results: list[np.ndarray | Drop | None] = [None] * len(questions)
    texts: list[str] = []
    for index, (turns, context, place) in enumerate(questions):
        try:
            text, _ = render(turns, template, context, prompt=True)
            _refuse_loss(parts.lost_by_template(turns, context, template, prompt=True))
            texts.append(text)
        except RenderError as error:
            results[index] = Drop(str(error), place, faulty=True)
    encodings = iter(_Encoder(tokenizer).batch(texts))
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
    """Ids of the tokens with which the chat template really ends an assistant turn: first that of an answer,
    then that of a call, where it is another one.

    Raises UserError when there is no template or its turns have no one-token terminator.
    """
    template = read_template(tokenizer)
    terminator = template.terminator
    ids = tokenizer.backend_tokenizer.encode(terminator, add_special_tokens=False).ids
    special = [token for token in ids if token in tokenizer.added_tokens_decoder]
    if not special and len(ids) != 1:
        raise UserError(
            f"the chat template ends an assistant turn with {terminator!r}, which is not one token:"
            " a model trained on it would never stop",
            hint="use a template that ends turns with a special token, e.g. model.chat_template=chatml",
        )
    call_ends = [
        token for token, added in tokenizer.added_tokens_decoder.items() if str(added) == template.call_end
    ]
    return tuple(dict.fromkeys([(special or ids)[-1], *call_ends]))


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer that cannot be trained with: slow, no template, no span, no terminator."""
    terminators = find_terminators(tokenizer)
    place = Place("chat template", 1)
    # some templates end their prompt inside a block of reasoning, which an answer then has to begin with
    answers = ("b", f"{parts.START_OF_REASONING}\na\n{parts.END_OF_REASONING}\n\nb")
    probes = [
        Conversation((Message("user", "a"), Message("assistant", answer)), None, "probe", place)
        for answer in answers
    ]
    results = tokenize(probes, tokenizer)
    made = next((result for result in results if isinstance(result, Made)), None)
    if made is None:
        reason = next(result.reason for result in results if isinstance(result, Drop))
        raise UserError(f"the chat template trains nothing: {reason}", hint=TEMPLATE_HINT)
    labels = made.records[-1].labels
    last = int(labels[labels != IGNORE][-1])
    if last not in terminators:
        token = tokenizer.convert_ids_to_tokens(last)
        raise UserError(
            f"the chat template trains {token!r} as the last token of a turn, not the terminator",
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


# from turns to text: the prompt rule


def write(conversation: Conversation, template: ChatTemplate) -> Made[Document] | Drop:
    """The documents of a conversation as text, by the prompt rule.

    Raises UserError when tags differ from the turns.
    """
    messages, context, place = conversation.messages, conversation.context, conversation.place
    answers: list[Answer] = []
    untrained: list[str] = []
    tags: list[Span] = []
    try:
        whole, tags = render(messages, template, context)
        for index in _wanted(conversation):
            through = (whole, tags) if index == len(messages) - 1 else None
            try:
                answers.append(_answer(messages[: index + 1], context, template, through))
            except _NotTrained as reason:
                untrained.append(str(reason))
    except RenderError as error:
        return Drop(str(error), place, faulty=True)
    if not answers:
        return Drop(untrained[0] if untrained else NOTHING_TRAINED, place)
    if all(whole.startswith(a.prompt) and whole.startswith(a.text, len(a.prompt)) for a in answers):
        document = Document(whole, tuple(answer.span for answer in answers))
        _check_tags(whole, answers, tags, template, place)
        return Made((document,), "", tuple(untrained))
    for answer in answers:
        if answer.rendered:
            _check_tags(answer.rendered, [answer], answer.tags, template, place)
    return _split(answers, HISTORY_DIFFERS, tuple(untrained))


def _wanted(conversation: Conversation) -> Iterator[int]:
    """Indices of the turns that the row asks to train."""
    for index, message in enumerate(conversation.messages):
        if message.role == "assistant" and message.trained and index >= conversation.first_trained:
            yield index


def _split(answers: Sequence[Answer], why: str, untrained: tuple[str, ...]) -> Made[Document]:
    """Each answer behind its own prompt."""
    documents = tuple(Document(answer.prompt + answer.text, (answer.span,)) for answer in answers)
    return Made(documents, why if len(documents) > 1 else "", untrained)


def _answer(
    messages: Sequence[Message],
    context: TemplateContext,
    template: ChatTemplate,
    through: tuple[str, list[Span]] | None,
) -> Answer:
    """The last of some turns behind its prompt. through: all of them rendered, where that is known.

    Raises _NotTrained; RenderError when the template leaves out a part of the row.
    """
    try:
        prompt, _ = render(messages[:-1], template, context, prompt=True)
        text, tags = through or render(messages, template, context)
    except RenderError as error:
        raise _NotTrained(f"turn without a prompt: {error}") from error
    if text.startswith(prompt):
        turn = template.through_terminator(text[len(prompt) :])
        answer = Answer(prompt, turn, text, tuple(tags), _header(messages, prompt))
    else:
        written = _behind_opened(messages, context, template, prompt)
        answer = Answer(prompt, written or _behind_header(messages, context, template, prompt, text))
    if not answer.text:
        raise _NotTrained("turn for which the chat template writes nothing")
    if not answer.rendered:
        _refuse_loss(parts.lost_by_template(messages[:-1], context, template, prompt=True))
    _refuse_loss(parts.lost_by_template(messages, context, template, apart=not answer.rendered))
    _refuse_loss(parts.lost_in_turn(messages[-1], answer.text))
    return answer


def _header(messages: Sequence[Message], prompt: str) -> int:
    """Where the header begins with which a prompt ends."""
    said = messages[-2].content if len(messages) > 1 else ""
    before = said if said in prompt else said.strip()
    return prompt.rfind(before) + len(before) if before.strip() and before in prompt else 0


def _behind_opened(
    messages: Sequence[Message], context: TemplateContext, template: ChatTemplate, prompt: str
) -> str:
    """The last turn behind a prompt which already holds what the turn begins with, such as `<think>`.

    The template does not write it there by itself; its content (or its reasoning, in a field) does. Empty
    where that is not how prompt and turn differ. Raises _NotTrained.
    """
    turn = messages[-1]
    reasoning = parts.reasoning_of(turn)
    bare = {name: value for name, value in turn.extra.items() if name not in parts.REASONING_KEYS}
    try:
        text, _ = render([*messages[:-1], Message(turn.role, PROBE, bare)], template, context)
    except RenderError:
        text = ""
    head, found, tail = text.rpartition(PROBE)
    if not found or not prompt.startswith(head):
        return ""
    held = prompt[len(head) :]
    if not held.strip() and (reasoning or parts.split_reasoning(turn.content)[0].strip()):
        raise _NotTrained("turn with reasoning, for which its prompt leaves no place")
    content = parts.joined(reasoning, turn.content) if reasoning else turn.content
    if not held.strip() or content.startswith(held):
        rest = content.removeprefix(held)
    elif content.lstrip().startswith(held.strip()):
        rest = content.lstrip()[len(held.strip()) :].lstrip("\n")
    else:
        reason = f"turn that does not begin with {held!r}, in which its prompt ends"
        raise _NotTrained(reason + _without_thinking(template, context))
    return template.through_terminator(rest + tail)


def _behind_header(
    messages: Sequence[Message], context: TemplateContext, template: ChatTemplate, prompt: str, text: str
) -> str:
    """The last turn where the template writes the same header before it, but other turns before that.

    Some keep the reasoning of a call until its answer is written, some write the system text into a question
    only until it is answered. Where the prompt has no header of its own, the end of the last question is one.
    Raises _NotTrained.
    """
    way_out = _without_thinking(template, context)
    reason = f"turn that the chat template does not write behind its own prompt{way_out}"
    before, _ = render(messages[:-1], template, context)
    header = prompt.removeprefix(before) or prompt[_header(messages, prompt) :]
    count = parts.headers_of_turn(messages, context, template, header, text) if header.strip() else 0
    if not prompt.startswith(before) or not count:
        raise _NotTrained(reason)
    turn = header.join(text.split(header)[-count:])
    if parts.lost_in_turn(messages[-1], turn):
        raise _NotTrained(reason)
    return template.through_terminator(turn)


def _without_thinking(template: ChatTemplate, context: TemplateContext) -> str:
    """The way out for answers without reasoning, where the template has one."""
    if "enable_thinking" not in template.text or "enable_thinking" in context.variables:
        return ""
    return "; answers without reasoning: data.chat_template_kwargs={enable_thinking: false}"


def _refuse_loss(part: str | None) -> None:
    """A template that leaves out calls or reasoning would teach the model to do without."""
    if part is not None:
        raise RenderError(f"the chat template leaves out {part}{parts.WAY_OUT}")


def _check_tags(
    text: str, answers: Sequence[Answer], tags: Sequence[Span], template: ChatTemplate, place: Place
) -> None:
    """UserError when the tags mark something else than what is trained.

    They may begin in the header, of which the generation prompt decides how much the model has to write.
    White space behind the end is never trained.
    """
    if not template.tagged:
        return
    floor = 0
    for number, answer in enumerate(answers, start=1):
        start, end = answer.span
        marked = [(max(first, floor), last) for first, last in tags if first < end and last > start]
        first, last = (marked[0][0], marked[-1][1]) if marked else (start, start)
        gaps = any(left[1] != right[0] for left, right in zip(marked, marked[1:], strict=False))
        begins = answer.header <= first and (first <= start or not text[start:first].strip())
        if gaps or not begins or last < end or text[end:last].strip():
            raise UserError(
                f"{place}: the chat template's {{% generation %}} tags and its rendered turns differ in"
                f" trained turn {number}: the tags train {text[first:last]!r}, the turn is"
                f" {text[start:end]!r}",
                hint="the tags must hold what follows the generation prompt, through the turn's terminator",
            )
        floor = end


# from text to tokens


class _Encoder:
    """Texts as tokens, without any that the tokenizer would add. Short texts are looked up again."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._known: dict[str, list[int]] = {}
        self.added = tokenizer.added_tokens_decoder
        self.bos, self.tokenizer = tokenizer.bos_token_id, tokenizer

    def batch(self, texts: list[str]) -> list[Any]:
        """One encoding per text. What is guarded in it (`control.py`) is encoded as text."""
        if not any(map(control.is_guarded, texts)):
            return self._backend.encode_batch(texts, add_special_tokens=False) if texts else []
        real = control.control_tokens(self.tokenizer).real
        as_text = control.text_backend(self.tokenizer)
        return list(as_text.encode_batch([real(text) for text in texts], add_special_tokens=False))

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        if text not in self._known:
            self._known[text] = self.batch([text])[0].ids
        return self._known[text]

    def ids_inside(self, text: str) -> list[int]:
        """Those of a text inside a longer one: some tokenizers add a space to what comes first."""
        for token, added in self.added.items():
            if not (added.rstrip or added.single_word):
                ids = self.batch([str(added) + text])[0].ids
                if ids[:1] == [token]:
                    return list(ids[1:])
        return list(self.batch([text])[0].ids)


def _examples(
    row: Conversation, made: Made[Document], encodings: list[Any], encoder: _Encoder
) -> Made[TokenizedExample] | Drop:
    """The documents of a row as tokens; split where one document would merge tokens across a prompt's end."""
    if row.text is not None:
        return _plain(row, encodings[0].ids, encoder)
    examples: list[TokenizedExample] = []
    for document, encoding in zip(made.records, encodings, strict=True):
        bounds = _bounds(document, encoding, encoder)
        if bounds is not None:
            examples.append(_labelled(encoding.ids, bounds, row.source, encoder.bos))
        elif len(document.spans) == 1:
            examples.append(_in_parts(document, row.source, encoder))
        else:
            answers = [
                Answer(document.text[:start], document.text[start:end]) for start, end in document.spans
            ]
            apart = _split(answers, TOKENS_MERGE, made.untrained)
            return _examples(row, apart, encoder.batch([each.text for each in apart.records]), encoder)
    return Made(tuple(examples), made.split, made.untrained)


def _bounds(document: Document, encoding: Any, encoder: _Encoder) -> list[Span] | None:
    """Tokens [start, end) of each span; None when a prompt alone becomes other tokens than it is here."""
    ids, offsets = encoding.ids, encoding.offsets
    bounds = []
    for start, end in document.spans:
        first = _tokens_of_prompt(document.text, start, ids, offsets, encoder)
        if first is None:
            return None
        bounds.append(
            (first, len(ids) if end == len(document.text) else bisect.bisect_left(offsets, (end, 0)))
        )
    return bounds


def _tokens_of_prompt(
    text: str, end: int, ids: list[int], offsets: list[Span], encoder: _Encoder
) -> int | None:
    """How many of the first tokens are those of `text[:end]` alone; None when no number of them is.

    Text behind an added token is encoded on its own, so only what follows the last one has to be compared.
    """
    reached = bisect.bisect_left(offsets, (end, 0))
    last = next((index for index in range(reached - 1, 0, -1) if ids[index] in encoder.added), 0)
    alone = encoder.ids(text[offsets[last][0] if last else 0 : end])
    return last + len(alone) if ids[last : last + len(alone)] == alone else None


def _labelled(
    ids: Sequence[int] | np.ndarray, bounds: Sequence[Span], source: str, bos: int | None
) -> TokenizedExample:
    tokens, trained = np.array(ids, np.int32), np.zeros(len(ids), bool)
    for start, end in bounds:
        trained[start:end] = True
    tokens, trained = _one_bos(tokens, trained, bos)
    labels = np.full(len(tokens), IGNORE, np.int32)
    labels[:-1][trained[1:]] = tokens[1:][trained[1:]]
    return TokenizedExample(tokens, labels, source)


def _in_parts(document: Document, source: str, encoder: _Encoder) -> TokenizedExample:
    """Prompt and turn encoded apart, and put together: the model is given the one and writes the other."""
    ((start, end),) = document.spans
    prompt, turn = encoder.ids(document.text[:start]), encoder.ids_inside(document.text[start:end])
    return _labelled([*prompt, *turn], [(len(prompt), len(prompt) + len(turn))], source, encoder.bos)


def _plain(row: Conversation, ids: Sequence[int], encoder: _Encoder) -> Made[TokenizedExample] | Drop:
    """Plain text is one document, trained whole."""
    tokens, before = _whole_document(np.array(ids, np.int32), encoder.tokenizer)
    example = _labelled(tokens, [(before, len(tokens))], row.source, encoder.bos)
    return Made((example,)) if example.trained else Drop(NOTHING_TRAINED, row.place)


def _whole_document(tokens: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, int]:
    """Plain text: the BOS this tokenizer writes, if any, and one EOS where the document ends. With the number
    of tokens that are put before it."""
    before = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "the tokenizer has no EOS token, so plain text cannot end",
            hint="set its eos_token, or use messages",
        )
    after = [] if len(tokens) and tokens[-1] == end else [end]
    return np.concatenate([np.array(before, np.int32), tokens, np.array(after, np.int32)]), len(before)


def _adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    bos = tokenizer.bos_token_id
    # asked of the backend at each call: settings such as add_bos_token change its post-processor
    return bos is not None and tokenizer.backend_tokenizer.encode("a").ids[:1] == [bos]


def _one_bos(tokens: np.ndarray, trained: np.ndarray, bos: int | None) -> tuple[np.ndarray, np.ndarray]:
    while bos is not None and len(tokens) > 1 and tokens[0] == bos and tokens[1] == bos:
        tokens, trained = tokens[1:], trained[1:]
    return tokens, trained
