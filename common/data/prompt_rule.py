"""Conversation -> documents as text, and the loss mask on them: spans that are trained, by the prompt rule.

The prompt rule: an assistant turn is trained only behind its own prompt. Its prompt is the turns before it,
rendered with the generation prompt: the same tokens that chat, sampling and PPO give the model. The loss mask
holds what the model must write itself there: the template's text for the turn, from the end of the prompt
through the terminator, without the line break after it.

A conversation is one document where its whole text begins with each prompt and continues with its turn. Some
templates render earlier turns differently from the last one (they take out reasoning, or move the system
text). Then the row is split: each trained turn gets a document of its own, behind its own prompt. A turn that
the template does not write behind its prompt is not trained. `{% generation %}` tags, where the template has
them, must agree. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.chat_template import RenderError, Span
from common.data import parts
from common.data.outcomes import Drop, RowRecords
from common.data.render import PROBE, ChatTemplate, render
from common.data.types import Conversation, Message, Place, TemplateContext
from common.errors import UserError

NOTHING_TRAINED = "no trained token"
HISTORY_DIFFERS = "the chat template writes earlier turns in another way than it wrote them as the last ones"


@dataclass(frozen=True, slots=True)
class TrainedTurn:
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
    """A text and its trained spans; each span stands behind its own prompt."""

    text: str
    spans: tuple[Span, ...]


class _NotTrained(Exception):
    """The template does not write a turn behind its prompt; the text says why."""


def documents_with_loss_mask(
    conversation: Conversation, template: ChatTemplate
) -> RowRecords[Document] | Drop:
    """A conversation as documents with the spans that are trained: the loss mask, by the prompt rule.

    Raises UserError when tags differ from the turns.
    """
    messages, context, place = conversation.messages, conversation.context, conversation.place
    answers: list[TrainedTurn] = []
    untrained: list[str] = []
    tags: list[Span] = []
    try:
        whole, tags = render(messages, template, context)
        for index, message in enumerate(messages):
            if message.role != "assistant" or not message.trained or index < conversation.first_trained:
                continue  # the row does not ask to train it
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
        return RowRecords((document,), "", tuple(untrained))
    for answer in answers:
        if answer.rendered:
            _check_tags(answer.rendered, [answer], answer.tags, template, place)
    documents = tuple(Document(answer.prompt + answer.text, (answer.span,)) for answer in answers)
    return RowRecords(documents, HISTORY_DIFFERS if len(documents) > 1 else "", tuple(untrained))


def _answer(
    messages: Sequence[Message],
    context: TemplateContext,
    template: ChatTemplate,
    through: tuple[str, list[Span]] | None,
) -> TrainedTurn:
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
        answer = TrainedTurn(prompt, turn, text, tuple(tags), _header(messages, prompt))
    else:
        written = _behind_opened(messages, context, template, prompt)
        answer = TrainedTurn(prompt, written or _behind_header(messages, context, template, prompt, text))
    if not answer.text:
        raise _NotTrained("turn for which the chat template writes nothing")
    if not answer.rendered:
        refuse_left_out(parts.left_out_by_template(messages[:-1], context, template, prompt=True))
    refuse_left_out(parts.left_out_by_template(messages, context, template, apart=not answer.rendered))
    refuse_left_out(parts.left_out_of_turn(messages[-1], answer.text))
    return answer


def _header(messages: Sequence[Message], prompt: str) -> int:
    """Where the header begins with which a prompt ends."""
    said = messages[-2].content if len(messages) > 1 else ""
    before = said if said in prompt else said.strip()
    return prompt.rfind(before) + len(before) if before.strip() and before in prompt else 0


def _behind_opened(
    messages: Sequence[Message], context: TemplateContext, template: ChatTemplate, prompt: str
) -> str:
    """The last turn behind a prompt that already holds the turn's beginning, such as `<think>`.

    In the rendered turn this beginning comes from its content (or its reasoning field), not from the
    template. Empty where prompt and turn differ in another way. Raises _NotTrained.
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
    """The last turn behind its header, where the template renders the turns before that header differently.

    Some templates keep the reasoning of a call until its answer is written; some write the system text into a
    question only until it is answered. A prompt without a header of its own has the end of the last question
    as its header. Raises _NotTrained.
    """
    way_out = _without_thinking(template, context)
    reason = f"turn that the chat template does not write behind its own prompt{way_out}"
    before, _ = render(messages[:-1], template, context)
    header = prompt.removeprefix(before) or prompt[_header(messages, prompt) :]
    count = parts.headers_of_turn(messages, context, template, header, text) if header.strip() else 0
    if not prompt.startswith(before) or not count:
        raise _NotTrained(reason)
    turn = header.join(text.split(header)[-count:])
    if parts.left_out_of_turn(messages[-1], turn):
        raise _NotTrained(reason)
    return template.through_terminator(turn)


def _without_thinking(template: ChatTemplate, context: TemplateContext) -> str:
    """The way out for answers without reasoning, where the template has one."""
    if "enable_thinking" not in template.text or "enable_thinking" in context.variables:
        return ""
    return "; answers without reasoning: data.chat_template_kwargs={enable_thinking: false}"


def refuse_left_out(part: str | None) -> None:
    """A template that leaves out calls or reasoning would teach the model to do without."""
    if part is not None:
        raise RenderError(f"the chat template leaves out {part}{parts.WAY_OUT}")


def _check_tags(
    text: str, answers: Sequence[TrainedTurn], tags: Sequence[Span], template: ChatTemplate, place: Place
) -> None:
    """UserError when the tags mark other text than the trained spans.

    Tags may begin inside the header: the generation prompt decides how much of it the model writes. White
    space behind the end is never trained.
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
