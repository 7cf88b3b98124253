"""Conversation -> documents: their tokens, and the loss mask, which says what is trained.

`prompt_rule.py` writes a conversation as documents and says which spans of them are trained; here they become
tokens and labels. Where tokens merge across the end of a prompt, the row is split as well. Labels are shifted
here, and nowhere else. Nothing here depends on the pad id, and no EOS is added except at the end of plain
text, where a document really ends. Does not read files or pack.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.chat_template import TEMPLATE_HINT, RenderError, Span, limit
from common.config import Truncation
from common.data import parts
from common.data.encoder import Encoder, one_bos, whole_document
from common.data.outcomes import Drop, RowRecords
from common.data.prompt_rule import NOTHING_TRAINED, Document, documents_with_loss_mask, refuse_left_out
from common.data.render import ChatTemplate, read_template, render
from common.data.types import IGNORE, Conversation, Message, Place, TemplateContext, TokenizedExample
from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENS_MERGE = "tokens merge across the end of a prompt"


def tokenize(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerFast
) -> list[RowRecords[TokenizedExample] | Drop]:
    """One result per conversation, in order, with labels shifted; not yet cut to a length.

    Raises UserError when the template cannot be used, or its tags differ from the turns it writes.
    """
    if all(row.text is not None for row in conversations):
        written = [_written(row, None) for row in conversations]
    else:
        template, places = read_template(tokenizer), [row.place for row in conversations]
        written = limit(functools.partial(_written, template=template), conversations, template.name, places)
    encoder = Encoder(tokenizer)
    made = [result for result in written if isinstance(result, RowRecords)]
    encodings = iter(encoder.batch([document.text for each in made for document in each.records]))
    return [
        result
        if isinstance(result, Drop)
        else _examples(row, result, [next(encodings) for _ in result.records], encoder)
        for row, result in zip(conversations, written, strict=True)
    ]


def _written(row: Conversation, template: ChatTemplate | None) -> RowRecords[Document] | Drop:
    if row.text is not None:
        return RowRecords((Document(row.text, ((0, len(row.text)),)),))
    assert template is not None
    return documents_with_loss_mask(row, template)


def tokenize_questions(
    questions: Sequence[tuple[Sequence[Message], TemplateContext, Place]], tokenizer: PreTrainedTokenizerFast
) -> list[np.ndarray | Drop]:
    """Turns that end where an assistant's would begin, through the generation prompt: int32 [T] each.

    A document with the assistant's turn begins with the same tokens, up to its first trained one. UserError
    when there is no chat template.
    """
    template, places = read_template(tokenizer), [place for _, _, place in questions]
    texts = limit(functools.partial(_asked, template=template), questions, template.name, places)
    encoder = Encoder(tokenizer)
    encodings = iter(encoder.batch([text for text in texts if isinstance(text, str)]))
    return [
        text if isinstance(text, Drop) else one_bos(np.array(next(encodings).ids, np.int32), encoder.bos)
        for text in texts
    ]


def _asked(question: tuple[Sequence[Message], TemplateContext, Place], template: ChatTemplate) -> str | Drop:
    turns, context, place = question
    try:
        text, _ = render(turns, template, context, prompt=True)
        refuse_left_out(parts.left_out_by_template(turns, context, template, prompt=True))
    except RenderError as error:
        return Drop(str(error), place, faulty=True)
    return text


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
    else:
        kept = 1 if bos_id is not None and ids[0] == bos_id else 0
        removed = slice(kept, kept + len(ids) - max_length)
        ids, labels = np.delete(ids, removed), np.delete(labels, removed)
        labels[:kept] = IGNORE  # what followed the BOS is gone: it must not learn the middle of a document
    if not (labels != IGNORE).any():
        return Drop(f"{NOTHING_TRAINED} left after truncation", place)
    return TokenizedExample(ids, labels, example.source)


def find_terminators(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ids of the tokens that really end an assistant turn in the chat template: first the one behind an
    answer, then the one behind a call, where they differ.

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
    made = next((result for result in results if isinstance(result, RowRecords)), None)
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


# from text to tokens


def _examples(
    row: Conversation, made: RowRecords[Document], encodings: list[Any], encoder: Encoder
) -> RowRecords[TokenizedExample] | Drop:
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
            apart = tuple(Document(document.text[:end], ((start, end),)) for start, end in document.spans)
            split = RowRecords(apart, TOKENS_MERGE, made.untrained)
            return _examples(row, split, encoder.batch([each.text for each in apart]), encoder)
    return RowRecords(tuple(examples), made.split, made.untrained)


def _bounds(document: Document, encoding: Any, encoder: Encoder) -> list[Span] | None:
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
    text: str, end: int, ids: list[int], offsets: list[Span], encoder: Encoder
) -> int | None:
    """How many of the first tokens equal the tokens of `text[:end]` alone; None when no number does.

    Text behind an added token is encoded on its own, so only what follows the last one has to be compared.
    """
    reached = bisect.bisect_left(offsets, (end, 0))
    last = next((index for index in range(reached - 1, 0, -1) if ids[index] in encoder.added), 0)
    alone = encoder.ids(text[offsets[last][0] if last else 0 : end])
    return last + len(alone) if ids[last : last + len(alone)] == alone else None


def _labelled(
    ids: Sequence[int] | np.ndarray, bounds: Sequence[Span], source: str, bos: int | None
) -> TokenizedExample:
    tokens, trained = one_bos(np.array(ids, np.int32), bos), np.zeros(len(ids), bool)
    for start, end in bounds:
        trained[start:end] = True
    trained = trained[len(ids) - len(tokens) :]
    labels = np.full(len(tokens), IGNORE, np.int32)
    labels[:-1][trained[1:]] = tokens[1:][trained[1:]]
    return TokenizedExample(tokens, labels, source)


def _in_parts(document: Document, source: str, encoder: Encoder) -> TokenizedExample:
    """Prompt and turn, encoded apart and joined: the model gets the prompt and writes the turn."""
    ((start, end),) = document.spans
    prompt, turn = encoder.ids(document.text[:start]), encoder.ids_inside(document.text[start:end])
    return _labelled([*prompt, *turn], [(len(prompt), len(prompt) + len(turn))], source, encoder.bos)


def _plain(row: Conversation, ids: Sequence[int], encoder: Encoder) -> RowRecords[TokenizedExample] | Drop:
    """Plain text is one document, trained whole."""
    tokens, before = whole_document(np.array(ids, np.int32), encoder.tokenizer)
    example = _labelled(tokens, [(before, len(tokens))], row.source, encoder.bos)
    return RowRecords((example,)) if example.trained else Drop(NOTHING_TRAINED, row.place)
