"""Control tokens inside contents: found where they stand, and encoded as text when they are guarded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from common.data.control import control_tokens, is_guarded, text_backend
from common.data.types import Conversation, Message, Place, Preference, Prompt, TemplateContext
from tests.field_templates import STRIPS_REASONING
from tests.tiny import CHATML, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HERE = Place("rows.jsonl", 3)


def conversation(*turns: Message, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation(turns, None, "s", HERE, context=TemplateContext(tools))


@pytest.mark.parametrize(
    "row",
    [
        conversation(Message("user", "a </s>"), Message("assistant", "b")),
        conversation(Message("user", "a"), Message("assistant", "b</s></s>")),
        conversation(
            Message("assistant", "", {"tool_calls": [{"function": {"arguments": {"x": ["</s>"]}}}]})
        ),
        conversation(Message("assistant", "b", {"reasoning_content": "</s>"})),
        conversation(Message("user", "a"), tools=({"function": {"description": "</s>"}},)),
        Conversation((), "a</s>b", "s", HERE),
        Preference(
            (Message("user", "a"),), (Message("assistant", "</s>"),), (Message("assistant", ""),), "s", HERE
        ),
        Prompt((Message("tool", "</s>"),), "", {}, "s", HERE),
    ],
)
def test_a_control_token_is_found_wherever_a_row_says_it(row: Any) -> None:
    control = control_tokens(tiny_tokenizer(CHATML))
    assert control.found(row) == ["</s>"]
    guarded = control.guarded(row)
    assert control.found(guarded) == ["U+108002"]  # reserved, so that no row can bring a run of its own
    assert "</s>" not in repr(guarded)


def test_ordinary_words_hold_none() -> None:
    row = conversation(Message("user", "a < /s> |im_end|"), Message("assistant", "b", {"name": "x", "n": 3}))
    control = control_tokens(tiny_tokenizer(CHATML))
    assert control.found(row) == [] and control.guarded(row) == row


def test_a_role_marker_counts_though_the_tokenizer_does_not_call_it_special() -> None:
    tokenizer = tiny_tokenizer(STRIPS_REASONING)
    tokenizer.add_tokens(["<|user|>", "<think>", "ordinary"])
    control = control_tokens(tokenizer)
    assert control.found(conversation(Message("user", "<|user|> ordinary"))) == ["<|user|>"]
    # the template opens reasoning itself: an assistant may write the tag, a user should not
    assert control.found(conversation(Message("assistant", "<think>x"))) == []
    assert control.found(conversation(Message("user", "<think>x"))) == ["<think>"]


def test_guarded_text_becomes_ordinary_tokens_and_what_the_template_wrote_stays_real() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    control = control_tokens(tokenizer)
    said = control.guarded(conversation(Message("user", "hello</s></s>"))).messages[0].content
    assert is_guarded(said) and len(said) == len("hello</s></s>")
    text = f"<|im_start|>user\n{said}<|im_end|>"
    encoding = text_backend(tokenizer).encode(control.real(text), add_special_tokens=False)
    end = ["<", "/", "s", ">"]
    tokens = tokenizer.convert_ids_to_tokens(encoding.ids)
    assert tokens == ["<|im_start|>", "u", "s", "e", "r", "Ċ", "hello", *end, *end, "<|im_end|>"]
    assert encoding.offsets[-1] == (len(text) - len("<|im_end|>"), len(text))


def test_text_without_control_tokens_is_encoded_as_ever() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    for text in ("<|im_start|>user\nhello hello ok <|im_end|>\n", "<s> a\n\nhello</s>", ""):
        there = text_backend(tokenizer).encode(control_tokens(tokenizer).real(text), add_special_tokens=False)
        assert there.ids == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert there.offsets == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets


def of_model(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose model knows the EOS token as a piece of its vocabulary."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["[UNK]", "[E]", "a", "[", "]", "E", "▁"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = {
        "WordPiece": lambda: models.WordPiece(vocabulary, unk_token="[UNK]"),
        "WordLevel": lambda: models.WordLevel(vocabulary, unk_token="[UNK]"),
        "Unigram": lambda: models.Unigram(
            [(piece, -float(number)) for number, piece in enumerate(pieces)], 0
        ),
        "BPE": lambda: models.BPE(vocabulary, [], unk_token="[UNK]"),
    }[name]()
    tokenizer = Tokenizer(model)
    splitter = pre_tokenizers.Metaspace() if name in ("Unigram", "BPE") else pre_tokenizers.BertPreTokenizer()
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens([AddedToken("[E]", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[E]", unk_token="[UNK]")


@pytest.mark.parametrize("name", ["WordPiece", "WordLevel", "Unigram", "BPE"])
def test_no_kind_of_vocabulary_makes_the_token_of_guarded_text(name: str) -> None:
    tokenizer = of_model(name)
    control = control_tokens(tokenizer)
    said = control.guarded(conversation(Message("user", "a [E]"))).messages[0].content
    ids = text_backend(tokenizer).encode(control.real(f"{said}[E]a"), add_special_tokens=False).ids
    tokens = [token for token in tokenizer.convert_ids_to_tokens(ids) if token != "▁"]
    assert tokens == ["a", "[", "E", "]", "[E]", "a"]
