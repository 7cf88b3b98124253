"""What counts as a credential, and what only sounds like one."""

from __future__ import annotations

import pytest

from common.redact import (
    HIDDEN,
    credentials_in,
    is_credential,
    names_a_credential,
    redact,
    redact_text,
    shown,
)

HEX_40 = "0123456789abcdef0123456789abcdef01234567"
HUB = "hf_" + "abcdefghijklmnopqrstuvwxyz01234567"

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
HARMLESS_NAMES += ["keep_checkpoints", "boi_token", "soft_token", "tokenizer.path", ""]


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
        (HUB, HIDDEN),
        ("use sk-abcdefghij1234567890 now", f"use {HIDDEN} now"),
        ("use sk-proj-abcdefghij1234567890-x now", f"use {HIDDEN} now"),
        (f"api_key={HEX_40}", f"api_key={HIDDEN}"),
        (f"wandb: API key is {HEX_40}", f"wandb: API key is {HIDDEN}"),
        ("wandb_v1_abcdefghijklmnopqrstuvwx", HIDDEN),
        ("https://me:hunter2@host.example/x", f"https://{HIDDEN}@host.example/x"),
        ("https://onlytoken@host.example/x", f"https://{HIDDEN}@host.example/x"),
        ("https://h.example/f?X-Amz-Signature=ab&b=2", f"https://h.example/f?X-Amz-Signature={HIDDEN}&b=2"),
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
        "/data/hf_checkpoints/sk-learn-classification-2024/a.jsonl",
        HEX_40,  # a commit
        f"/cache/models--org--name/snapshots/{HEX_40}",
        f"loading /cache/models--org--name/blobs/{HEX_40}{HEX_40[:24]} took 3 s",
        "risk-adjusted-returns-of-things",
        HEX_40 + HEX_40[:24],  # SHA-256
        "me@host.example",
        "org/name",
        "https://host.example/path?tokenizer=1&sort_key=2",
    ],
)
def test_values_that_only_look_a_little_like_credentials_stay(text: str) -> None:
    assert redact({"note": text}) == {"note": text}


def test_only_what_is_certain_is_refused_and_a_link_with_a_mere_user_is_not() -> None:
    certain = {"a": HUB, "b": [f"x {HUB}"], "c": "s3://me:mine@host/x", "d": "https://h/x?sig=ab"}
    certain |= {"e": {"api_key": HEX_40}, "f": {"secret": {"x": 1}}, "g": "${oc.env:MY_TOKEN,none}"}
    assert list(credentials_in(certain)) == ["a", "b", "c", "d", "e.api_key", "f.secret.x", "g"]
    plain = {"a": HEX_40, "b": f"runs/{HEX_40}/export", "c": "ssh://git@host/x", "d": "${oc.env:HOME}/models"}
    plain |= {"model": {"config": {"boi_token": "<image>", "pad_token": "<pad>"}}, "api_key": None}
    assert list(credentials_in({**plain, "e": "Bearer of news", "f": {"token": ""}})) == []


def test_a_key_of_wandb_is_known_by_the_key_that_it_stands_under() -> None:
    assert not is_credential(HEX_40)
    assert list(credentials_in({"wandb_api_key": HEX_40, "revision": HEX_40})) == ["wandb_api_key"]
    assert redact({"wandb_api_key": HEX_40, "revision": HEX_40}) == {
        "wandb_api_key": HIDDEN,
        "revision": HEX_40,
    }


def test_nested_values_are_hidden_and_the_original_is_untouched() -> None:
    original = {
        "a": [{"password": 1234}, "sk-abcdefghij1234567890"],
        "secrets": {"x": "y", "none": None},
        "flag": True,
    }
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


def test_of_what_nobody_would_read_the_middle_is_left_out() -> None:
    assert shown("x" * 20_000) == "x" * 20_000
    said = shown("begins " + "x" * 10**6 + " ends")
    assert said.startswith("begins x") and said.endswith("x ends") and len(said) < 20_100
    assert " ... (980012 characters left out) ... " in said
