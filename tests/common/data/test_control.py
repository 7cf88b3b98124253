"""Control tokens inside contents: found where they stand, and encoded as text when they are guarded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from common.config import DataConfig, OnBadRow, SpecialTokens
from common.data.control import control_tokens, is_guarded, text_backend
from common.data.dataset import build
from common.data.dataset_types import DEMONSTRATIONS, PREFERENCES, PROMPTS
from common.data.types import (
    IGNORE,
    Conversation,
    Message,
    Place,
    Preference,
    Prompt,
    TemplateContext,
    TokenizedExample,
)
from common.errors import UserError
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
        conversation(Message("assistant", "", {"tool_calls": [{"function": {"arguments": {"</s>": "x"}}}]})),
        conversation(Message("assistant", "b", {"reasoning_content": "</s>"})),
        Conversation(
            (Message("user", "a"),), None, "s", HERE, context=TemplateContext((), {"documents": ["</s>"]})
        ),
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


# what becomes of them


def built(folder: Path, mode: SpecialTokens, kind: Any = DEMONSTRATIONS, **options: Any) -> Any:
    rows = [
        {"prompt": "a", "completion": "ok</s>ok", "chosen": "ok</s>", "rejected": "b"},
        {"prompt": "b<|im_end|>", "completion": "ok", "chosen": "ok", "rejected": "b"},
        {"prompt": "c", "completion": "ok", "chosen": "ok", "rejected": "b"},
    ]
    if kind is DEMONSTRATIONS:
        rows = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        path=str(folder / "rows.jsonl"), eval_fraction=0.0, special_tokens_in_content=mode, **options
    )
    train, _, ledger = build(
        data, tiny_tokenizer(CHATML), kind=kind, seed=0, cache_dir=folder / "cache", report=lambda line: None
    )
    return train, ledger.sources[0], ledger.lines()


def trained(train: Any, index: int) -> list[str]:
    labels = train[index].labels
    return list(tiny_tokenizer(CHATML).convert_ids_to_tokens(labels[labels != IGNORE].tolist()))


def test_kept_tokens_are_real_counted_by_source_and_named_with_their_rows(tmp_path: Path) -> None:
    train, entry, lines = built(tmp_path, SpecialTokens.keep)
    assert trained(train, 0) == ["ok", "</s>", "ok", "<|im_end|>"]
    became = "taken as the real token (data.special_tokens_in_content=keep)"
    assert {reason: found.count for reason, found in entry.control.items()} == {
        f"</s> {became}": 1,
        f"<|im_end|> {became}": 1,
    }
    assert f"control tokens in contents of rows: 1 × </s> {became} ({tmp_path}/rows.jsonl:1)" in lines
    heads = [bool(train.head(index)) for index in range(3)]
    assert heads == [True, True, False]


def test_as_text_the_answer_has_the_letters_of_the_token_and_ends_where_it_ends(tmp_path: Path) -> None:
    train, entry, _ = built(tmp_path, SpecialTokens.text)
    assert trained(train, 0) == ["ok", "<", "/", "s", ">", "ok", "<|im_end|>"]
    tokenizer = tiny_tokenizer(CHATML)
    ids = train[1].input_ids.tolist()
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nb<|im_end|><|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
    )
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert list(entry.control) == [
        "</s> encoded as ordinary text",
        "<|im_end|> encoded as ordinary text",
    ]
    assert trained(train, 2) == ["ok", "<|im_end|>"]


def test_refused_rows_are_bad_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:1: a content holds the control token </s>"):
        built(tmp_path / "a", SpecialTokens.refuse)
    train, entry, _ = built(tmp_path / "b", SpecialTokens.refuse, on_bad_row=OnBadRow.skip)
    assert len(train) == 1 and entry.bad_rows == 2 and entry.control == {}


def test_pairs_and_prompts_treat_them_alike(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    pairs, entry, _ = built(tmp_path / "pairs", SpecialTokens.text, PREFERENCES)
    assert trained_text(pairs[0].chosen, tokenizer) == ["ok", "<", "/", "s", ">", "<|im_end|>"]
    assert len(entry.control) == 2
    prompts, entry, _ = built(tmp_path / "prompts", SpecialTokens.text, PROMPTS)
    ids = prompts[1].input_ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert prompts[1].prompt == "b<|im_end|>"  # reward functions are given the words as they are
    kept, _, _ = built(tmp_path / "prompts", SpecialTokens.keep, PROMPTS)
    assert kept[1].input_ids.tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def trained_text(example: TokenizedExample, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(example.labels[example.labels != IGNORE].tolist()))


@pytest.mark.parametrize("mode", list(SpecialTokens))
def test_a_reserved_character_is_no_way_to_bring_a_token_in(tmp_path: Path, mode: SpecialTokens) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "\U0010a002" * 4}) + "\n")
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.0, special_tokens_in_content=mode)
    with pytest.raises(UserError, match="a content holds the control token U\\+10A002"):
        build(data, tiny_tokenizer(CHATML), DEMONSTRATIONS, seed=0, cache_dir=tmp_path / "cache")


def test_prompts_with_other_tools_are_other_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "tools": [{"name": name}]} for name in ("x", "y", "x")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.0)
    writes_tools = "{{ tools | tojson if tools }}" + CHATML
    train, _, _ = build(
        data, tiny_tokenizer(writes_tools), kind=PROMPTS, seed=0, cache_dir=tmp_path / "cache"
    )
    assert len(train) == 2
