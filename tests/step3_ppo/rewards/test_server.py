"""The client of a reward server, against real servers on the loopback interface."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from common.addresses import is_this_machine
from common.errors import UserError
from step3_ppo.rewards import server as module
from step3_ppo.rewards.config import check_url
from step3_ppo.rewards.server import RewardServer, token_of
from tests.served import serving as in_thread

KEY = "ppo.rewards[0].url"
COMPLETIONS = ["yes", "no"]

Reply = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Served:
    """A server that gives its replies in turn, the last one for ever, and keeps what it was sent."""

    url: str
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def answer(body: bytes | str | dict[str, Any], status: int = 200, **headers: str) -> Reply:
    content = json.dumps(body) if isinstance(body, dict) else body
    data = content.encode() if isinstance(content, str) else content

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return reply


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, each well within the timeout, for much longer than it."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


def broken_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"rewards": [1')


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def slow(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.0)


OK = answer({"rewards": [1.5, -2]})


@contextlib.contextmanager
def serving(*replies: Reply) -> Iterator[Served]:
    served = Served("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            served.headers.append(dict(self.headers))
            served.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            with contextlib.suppress(OSError):  # the client has gone
                replies[min(len(served.bodies), len(replies)) - 1](self)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with in_thread(server) as url:
        served.url = f"{url}/score"
        yield served


def ask(url: str, pauses: list[float] | None = None, **settings: Any) -> np.ndarray:
    sleep = [] if pauses is None else pauses
    server = RewardServer(url, KEY, **{"timeout": 5.0, "retries": 2, "sleep": sleep.append, **settings})
    return server(["a", [{"role": "user", "content": "bé"}]], COMPLETIONS, {"answer": ["x", None]})


def refused(reply: Reply, **settings: Any) -> UserError:
    """The error after one request: what the server says does not get better by asking again."""
    with serving(reply) as served:
        with pytest.raises(UserError) as caught:
            ask(served.url, **settings)
        assert len(served.bodies) == 1
        assert KEY in caught.value.message and served.url in caught.value.message
    return caught.value


def test_a_server_is_sent_everything_at_once_and_its_rewards_are_taken() -> None:
    with serving(OK) as served:
        scores = ask(served.url)
    assert scores.dtype == np.float64 and scores.tolist() == [1.5, -2.0]
    assert served.bodies == [
        {
            "prompts": ["a", [{"role": "user", "content": "bé"}]],
            "completions": COMPLETIONS,
            "columns": {"answer": ["x", None]},
        }
    ]
    assert "Authorization" not in served.headers[0]


@pytest.mark.parametrize(
    "reply", [answer("busy", 500), answer("", 503), answer("", 429), hang_up, broken_off, slow, drip]
)
def test_what_may_pass_is_tried_again(reply: Reply) -> None:
    pauses: list[float] = []
    with serving(reply, reply, OK) as served:
        scores = ask(served.url, pauses, timeout=0.25)
        assert scores.tolist() == [1.5, -2.0] and len(served.bodies) == 3
    assert pauses == [1.0, 2.0]  # each twice the one before


def test_a_server_that_always_fails_ends_the_run_with_all_that_was_tried() -> None:
    with serving(answer("out of\nmemory\x1b[31m", 500), hang_up, answer("", 503)) as served:
        with pytest.raises(UserError) as caught:
            ask(served.url)
        assert len(served.bodies) == 3
    message = caught.value.message
    assert "gave no rewards in 3 attempts" in message
    assert "1: 500 Internal Server Error: out of memory [31m\n" in message
    assert "2: RemoteDisconnected" in message and "3: 503 Service Unavailable" in message


def test_a_server_that_is_not_there_ends_the_run() -> None:
    with serving(OK) as served:
        pass
    with pytest.raises(UserError, match="gave no rewards in 3 attempts(.|\n)*3: ConnectionRefusedError"):
        ask(served.url)
    with pytest.raises(UserError, match="gave no rewards in one attempt"):
        ask(served.url, retries=0)


def test_pauses_stop_growing_at_a_minute() -> None:
    pauses: list[float] = []
    with serving(OK) as served:
        pass
    with pytest.raises(UserError, match="gave no rewards in 13 attempts"):
        ask(served.url, pauses, retries=12)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, *[60.0] * 6]


def test_an_answer_that_comes_byte_by_byte_must_be_whole_in_time() -> None:
    with serving(drip) as served, pytest.raises(UserError, match="1: no whole answer within 0.2 s"):
        ask(served.url, timeout=0.2, retries=0)


def test_when_to_ask_again_is_read_from_the_servers_own_clock() -> None:
    headers = HTTPMessage()
    headers["Date"], headers["Retry-After"] = formatdate(10_000, usegmt=True), formatdate(10_007, usegmt=True)
    assert module._retry_after(headers) == 7.0
    del headers["Date"]
    assert module._retry_after(headers) == 0.0


def test_a_server_that_asks_to_be_left_alone_is_left_alone_within_the_time_there_is() -> None:
    pauses: list[float] = []
    in_7_seconds = formatdate(time.time() + 7, usegmt=True)  # noqa: TID251
    with serving(answer("", 429, Retry_After="5"), answer("", 503, Retry_After=in_7_seconds), OK) as served:
        ask(served.url, pauses)
    assert pauses[0] == 5.0 and 4.0 < pauses[1] < 8.0
    with serving(answer("", 429, Retry_After="3600"), OK) as served:
        with pytest.raises(UserError, match=r"429 Too Many Requests \(to be asked again in 3.6e\+03 s\)"):
            ask(served.url)
        assert len(served.bodies) == 1
    for nonsense in ("soon", "-1", "²"):
        with serving(answer("", 429, Retry_After=nonsense.encode().decode("latin-1")), OK) as served:
            ask(served.url, pauses)
            assert pauses[-1] == 1.0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"rewards": [NaN, 1]}', "NaN is no number of JSON"),
        ('{"rewards": [1, -Infinity]}', "-Infinity is no number of JSON"),
        ('{"rewards": [1e999, 1]}', "returned inf as score 0"),
        ('{"rewards": [1%s, 1]}' % ("0" * 400), "as score 0"),
        ('{"rewards": [1, null]}', "returned None as score 1, for the completion 'no'"),
        ('{"rewards": [1, true]}', "returned True as score 1"),
        ('{"rewards": [1, "2"]}', "returned '2' as score 1"),
        ('{"rewards": [1]}', "returned 1 scores for 2 completions"),
        ('{"rewards": [1, 2, 3]}', "returned 3 scores for 2 completions"),
        ('{"rewards": {"0": 1}}', "has no list of rewards"),
        ('{"rewards": [1, 2], "rewards": [3, 4]}', "a key stands twice"),
        ('{"reward": [1, 2]}', "has no list of rewards"),
        ("[1, 2]", "has no list of rewards"),
        ("[" * 100_000, "is not JSON"),
        ("", "is not JSON"),
        ("<html>no\x1b[2J</html>", "is not JSON"),
        (b'{"rewards": [1, 2]}\xff', "is not JSON"),
    ],
)
def test_a_malformed_answer_is_refused_and_never_a_score(body: str | bytes, said: str) -> None:
    message = refused(answer(body)).message
    assert said in message and "\x1b" not in message


def test_an_answer_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"rewards": [1, 2]})
    monkeypatch.setattr(module, "LARGEST_ANSWER", len(body))
    with serving(answer(body)) as served:
        assert ask(served.url).tolist() == [1.0, 2.0]  # exactly as large is not too large
    assert "is larger than" in refused(answer(body + " ")).message


@pytest.mark.parametrize("status", [400, 401, 404, 413, 204])
def test_a_refusal_is_not_tried_again(status: int) -> None:
    error = refused(answer("no such thing" if status != 204 else "", status))
    assert f"refuses: {status} " in error.message
    assert ("RLHF_REWARD_TOKEN" in (error.hint or "")) == (status == 401)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with serving(OK) as elsewhere:
        message = refused(answer("", status, Location=elsewhere.url)).message
        assert elsewhere.url in message and elsewhere.bodies == []


def test_a_token_is_sent_and_never_said() -> None:
    with serving(answer("who are you? Bearer very-secret", 403)) as served:
        with pytest.raises(UserError) as caught:
            ask(served.url, token="very-secret")
        assert served.headers[0]["Authorization"] == "Bearer very-secret"
    assert "very-secret" not in str(caught.value)
    assert "very-secret" not in repr(RewardServer(served.url, KEY, token="very-secret"))


def test_a_token_does_not_travel_unencrypted_nor_with_a_line_of_its_own() -> None:
    with pytest.raises(UserError, match="RLHF_REWARD_TOKEN would travel unencrypted to rewards.example"):
        RewardServer("http://rewards.example/", KEY, allow_http=True, token="t")
    with pytest.raises(UserError, match="a sign that no token has"):
        RewardServer("https://rewards.example/", KEY, token="t\r\nHost: elsewhere")


def test_a_token_for_one_server_is_not_shown_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert token_of("judge", is_only_server=True) is None
    monkeypatch.setenv("RLHF_REWARD_TOKEN", "general\n")
    assert token_of("judge", is_only_server=True) == "general"
    with pytest.raises(UserError, match="names several servers") as caught:
        token_of("my-judge", is_only_server=False)
    assert caught.value.hint == "a token for each: RLHF_REWARD_TOKEN_MY_JUDGE"
    monkeypatch.setenv("RLHF_REWARD_TOKEN_MY_JUDGE", "own")
    assert token_of("my-judge", is_only_server=False) == "own"


@pytest.mark.parametrize("url", ["https://rewards.example/score", "https://rewards.example:8443/s?a=1"])
def test_https_may_go_anywhere(url: str) -> None:
    check_url(url, KEY, allow_http=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "[::1]", "localhost", "LOCALHOST"])
def test_http_may_go_to_this_machine(host: str) -> None:
    check_url(f"http://{host}:8000/score", KEY, allow_http=False)


@pytest.mark.parametrize(
    "host",
    ["rewards.example", "10.0.0.1", "0.0.0.0", "2130706433", "localhost.example", "[fe80::1]", "127.1"],
)
def test_http_to_another_machine_must_be_allowed_by_name(host: str) -> None:
    with pytest.raises(UserError, match="unencrypted") as caught:
        check_url(f"http://{host}/score", KEY, allow_http=False)
    assert "allow_http: true" in (caught.value.hint or "")
    check_url(f"http://{host}/score", KEY, allow_http=True)


@pytest.mark.parametrize(
    "url",
    [
        "", "rewards.example", "ftp://rewards.example", "https://", "https:///score", "file:///etc/passwd",
        "https://rewards.example:port/", "https://[::1/", "https://rewards.example/a b", "https://é.example/",
        "https://rewards.example/\r\nHost: x", "https://rewards.example/#part",
    ],
)  # fmt: skip
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"ppo\.rewards"):
        check_url(url, KEY, allow_http=True)


@pytest.mark.parametrize(
    "url", ["https://me:password@rewards.example/", "https://rewards.example/?token=abcdefgh"]
)
def test_a_credential_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="holds a credential") as caught:
        check_url(url, KEY, allow_http=True)
    assert "password@" not in str(caught.value) and "abcdefgh" not in str(caught.value)


def test_a_value_that_json_cannot_say_is_not_sent() -> None:
    with serving(OK) as served:
        with pytest.raises(UserError, match="the rows hold a value that JSON cannot say"):
            RewardServer(served.url, KEY)(["a"], ["b"], {"number": [float("nan")]})
        assert served.bodies == []


def test_the_environments_proxies_are_for_https_to_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody answers there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(OK) as served:
        assert ask(served.url).tolist() == [1.5, -2.0]
    with pytest.raises(UserError, match="ConnectionRefusedError"):
        ask("https://rewards.example/score", retries=0)


def test_https_asks_a_proxy_for_a_tunnel_and_does_not_show_it_the_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            seen.append(f"{self.path} {dict(self.headers)}")
            self.send_error(407)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    monkeypatch.setenv("https_proxy", f"http://me:word@127.0.0.1:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with in_thread(server), pytest.raises(UserError, match="407"):
        ask("https://rewards.example/score", retries=0, token="very-secret")
    (connect,) = seen
    assert connect.startswith("rewards.example:443 ") and "Basic bWU6d29yZA==" in connect
    assert "very-secret" not in connect


def test_the_loopback_is_told_without_a_name_server() -> None:
    assert is_this_machine("::1") and not is_this_machine("::2") and not is_this_machine("localhost.")
