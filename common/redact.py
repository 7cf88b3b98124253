"""Hide credentials: a nested mapping in, the same mapping with passwords, keys and tokens replaced out.

Two rules, because each misses what the other sees: by the name of the key (`hf_token`, `wandb_api_key`,
`password`), and by the look of the value (`hf_...`, `sk-...`, a 40-digit W&B key, `user:password@host`).
The words of the field that sound alike (`num_tokens`, `pad_token`, `num_key_value_heads`) are left alone.
It changes nothing in place, reads no environment and imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "[redacted]"

_ALWAYS = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials"}
_ALWAYS |= {"authorization", "apikey", "bearer", "cookie"}
# "<word>_token" names a vocabulary entry, not a credential, after these words
_VOCABULARY = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "stop", "end", "start", "image", "audio"}
_VOCABULARY |= {"video", "special", "added", "per", "next", "last", "first", "user", "assistant", "system"}
_ENDS_IN_KEY = {"api", "access", "private", "wandb", "hf", "auth", "encryption", "signing", "account", "ssh"}
# a 40-digit hexadecimal value under these names is a commit or a checksum, not a W&B key
_DIGESTS = {"revision", "commit", "hash", "sha", "sha1", "checksum", "digest", "fingerprint", "id"}

_CREDENTIAL_VALUES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}"  # hub
    r"|sk-[A-Za-z0-9_-]{8,}"  # model providers
    r"|wandb_v\d+_[A-Za-z0-9_-]{16,}|local-[0-9a-f]{40}"  # W&B
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"  # forges
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|xox[abprs]-[\w-]{10,}"  # clouds, chat
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"  # JSON web tokens
    r")"
)
_HEX_40 = re.compile(r"(?<![0-9A-Za-z])[0-9a-fA-F]{40}(?![0-9A-Za-z])")
_URL_PASSWORD = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/@\s]+@")
_QUERY_SECRET = re.compile(
    r"([?&](?:[\w-]*token|[\w-]*key|sig|signature|x-amz-signature|password)=)[^&\s]+", re.IGNORECASE
)
_BEARER = re.compile(r"\b(Bearer\s+)\S+", re.IGNORECASE)


def redact(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    """A plain copy of `mapping` in which every credential is `HIDDEN`; nested mappings and lists included."""
    return {key: _redacted(str(key), value) for key, value in mapping.items()}


def redact_text(text: str) -> str:
    """`text` without the parts that look like credentials (for log lines and error messages)."""
    for pattern in (_URL_PASSWORD, _QUERY_SECRET, _BEARER):
        text = pattern.sub(rf"\g<1>{HIDDEN}" + ("@" if pattern is _URL_PASSWORD else ""), text)
    return _HEX_40.sub(HIDDEN, _CREDENTIAL_VALUES.sub(HIDDEN, text))


def names_a_credential(key: str) -> bool:
    """Whether a setting called `key` holds a credential, whatever its value looks like."""
    words = _words(key)
    if not words:
        return False
    before = words[-2] if len(words) > 1 else ""
    if _ALWAYS & set(words):
        return True
    if words[-1] == "token":
        return before not in _VOCABULARY
    return words[-1] == "key" and (len(words) == 1 or bool(_ENDS_IN_KEY & set(words)))


def _redacted(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return _hide_leaves(value) if names_a_credential(key) else redact(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_redacted(key, item) for item in value]
    if names_a_credential(key):
        return _hide_leaves(value)
    return _redacted_text(key, value) if isinstance(value, str) else value


def _hide_leaves(value: Any) -> Any:
    """Everything below a credential's name is hidden; absent values and switches stay readable."""
    if isinstance(value, Mapping):
        return {key: _hide_leaves(item) for key, item in value.items()}
    return value if value is None or value == "" or isinstance(value, bool) else HIDDEN


def _redacted_text(key: str, text: str) -> str:
    is_digest = bool(_DIGESTS & set(_words(key))) and _HEX_40.fullmatch(text) is not None
    return text if is_digest else redact_text(text)


def _words(key: str) -> list[str]:
    """`WANDB_API_KEY`, `apiKey` and `api-key` alike as lower-case words."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    return [word for word in re.split(r"[^A-Za-z0-9]+", spaced.lower()) if word]
