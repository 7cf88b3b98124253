"""Find credentials in settings, and hide them in copies that people read.

`credentials_in` names the settings that certainly hold one; composing refuses them, so that what a run is
made of (resolved.yaml, state, scripts of launchers) is written as it is and never redacted. `redact` and
`redact_text` make copies for people: W&B, reports, the console.

A credential is known by the name of its key (`hf_token`, `wandb_api_key`, `password`) or by its look
(`hf_...`, `sk-...`, `user:password@host`). What only sounds alike (`num_tokens`, `pad_token`) is
none, and neither are the 40 or 64 hexadecimal digits of a commit or a checksum, as in the folders of the
hub's cache: they are hidden in a text only behind a word that asks for a key. It changes nothing in place.
`has_wandb_key` says whether one is at hand, never which; nothing here imports anything heavy.
"""

from __future__ import annotations

import netrc
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from common.text import printable

HIDDEN = "[redacted]"
LONGEST_SHOWN = 20_000
"""Characters of an error or a line; a row may have a key of megabytes."""

_ALWAYS = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials"}
_ALWAYS |= {"authorization", "apikey", "bearer", "cookie"}
# "<word>_token" names an entry of the vocabulary, but for these words and in the names of the environment
_BEFORE_TOKEN = {"hf", "hub", "huggingface", "wandb", "access", "auth", "oauth", "api", "bearer", "refresh"}
_BEFORE_TOKEN |= {"session", "security", "id", "identity", "bot", "git", "github", "gitlab", "reward"}
_ENDS_IN_KEY = {"api", "access", "private", "wandb", "hf", "auth", "encryption", "signing", "account", "ssh"}

_CREDENTIAL_VALUES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:hf|api_org)_[A-Za-z0-9]{30,}"  # hub
    r"|sk-(?:[A-Za-z0-9]+-)*(?=[A-Za-z_]*\d)\w{16,}[\w-]*"  # model providers
    r"|wandb_v\d+_[A-Za-z0-9_-]{16,}"  # W&B
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w-]{20,}"  # forges
    r"|A(?:KIA|SIA)[0-9A-Z]{16}|AIza[\w-]{30,}|xox[abprs]-[\w-]{10,}"  # clouds, chat
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"  # JSON web tokens
    r")"
)
_URL_PASSWORD = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*:/{1,2})[^/@\s:]*:[^/@\s]+@")  # one: taken for a path
_URL_USER = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/@\s]+@")
_QUERY = re.compile(r"([?&]([\w-]+)=)[^&\s]+")
_SIGNS = {"sig", "signature"}
_BEARER = re.compile(r"\b(Bearer\s+)\S+", re.IGNORECASE)
_HEX_KEY = re.compile(
    r"((?:key|token|secret|password)\W{1,3}(?:is\W)?)[0-9a-f]{40}(?![0-9A-Za-z])", re.IGNORECASE
)
_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*['\"]?(\w+)")


def credentials_in(value: Any, key: str = "") -> Iterator[str]:
    """Dotted keys, below `key`, of what certainly is a credential, or refers to one in the environment."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from credentials_in(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from credentials_in(item, key)
    elif any(map(names_a_credential, key.split("."))):
        if _hide_leaves(value) != value:
            yield key
    elif isinstance(value, str) and is_credential(value):
        yield key


def is_credential(text: str) -> bool:
    """Whether a text certainly holds a credential, or names a variable of the environment that does."""
    by_name = any(_is_secret_parameter(name) for _, name in _QUERY.findall(text))
    by_name = by_name or any(map(names_a_credential, _ENVIRONMENT.findall(text)))
    return by_name or any(pattern.search(text) for pattern in (_CREDENTIAL_VALUES, _URL_PASSWORD))


def redact(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    """A plain copy of `mapping` in which every credential is `HIDDEN`; nested mappings and lists included."""
    return {key: _redacted(str(key), value) for key, value in mapping.items()}


def redact_text(text: str) -> str:
    """`text` without the parts that look like credentials (for log lines and error messages)."""
    for address in (_URL_USER, _URL_PASSWORD):
        text = address.sub(rf"\g<1>{HIDDEN}@", text)
    text = _QUERY.sub(lambda found: found[1] + HIDDEN if _is_secret_parameter(found[2]) else found[0], text)
    for pattern in (_BEARER, _HEX_KEY):
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return _CREDENTIAL_VALUES.sub(HIDDEN, text)


def shown(text: object) -> str:
    """What is quoted in an error, a log or a line of progress: without credentials and control codes, and
    without the middle of what nobody would read."""
    said = str(text)
    if (left_out := len(said) - LONGEST_SHOWN) > 0:
        half = LONGEST_SHOWN // 2
        said = f"{said[:half]} ... ({left_out} characters left out) ... {said[-half:]}"
    return redact_text(printable(said))


def names_a_credential(key: str) -> bool:
    """Whether a setting called `key` holds a credential, whatever its value looks like."""
    words = _words(key)
    if not words:
        return False
    if _ALWAYS & set(words):
        return True
    if words[-1] == "token":
        return len(words) == 1 or words[-2] in _BEFORE_TOKEN or key.isupper()
    return words[-1] == "key" and (len(words) == 1 or bool(_ENDS_IN_KEY & set(words)))


def _is_secret_parameter(name: str) -> bool:
    """Whether a parameter of a URL grants access."""
    return names_a_credential(name) or bool(_SIGNS & set(_words(name)))


def _redacted(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return _hide_leaves(value) if names_a_credential(key) else redact(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_redacted(key, item) for item in value]
    if names_a_credential(key):
        return _hide_leaves(value)
    return redact_text(value) if isinstance(value, str) else value


def _hide_leaves(value: Any) -> Any:
    """Everything below a credential's name is hidden; absent values and switches stay readable."""
    if isinstance(value, Mapping):
        return {key: _hide_leaves(item) for key, item in value.items()}
    return value if value is None or value == "" or isinstance(value, bool) else HIDDEN


def _words(key: str) -> list[str]:
    """`WANDB_API_KEY`, `apiKey` and `api-key` alike as lower-case words."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    return [word for word in re.split(r"[^A-Za-z0-9]+", spaced.lower()) if word]


def has_wandb_key(server: str, environ: Mapping[str, str]) -> bool:
    """Whether a key for `server` is at hand: in the environment or in the netrc file."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        entries = netrc.netrc(environ.get("NETRC"))  # ~/.netrc is refused where others may read it
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(server).netloc) is not None
