"""Alerts posted to an address of the user's: watchdogs, failures and ends of steps, as JSON.

Takes what happened, in a line; returns nothing. A thread of its own posts, with a bound on each post and on
the end: no call waits, and none fails a run. What could not be posted is said in one line. An address may be
a secret (chat services put theirs into its path), so that messages name its host alone.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from common.addresses import check_url, is_this_machine
from common.background import Background
from common.deadline import within
from common.errors import UserError
from common.redact import shown
from common.tracking_config import FROM_ENVIRONMENT, WEBHOOK, AlertKind, TrackingConfig

POST_SECONDS = 5.0
CLOSE_SECONDS = 6.0
KEY = "tracking.webhook"


class Webhook:
    """Where `tracking.webhook` points; does nothing without one, or for kinds that `tracking.alerts` leaves
    out.

    say: hears, once, that an alert could not be posted. Use with `with`.
    """

    def __init__(self, tracking: TrackingConfig, run_name: str, say: Callable[[str], None]) -> None:
        self._tracking, self._run_name, self._say = tracking, run_name, say
        self._failed = False
        self._calls = None if tracking.webhook is None else Background("webhook")

    def post(self, kind: AlertKind, step: str, text: str) -> None:
        """Queue {"text", "event", "run", "step"}; `text` without credentials, as chat services take it."""
        if self._calls is None or kind not in self._tracking.alerts:
            return
        said = {"text": shown(text), "event": kind.value, "run": self._run_name, "step": step}
        self._calls.put(lambda: self._attempt(json.dumps(said).encode()))

    def __enter__(self) -> Webhook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait a bounded time for what is still to be posted."""
        if self._calls is not None and not self._calls.close(CLOSE_SECONDS):
            self._warn(f"not everything was posted in {CLOSE_SECONDS:g} s")

    def _attempt(self, body: bytes) -> None:
        try:
            address = address_of(self._tracking.webhook or "")
            within(POST_SECONDS, lambda: _post(address, body))
        except TimeoutError:
            self._warn(f"no answer in {POST_SECONDS:g} s")
        except urllib.error.HTTPError as error:
            self._warn(f"it answers {error.code}")
        except UserError as error:
            self._warn(error.message)
        except Exception as error:  # its text may hold the address
            self._warn(type(getattr(error, "reason", error)).__name__)

    def _warn(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            self._say(f"warning: {KEY}: an alert was not posted: {why}; the run goes on")


def address_of(named: str) -> str:
    """The address that `tracking.webhook` names, of the environment for `env:NAME`. UserError for none."""
    if not named.startswith(FROM_ENVIRONMENT):
        return named
    name = named.removeprefix(FROM_ENVIRONMENT)
    address = os.environ.get(name, "").strip()
    if not address:
        raise UserError(f"{KEY}={named}, and {name} is not set", hint=f"export {name}=https://...")
    try:
        parts = urlsplit(address)
        check_url(f"{parts.scheme}://{parts.netloc}", f"{name}, of {KEY}", WEBHOOK)
    except ValueError:
        raise UserError(f"{name}, of {KEY}, holds no URL", hint=f"e.g. {WEBHOOK.example}") from None
    return address


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Nothing is sent on to another address."""


def _post(address: str, body: bytes) -> None:
    """One POST; raises unless it is answered with success."""
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if is_this_machine(urlsplit(address).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(  # noqa: S310 - checked: https, or http to this machine
        address, body, {"Content-Type": "application/json"}
    )
    urllib.request.build_opener(*handlers).open(request, timeout=POST_SECONDS).close()
