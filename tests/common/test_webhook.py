"""Alerts reach the user's address in bounded time, or a line says why not; neither tells a secret."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from common import webhook
from common.errors import UserError
from common.fields import as_schema
from common.tracking_config import AlertKind, TrackingConfig
from common.webhook import Webhook, address_of
from tests import served
from tests.dripping import dripping, saying


class Listener(ThreadingHTTPServer):
    """Remembers what is posted; answers with `status`, and a redirect where it is one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.posted: list[tuple[str, dict[str, Any]]] = []
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/services/T0/very-secret"


class _Handler(BaseHTTPRequestHandler):
    server: Listener

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append((self.path, json.loads(body)))
        self.send_response(self.server.status)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def listener() -> Iterator[Listener]:
    server = Listener()
    with served.serving(server):
        yield server


def post(url: str | None, *texts: str, kinds: list[AlertKind] | None = None) -> list[str]:
    said: list[str] = []
    tracking = TrackingConfig(webhook=url, alerts=list(AlertKind) if kinds is None else kinds)
    with Webhook(tracking, "demo", said.append) as hook:
        for text in texts:
            hook.post(AlertKind.failure, "ppo", text)
    return said


def test_an_alert_is_posted_as_json_without_credentials(listener: Listener) -> None:
    assert post(listener.url, "no access with hf_" + "a" * 34, "again") == []
    assert listener.posted == [
        (
            "/services/T0/very-secret",
            {"text": text, "event": "failure", "run": "demo", "step": "ppo"},
        )
        for text in ("no access with [redacted]", "again")
    ]


def test_what_was_not_asked_for_is_not_posted(listener: Listener) -> None:
    assert post(listener.url, "text", kinds=[AlertKind.end]) == []
    assert post(None, "text") == []
    assert listener.posted == []


@pytest.mark.parametrize(("status", "why"), [(500, "it answers 500"), (307, "it answers 307")])
def test_a_refusal_is_said_once_and_names_no_address(listener: Listener, status: int, why: str) -> None:
    listener.status = status
    said = post(listener.url, "one", "two")
    assert said == [f"warning: tracking.webhook: an alert was not posted: {why}; the run goes on"]
    assert [path for path, _ in listener.posted] == ["/services/T0/very-secret"] * 2  # and nowhere else


def test_an_address_where_nobody_is_costs_a_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (said,) = post(f"http://127.0.0.1:{port}/secret", "one")
    assert "ConnectionRefusedError" in said and "secret" not in said


def test_a_server_that_never_ends_its_answer_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "POST_SECONDS", 0.3)
    with saying(dripping(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")) as (port, _):
        (said,) = post(f"http://127.0.0.1:{port}", "one")
    assert "no answer in 0.3 s" in said


def test_an_end_that_has_too_much_to_post_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "CLOSE_SECONDS", 0.2)
    with saying(dripping(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")) as (port, _):
        said = post(f"http://127.0.0.1:{port}", "one", "two")
    (line,) = said
    assert "not everything was posted in 0.2 s" in line


def test_a_secret_address_is_taken_from_the_environment(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT", listener.url)
    assert post("env:CHAT", "one") == [] and len(listener.posted) == 1
    monkeypatch.delenv("CHAT")
    with pytest.raises(UserError, match="CHAT is not set"):
        address_of("env:CHAT")
    monkeypatch.setenv("CHAT", "http://chat.example/secret")
    with pytest.raises(UserError, match="unencrypted to chat.example") as caught:
        address_of("env:CHAT")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://chat.example/hook", "would send alerts unencrypted to chat.example"),
        ("ftp://chat.example", "is not a URL that can be asked"),
        ("https://user:password@chat.example", "holds a credential"),
        ("https://chat.example?token=abc", "holds a credential"),
        ("env:MY-CHAT", "webhook=env:MY-CHAT is not allowed"),
        ("https://[", "is no URL"),
    ],
)
def test_an_address_that_may_not_be_asked_is_refused(address: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        as_schema(TrackingConfig, {"webhook": address}, "tracking.")
    assert "tracking.webhook" in str(caught.value) and "password" not in str(caught.value)
    as_schema(TrackingConfig, {"webhook": "https://chat.example/hook"}, "tracking.")
