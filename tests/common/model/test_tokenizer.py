from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from common.artifacts import MANIFEST
from common.config import ModelConfig, TokenizerConfig
from common.errors import UserError
from common.model.tokenizer import load_tokenizer, read_template, terminators_of, train_tokenizer
from pipeline.planning.network import network_of
from tests.tiny import CHATML, tiny_tokenizer

TEXTS = ["Two hens lay 12 eggs a day.", "Twelve hens lay 72 eggs a day.", "How many eggs do 3 hens lay?"] * 9


def saved_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_a_trained_tokenizer_has_one_token_per_marker_and_digit() -> None:
    tokenizer = train_tokenizer(iter(TEXTS), 280)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == [
        "<pad>",
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    ids = tokenizer("<|im_start|>72<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "7", "2", "<|im_end|>"]
    assert len(tokenizer) == 280
    assert tokenizer.decode(tokenizer("é 12\n\tü")["input_ids"]) == "é 12\n\tü"


def test_a_trained_tokenizer_ends_turns_with_im_end() -> None:
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    assert terminators_of(tokenizer) == (4,)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"


def test_the_same_texts_give_the_same_tokenizer_and_a_kept_one_is_not_trained_again(tmp_path: Path) -> None:
    first, second = train_tokenizer(iter(TEXTS), 300), train_tokenizer(iter(TEXTS), 300)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    model = ModelConfig(tokenizer=TokenizerConfig(train_vocab_size=300))
    asked = []

    def texts() -> Iterator[str]:
        asked.append(1)
        return iter(TEXTS)

    made = load_tokenizer(model, texts, tmp_path / "tokenizer")
    kept = load_tokenizer(model, texts, tmp_path / "tokenizer")
    assert asked == [1]
    assert kept.get_vocab() == made.get_vocab() == first.get_vocab()
    assert kept.chat_template == first.chat_template
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]


def test_a_kept_tokenizer_that_was_damaged_is_refused_and_one_without_hashes_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, kept = ModelConfig(tokenizer=TokenizerConfig(train_vocab_size=280)), tmp_path / "tokenizer"
    load_tokenizer(model, lambda: iter(TEXTS), kept)
    file = kept / "tokenizer.json"
    whole = file.read_text()
    file.write_text(whole.replace('"e": ', '"E": ', 1))
    assert len(file.read_text()) == len(whole) and file.read_text() != whole
    with pytest.raises(
        UserError, match=r"tokenizer\.json: content differs.*\n.*rm -r .*tokenizer: it is trained"
    ):
        load_tokenizer(model, None, kept)
    file.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: missing"):
        load_tokenizer(model, None, kept)
    file.write_text(whole)
    (kept / MANIFEST).unlink()
    with caplog.at_level(logging.INFO, "rlhf"):
        assert len(load_tokenizer(model, None, kept)) == 280
    assert f"{kept} is not checked for damage" in caplog.text


def test_of_two_nodes_that_train_the_tokenizer_the_first_one_wins(tmp_path: Path) -> None:
    model = ModelConfig(tokenizer=TokenizerConfig(train_vocab_size=280))
    kept = tmp_path / "tokenizer"

    def texts_while_another_node_finishes() -> Iterator[str]:
        train_tokenizer(iter(TEXTS), 270).save_pretrained(kept)
        return iter(TEXTS)

    assert len(load_tokenizer(model, texts_while_another_node_finishes, kept)) == 270
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]


def test_too_small_a_vocabulary_is_refused_with_the_smallest_one() -> None:
    with pytest.raises(UserError, match="train_vocab_size=100.*\n.*261 or more"):
        train_tokenizer(iter(TEXTS), 100)


def test_a_config_without_a_tokenizer_names_both_ways_out() -> None:
    with pytest.raises(UserError, match="model.tokenizer.path.*model.tokenizer.train_vocab_size"):
        load_tokenizer(ModelConfig())


@pytest.mark.parametrize("pad", [None, "</s>", "<|im_end|>"])
def test_a_pad_that_would_hide_a_terminator_is_replaced_by_a_spare_token(
    tmp_path: Path, pad: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.pad_token = pad
    path = saved_tokenizer(tmp_path / "t", tokenizer)
    with caplog.at_level(logging.INFO, "rlhf"):
        loaded = load_tokenizer(ModelConfig(tokenizer=TokenizerConfig(path=str(path))))
    assert (loaded.pad_token, loaded.pad_token_id, len(loaded)) == ("<pad>", 0, len(tokenizer))
    assert "pad is <pad>" in caplog.text


def test_without_a_spare_token_pad_is_added(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tokenizers import Tokenizer, models

    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[END]": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="[END]", pad_token="[END]")
    path = saved_tokenizer(tmp_path / "t", tokenizer)
    with caplog.at_level(logging.INFO, "rlhf"):
        loaded = load_tokenizer(ModelConfig(tokenizer=TokenizerConfig(path=str(path))))
    assert (loaded.pad_token_id, loaded.eos_token_id, len(loaded)) == (3, 2, 4)
    assert "<pad> is added" in caplog.text


def test_a_good_pad_is_left_alone(tmp_path: Path) -> None:
    path = saved_tokenizer(tmp_path / "t", tiny_tokenizer(CHATML))
    loaded = load_tokenizer(ModelConfig(tokenizer=TokenizerConfig(path=str(path))))
    assert loaded.pad_token_id == 0 and loaded.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_missing_eos_is_what_the_chat_template_ends_turns_with(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.eos_token = None
    path = saved_tokenizer(tmp_path / "t", tokenizer)
    loaded = load_tokenizer(ModelConfig(tokenizer=TokenizerConfig(path=str(path))))
    assert loaded.eos_token == "<|im_end|>"


def test_no_eos_and_no_template_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    path = saved_tokenizer(tmp_path / "t", tokenizer)
    with pytest.raises(UserError, match="no eos token.*\n.*model.chat_template=chatml"):
        load_tokenizer(ModelConfig(tokenizer=TokenizerConfig(path=str(path))))


def test_a_named_template_is_set_and_brings_its_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    plain = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1, "</s>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", pad_token="<pad>")
    path = saved_tokenizer(tmp_path / "t", tokenizer)
    model = ModelConfig(tokenizer=TokenizerConfig(path=str(path)), chat_template="chatml")
    loaded = load_tokenizer(model)
    assert loaded.chat_template == read_template("chatml")
    assert loaded.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [3, 4]


@pytest.mark.parametrize(
    "name", ["chatml", "alpaca", "tulu", "zephyr", "transcript", "user_assistant", "plain"]
)
def test_every_named_template_is_shipped(name: str) -> None:
    assert "messages" in read_template(name)


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(UserError, match="model.chat_template=chatmll.*\n.*did you mean chatml"):
        read_template("chatmll")


def test_a_template_can_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(CHATML)
    assert read_template(str(path)) == CHATML


def test_a_tokenizer_of_absurd_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = saved_tokenizer(tmp_path / "t", tiny_tokenizer())
    model = ModelConfig(tokenizer=TokenizerConfig(path=str(folder)))
    with open(folder / "tokenizer.json", "ab") as file:
        file.truncate(300 * 2**20)  # a hole, which takes no place on the disk
    for read in (load_tokenizer, network_of_fields):
        with pytest.raises(UserError, match=r"model\.tokenizer\.path=.*: tokenizer.json has 300 MiB"):
            read(model)


def network_of_fields(model: ModelConfig) -> object:
    """As the plan reads it."""
    return network_of(dataclasses.replace(model, config={"hidden_size": 8}))


@pytest.mark.parametrize("id", [10**6, 2**31, 2**32 - 1, 2**32, -1])
def test_a_vocabulary_with_absurd_ids_is_refused(id: int, tmp_path: Path) -> None:
    folder = saved_tokenizer(tmp_path / "t", tiny_tokenizer())
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zz"] = id
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"model\.tokenizer\.path=.*{id}"):
        load_tokenizer(ModelConfig(tokenizer=TokenizerConfig(path=str(folder))))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_tokenizer_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    folder = saved_tokenizer(tmp_path / "t", tiny_tokenizer())
    (folder / name).write_bytes(content)
    model = ModelConfig(tokenizer=TokenizerConfig(path=str(folder)))
    network_of_fields(model)
    with pytest.raises(UserError, match=r"model\.tokenizer\.path="):
        load_tokenizer(model)
