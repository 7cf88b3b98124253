"""A reward server, or a proxy before it, that takes its time: one deadline holds over all of an attempt."""

from __future__ import annotations

import socket
import threading

import pytest

from common.errors import UserError
from step3_ppo.rewards import server as module
from step3_ppo.rewards.server import RewardServer
from tests.dripping import dripping, saying

KEY = "ppo.rewards[0].url"
ELSEWHERE = "https://rewards.example/score"
LATE = "1: no whole answer within 0.2 s"


def ask(url: str, timeout: float = 0.2) -> list[float]:
    return RewardServer(url, KEY, timeout=timeout, retries=0)(["a"], ["yes", "no"], {}).tolist()


def through(port: int, patch: pytest.MonkeyPatch) -> None:
    """Let a proxy at this port stand before every other machine."""
    patch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    patch.delenv("no_proxy", raising=False)
    patch.delenv("NO_PROXY", raising=False)


OK = b"HTTP/1.1 200 OK\r\n"
TLS_HELLO = b"\x16\x03\x03\x40\x00"
"""The beginning of a message of a handshake, which is 16 KiB long."""


@pytest.mark.parametrize(
    "parts",
    [(b"HTTP/1.1 200", b" "), (OK, b"X: y\r\n"), (OK + b"\r\n", TLS_HELLO, b"\0")],
    ids=["status", "headers", "tls"],
)
def test_a_proxy_that_drips_is_left_in_time_and_hung_up_on(
    parts: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with saying(dripping(*parts)) as (port, hung_up):
        through(port, monkeypatch)
        with pytest.raises(UserError, match=LATE):
            ask(ELSEWHERE)
        assert hung_up.wait(10)


@pytest.mark.parametrize(
    "parts",
    [
        (b"H",),
        (b"HTTP/1.1 100 Continue\r\n\r\n",),
        (OK + b"X: ", b"y"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    ],
    ids=["status", "continue", "header", "chunks", "chunk's length"],
)
def test_a_server_that_drips_is_left_in_time_and_hung_up_on(parts: list[bytes]) -> None:
    with saying(dripping(*parts)) as (port, hung_up):
        with pytest.raises(UserError, match=LATE):
            ask(f"http://127.0.0.1:{port}/")
        assert hung_up.wait(10)


def test_a_proxy_that_was_reached_late_is_hung_up_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline passes while its name is looked up, when there is nothing yet to hang up."""
    may_go_on, look_up = threading.Event(), socket.getaddrinfo

    def slowly(host: str, *arguments: object, **named: object) -> object:
        may_go_on.wait(10)
        return look_up("127.0.0.1", *arguments, **named)  # type: ignore[arg-type]

    with saying(dripping(b"HTTP/1.1 200", b" ")) as (port, hung_up):
        monkeypatch.setattr(socket, "getaddrinfo", slowly)
        through(port, monkeypatch)
        with pytest.raises(UserError, match=LATE):
            ask(ELSEWHERE)
        assert not may_go_on.is_set() and not hung_up.is_set()
        may_go_on.set()
        assert hung_up.wait(10)


@pytest.mark.parametrize(
    "lengths",
    [["-5"], ["5", "7"], ["5", "5"], ["5, 7"], ["+19"], ["0x13"], ["1_9"], ["\u0661"], [""]],
)
def test_a_length_that_is_no_number_or_doubled_is_refused(lengths: list[str]) -> None:
    headers = "".join(f"Content-Length: {length}\r\n" for length in lengths)
    answer = OK + headers.encode() + b'\r\n{"rewards": [1, 2]}'
    with saying(lambda: iter([answer])) as (port, _):
        with pytest.raises(UserError, match="has the Content-Length .*: expected one whole number") as caught:
            ask(f"http://127.0.0.1:{port}/", timeout=5.0)
        assert KEY in caught.value.message


@pytest.mark.parametrize("length", [b"-1", b"-5"])
def test_a_chunk_of_negative_length_is_no_way_round_the_largest_answer(
    length: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST_ANSWER", 1000)
    with saying(dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n" + length + b"\r\n", b" " * 100)) as (
        port,
        hung_up,
    ):
        with pytest.raises(UserError, match="is larger than"):
            ask(f"http://127.0.0.1:{port}/", timeout=5.0)
        assert hung_up.wait(10)
