"""Functions and servers that score responses: how they are named, and how long a server may take.

Takes the texts of `ppo.rewards` and `ppo.evaluation.functions`; raises a UserError for one that cannot work.
Cheap to import: the controller checks them too, before anything is launched or written down.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from common.errors import UserError
from common.redact import redact_text

FORM = "package.module:function(prompts, completions, **columns) -> list[float]"
"""Of a function that scores."""
TOKEN = "RLHF_REWARD_TOKEN"
"""Environment variable of the bearer token for a server."""
FIRST_PAUSE = 1.0
"""Seconds before the second attempt; each further pause is twice as long."""
LONGEST_PAUSE = 60.0
"""Seconds at which pauses stop growing: with twenty retries they would come to days."""
GROWING = 6
"""Pauses until then: 1, 2, 4, 8, 16 and 32 seconds."""


def check_reference(reference: str, key: str) -> None:
    """UserError unless the text has the form package.module:function; nothing is imported."""
    module, colon, function = reference.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), *function.split(".")]):
        dotted = module.rpartition(".")
        plain = not colon and all(part.isidentifier() for part in (dotted[2], *dotted[0].split(".")))
        way = f"did you mean {dotted[0]}:{dotted[2]}?" if plain else f"expected: {FORM}"
        raise UserError(f"{key}={reference} does not name a function", hint=way)


def check_url(url: str, key: str, *, allow_http: bool) -> SplitResult:
    """The parts of a URL that may be asked. UserError naming `key` for any other; nothing is connected."""
    if redact_text(url) != url:
        raise UserError(
            f"{key}={redact_text(url)} holds a credential, which would be written down with the settings",
            hint=f"take it out of the URL and set the environment variable {TOKEN}, sent as a bearer token",
        )
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for what is no port
    except ValueError as error:
        raise UserError(
            f"{key}={url} is no URL: {error}", hint="e.g. https://rewards.example/score"
        ) from None
    visible = all("!" <= character <= "~" for character in url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or not visible:
        raise UserError(
            f"{key}={url!r} is not a URL that can be asked", hint="e.g. https://rewards.example/score"
        )
    if parts.scheme == "http" and not is_this_machine(parts.hostname) and not allow_http:
        raise UserError(
            f"{key}={url} would send prompts and completions unencrypted to {parts.hostname}",
            hint="use https, a server on this machine, or allow it beside the url: allow_http: true",
        )
    return parts


def is_this_machine(host: str) -> bool:
    """Whether a host's name or address is the loopback interface, told without asking a name server."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def longest_wait(timeout: float, retries: int) -> float:
    """Seconds that a server of `ppo.rewards` may take in all, until its answer or the error.

    Every attempt takes its timeout and every pause its length. A server that asks to be left alone may do so
    until the attempts' time is over; that, too, may come before the last ones.
    """
    growing = min(retries, GROWING)
    pauses = FIRST_PAUSE * (2.0**growing - 1) + LONGEST_PAUSE * (retries - growing)
    return timeout * (2 * retries + 1) + pauses
