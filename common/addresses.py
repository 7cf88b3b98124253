"""Addresses of servers that are told something: which may be, and whether it is this machine. Connects to
nothing.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from common.errors import UserError
from common.redact import redact_text


@dataclass(frozen=True)
class Words:
    """What an error says of an address. sends: what would travel unencrypted. instead: the way out where the
    address holds a credential; if_plain: where it is http."""

    example: str
    sends: str
    instead: str
    if_plain: str


def check_url(url: str, key: str, words: Words, *, allow_http: bool = False) -> SplitResult:
    """The parts of an allowed URL: https, or http to this machine or where `allow_http` says so.

    UserError naming `key` for any other, and for one that holds a credential: it would be written down.
    """
    if redact_text(url) != url:
        raise UserError(
            f"{key}={redact_text(url)} holds a credential, which would be written down with the settings",
            hint=words.instead,
        )
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for what is no port
    except ValueError as error:
        raise UserError(f"{key}={url} is no URL: {error}", hint=f"e.g. {words.example}") from None
    visible = all("!" <= character <= "~" for character in url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or not visible:
        raise UserError(f"{key}={url!r} is not a URL that can be asked", hint=f"e.g. {words.example}")
    if parts.scheme == "http" and not is_this_machine(parts.hostname) and not allow_http:
        raise UserError(
            f"{key}={url} would send {words.sends} unencrypted to {parts.hostname}", hint=words.if_plain
        )
    return parts


def is_this_machine(host: str) -> bool:
    """Whether a host name or address is the loopback interface. Asks no name server."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
