"""Scores from a reward server over HTTP, with nothing but the standard library.

Takes the responses of an iteration, sends one POST of {"prompts", "completions", "columns"} as JSON, returns
the {"rewards": [...]} of the answer as float64. Trusts nothing: only https, or http to this machine, unless
`allow_http` is set; no redirect is followed; an answer has a largest size, a deadline, and a finite number
for every completion. A failure that may pass (no connection, a timeout, 5xx, 429) is tried again with growing
pauses; any other, or one that lasts, ends the run with a UserError: no score is ever made up.

A token is read from the environment (`RLHF_REWARD_TOKEN`, or `RLHF_REWARD_TOKEN_<NAME>` for the source of
that name) and sent as a bearer token; it is in no file and no message. https goes through the environment's
proxy (`https_proxy`, `no_proxy`); this machine and plain http are always reached directly.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import logging
import os
import re
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np

from common.addresses import is_this_machine
from common.deadline import within
from common.errors import UserError
from common.https import certificate_error, connection_to, hang_up, target
from common.redact import redact_text
from step3_ppo.rewards.config import FIRST_PAUSE, LONGEST_PAUSE, TOKEN, check_url
from step3_ppo.rewards.functions import Columns, Prompts, finite_scores

log = logging.getLogger("rlhf.ppo")

LARGEST_ANSWER = 16 * 2**20
"""Bytes of an answer; ten thousand rewards take about 0.2 MiB."""
READ_BYTES = 2**16
ANSWER = 'expected: {"rewards": [a finite number for every completion, in their order]}'


class _Passing(Exception):
    """A failure that may pass; `pause`: seconds that the server asks to wait (Retry-After), else 0."""

    def __init__(self, what: str, pause: float = 0.0) -> None:
        super().__init__(what)
        self.pause = pause


@dataclass(frozen=True)
class RewardServer:
    """One server, checked when it is made.

    timeout: seconds for an attempt, from looking up the name to the answer's last byte. retries: further
    attempts. token: sent as a bearer token, never unencrypted over a network. UserError for a URL that is not
    allowed.
    """

    url: str
    key: str
    timeout: float = 30.0
    retries: int = 4
    allow_http: bool = False
    token: str | None = field(default=None, repr=False)
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        parts = check_url(self.url, self.key, allow_http=self.allow_http)
        if self.token and not all("!" <= character <= "~" for character in self.token):
            raise UserError(f"{TOKEN} holds a space or a sign that no token has", hint="set it again")
        if self.token and parts.scheme == "http" and not is_this_machine(parts.hostname or ""):
            raise UserError(
                f"{TOKEN} would travel unencrypted to {parts.hostname}", hint=f"use https, or unset {TOKEN}"
            )

    def __call__(self, prompts: Prompts, completions: Sequence[str], columns: Columns) -> np.ndarray:
        """float64 [B], all finite. UserError with every attempt when the server does not give them."""
        body = self._request(prompts, completions, columns)
        return self._scores(self._answer(body), completions)

    def _request(self, prompts: Prompts, completions: Sequence[str], columns: Columns) -> bytes:
        """The body of a request: JSON in ASCII, other characters escaped."""
        content = {
            "prompts": list(prompts),
            "completions": list(completions),
            "columns": {name: list(values) for name, values in columns.items()},
        }
        try:
            return json.dumps(content, allow_nan=False).encode("ascii")
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.key}: the rows hold a value that JSON cannot say: {error}",
                hint="numbers must be finite; leave the column out of the data",
            ) from None

    def _answer(self, body: bytes) -> bytes:
        """The first valid answer. UserError when attempts or time are used up."""
        failures: list[str] = []
        began, pause = time.monotonic(), FIRST_PAUSE
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(body)
            except _Passing as failure:
                failures.append(str(failure))
                wait = max(pause, failure.pause)
                if attempt == self.retries or failure.pause > self._time_left(began):
                    break
                log.warning("%s: %s; trying again in %.3g s", self.key, failure, wait)
                self.sleep(wait)
                pause = min(2 * pause, LONGEST_PAUSE)
        raise UserError(
            f"{self.key}: {self.url} gave no rewards in {_times(failures)}, "
            f"over {time.monotonic() - began:.3g} s:\n    " + "\n    ".join(_numbered(failures)),
            hint="nothing was scored in its place: see to the server and run the same command again; "
            "retries and timeout beside the url allow for more",
        )

    def _time_left(self, began: float) -> float:
        """Seconds left of all attempts' time, within which a server may still ask to wait."""
        return began + self.timeout * (self.retries + 1) - time.monotonic()

    def _attempt(self, body: bytes) -> bytes:
        """One POST. Raises _Passing for a failure that may pass, UserError for any other."""
        connection = connection_to(urlsplit(self.url), self.timeout)
        try:
            response, content = within(
                self.timeout, lambda: self._exchange(connection, body), lambda: hang_up(connection)
            )
        except ssl.SSLCertVerificationError as error:
            raise certificate_error(f"{self.key}: {self.url}", error) from None
        except TimeoutError:
            raise _Passing(f"no whole answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(f"{type(error).__name__}: {error}") from None
        self._check_status(response, content)
        if len(content) > LARGEST_ANSWER:
            self._refuse(f"is larger than {LARGEST_ANSWER / 2**20:g} MiB")
        if response.length is not None:  # it was announced; read1() does not say what has not come
            missing = int(response.headers["Content-Length"]) - len(content)
            if missing:
                raise _Passing(f"the answer broke off {missing} bytes before its end")
        return content

    def _exchange(
        self, connection: http.client.HTTPConnection, body: bytes
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Send the body and read the answer; stops reading once it is too large."""
        with contextlib.closing(connection):
            connection.request("POST", target(urlsplit(self.url)), body, self._headers())
            response = connection.getresponse()
            lengths = response.headers.get_all("Content-Length", [])
            if lengths and not (len(lengths) == 1 and re.fullmatch("[0-9]{1,18}", lengths[0])):
                said = _excerpt(", ".join(lengths).encode())
                self._refuse(f"has the Content-Length {said}: expected one whole number")
            content = bytearray()
            # not read(), which takes a chunk of negative length for one without an end
            while len(content) <= LARGEST_ANSWER and (block := response.read1(READ_BYTES)):
                content += block
            return response, bytes(content)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        return headers | ({"Authorization": f"Bearer {self.token}"} if self.token else {})

    def _check_status(self, response: http.client.HTTPResponse, content: bytes) -> None:
        """Raises _Passing or UserError unless the status is 200."""
        status = response.status
        if status == 200:
            return
        said = f"{status} {response.reason}: {_excerpt(content)}".rstrip(": ")
        if status == 429 or status >= 500:
            pause = _retry_after(response.headers)
            raise _Passing(f"{said} (to be asked again in {pause:.3g} s)" if pause else said, pause)
        if 300 <= status < 400:
            where = _excerpt((response.headers.get("Location") or "").encode())
            raise UserError(
                f"{self.key}: {self.url} sends on to {where or 'another place'} ({status}), "
                "where nothing is sent",
                hint="name the final address",
            )
        way = f"it wants a token: {TOKEN}" if status in (401, 403) else "the request is not what it expects"
        raise UserError(f"{self.key}: {self.url} refuses: {said}", hint=way)

    def _scores(self, answer: bytes, completions: Sequence[str]) -> np.ndarray:
        """The rewards in an answer's JSON, read strictly."""
        try:
            content = json.loads(
                answer.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique_keys
            )
        except (ValueError, RecursionError) as error:
            self._refuse(f"is not JSON ({error}): {_excerpt(answer)}")
        if not isinstance(content, dict) or not isinstance(content.get("rewards"), list):
            self._refuse(f"has no list of rewards: {_excerpt(answer)}")
        return finite_scores(content["rewards"], completions, f"{self.key}: {self.url}")

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.key}: the answer of {self.url} {what}", hint=ANSWER)


def token_of(name: str, *, is_only_server: bool) -> str | None:
    """The token for the source `name`, from the environment.

    RLHF_REWARD_TOKEN without a name is for the only server; UserError where it would go to several.
    """
    own = f"{TOKEN}_{re.sub('[^A-Z0-9]', '_', name.upper())}"
    if os.environ.get(own):
        return os.environ[own].strip()
    if os.environ.get(TOKEN) and not is_only_server:
        raise UserError(
            f"{TOKEN} is set, and ppo.rewards names several servers, all of which would see it",
            hint=f"a token for each: {own}",
        )
    return (os.environ.get(TOKEN) or "").strip() or None


def _retry_after(headers: http.client.HTTPMessage) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date by the server's clock; 0 without."""
    value = headers.get("Retry-After", "")
    try:
        if value.strip().isdecimal():
            return float(value)
        until, now = map(email.utils.parsedate_to_datetime, (value, headers.get("Date", "")))
        return max(0.0, (until - now).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _excerpt(content: bytes) -> str:
    """The beginning of a server's answer, on one line and without control characters."""
    text = redact_text(content[:200].decode("utf-8", errors="replace"))
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def _times(failures: Sequence[str]) -> str:
    return "one attempt" if len(failures) == 1 else f"{len(failures)} attempts"


def _numbered(failures: Sequence[str]) -> list[str]:
    return [f"{number}: {failure}" for number, failure in enumerate(failures, 1)]
