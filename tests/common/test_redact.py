"""What counts as a credential, and what only sounds like one."""

from __future__ import annotations

import pytest

from common.redact import HIDDEN, names_a_credential, redact, redact_text

HEX_40 = "0123456789abcdef0123456789abcdef01234567"

CREDENTIAL_NAMES = ["token", "hf_token", "HF_TOKEN", "accessToken", "auth-token", "wandb_api_key", "api_key"]
CREDENTIAL_NAMES += ["apikey", "key", "private_key", "password", "db_password", "secret", "client_secret"]
CREDENTIAL_NAMES += ["aws_secret_access_key"]
HARMLESS_NAMES = ["num_tokens", "tokenizer", "max_new_tokens", "pad_token", "eos_token", "image_token"]
HARMLESS_NAMES += [
    "pad_token_id",
    "num_key_value_heads",
    "tokens_per_second",
    "sort_key",
    "monkey",
    "run_name",
]
HARMLESS_NAMES += ["keep_checkpoints", ""]


@pytest.mark.parametrize("name", CREDENTIAL_NAMES)
def test_a_credential_is_known_by_its_name(name: str) -> None:
    assert names_a_credential(name)
    assert redact({name: "anything"}) == {name: HIDDEN}


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_words_of_the_field_that_sound_alike_are_left_alone(name: str) -> None:
    assert redact({name: "<value>", "n": 3}) == {name: "<value>", "n": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf_abcdefghijklmnop", HIDDEN),
        ("use sk-abcdefghij1234567890 now", f"use {HIDDEN} now"),
        (HEX_40, HIDDEN),
        ("wandb_v1_abcdefghijklmnopqrstuvwx", HIDDEN),
        ("https://me:hunter2@host.example/x", f"https://{HIDDEN}@host.example/x"),
        ("https://onlytoken@host.example/x", f"https://{HIDDEN}@host.example/x"),
        ("https://h.example/f?a=1&token=zzz&b=2", f"https://h.example/f?a=1&token={HIDDEN}&b=2"),
        ("Authorization: Bearer abc.def", f"Authorization: Bearer {HIDDEN}"),
    ],
)
def test_a_credential_is_known_by_its_look(text: str, expected: str) -> None:
    assert redact_text(text) == expected
    assert redact({"note": text}) == {"note": expected}


@pytest.mark.parametrize(
    "text",
    [
        "hf_model",  # a short name that only begins alike
        "risk-adjusted-returns-of-things",
        HEX_40 + HEX_40[:24],  # SHA-256
        "me@host.example",
        "org/name",
        "https://host.example/path?tokenizer=1",
    ],
)
def test_values_that_only_look_a_little_like_credentials_stay(text: str) -> None:
    assert redact({"note": text}) == {"note": text}


def test_a_commit_under_a_name_for_commits_stays_readable() -> None:
    assert redact({"revision": HEX_40, "git_commit": HEX_40, "other": HEX_40}) == {
        "revision": HEX_40,
        "git_commit": HEX_40,
        "other": HIDDEN,
    }


def test_nested_values_are_hidden_and_the_original_is_untouched() -> None:
    original = {"a": [{"password": 1234}, "sk-abcdefghij"], "secrets": {"x": "y", "none": None}, "flag": True}
    assert redact(original) == {
        "a": [{"password": HIDDEN}, HIDDEN],
        "secrets": {"x": HIDDEN, "none": None},
        "flag": True,
    }
    assert original["a"][0] == {"password": 1234}  # type: ignore[index]


def test_an_unset_credential_still_reads_as_unset() -> None:
    assert redact({"hf_token": None, "api_key": "", "use_token": False}) == {
        "hf_token": None,
        "api_key": "",
        "use_token": False,
    }
