"""What becomes of a vLLM server's answers, with a stand-in for it here; `tests/vllm` has a real one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.config import Dtype, ModelConfig
from common.decoding import vllm_server
from common.decoding.requests import Request, SamplingParams
from common.decoding.vllm_decoder import seed_of
from common.decoding.vllm_server import Server, VLLMServers
from common.errors import UserError
from common.runtime.distributed import World, close_world, init_world

CPU = torch.device("cpu")
PARAMS = SamplingParams(0.7, 5, (2,), top_k=3)


class StandIn:
    """Answers as `answers` say, by path: (status, content); notes what it was asked, with its headers."""

    def __init__(self) -> None:
        config = {"dtype": "torch.float32", "logprobs_mode": "raw_logprobs", "max_model_len": 32}
        info = {"model_config": config, "device_config": {"device": "cuda"}}
        content = [{"logprob": -0.5}, {"logprob": -0.25}]
        made = {"token_ids": [7, 2], "finish_reason": "stop", "logprobs": {"content": content}}
        self.answers: dict[str, tuple[int, Any]] = {
            "/version": (200, {"version": "0.32.0+cpu"}),
            "/server_info": (200, {"vllm_config": info}),
            "/collective_rpc": (200, {"results": [None]}),
            "/reset_prefix_cache": (200, {"success": True}),
            "/inference/v1/generate": (200, {"choices": [made]}),
        }
        self.asked: list[tuple[str, Any, dict[str, str]]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.files: list[Path] = []
        self.silent = threading.Event()

    def answer(self, path: str, body: Any, headers: dict[str, str]) -> tuple[int, Any]:
        self.asked.append((path, body, headers))
        if path == "/collective_rpc":
            self.files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
            self.weights = {name: each for file in self.files for name, each in load_file(file).items()}
        if path == "/inference/v1/generate" and self.silent.is_set():
            threading.Event().wait(30)
        return self.answers[path]

    def told(self, path: str) -> list[Any]:
        return [body for asked, body, _ in self.asked if asked == path]


@pytest.fixture
def stand_in() -> Iterator[tuple[StandIn, str]]:
    made = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            status, content = made.answer(path, json.loads(body or b"null"), dict(self.headers))
            said = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_GET

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    init_world()
    yield
    close_world()


def servers_of(folder: Path, *urls: str, tied: bool = False) -> VLLMServers:
    config = {"model_type": "llama", "max_position_embeddings": 128, "tie_word_embeddings": tied}
    model, world = ModelConfig(config=config, dtype=Dtype.fp32), World(0, 1, 0, CPU)
    return VLLMServers(urls, model, 32, folder / "handover", world, filters=True, slots=2, timeout=20)


def requests(count: int) -> list[Request]:
    return [Request(np.array([4, 5, 6 + number], np.int32), (1, number)) for number in range(count)]


def test_it_is_handed_the_weights_and_asked_for_each_response(
    stand_in: tuple[StandIn, str], tmp_path: Path
) -> None:
    server, url = stand_in
    servers = servers_of(tmp_path, url)
    with servers.holding([("lm_head.weight", torch.arange(6.0).view(2, 3).T)]):
        found = servers.decode(requests(3), PARAMS)
    assert server.weights["lm_head.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert not (tmp_path / "handover").exists()
    paths = [path for path, _, _ in server.asked]
    assert (
        paths.index("/collective_rpc")
        < paths.index("/reset_prefix_cache")
        < paths.index("/inference/v1/generate")
    )
    told = sorted(server.told("/inference/v1/generate"), key=lambda each: each["token_ids"][2])
    assert [each["token_ids"] for each in told] == [[4, 5, 6], [4, 5, 7], [4, 5, 8]]
    assert [each["sampling_params"]["seed"] for each in told] == [seed_of((1, number)) for number in range(3)]
    wanted = {"temperature": 0.7, "top_k": 3, "max_tokens": 5, "stop_token_ids": [2], "ignore_eos": True}
    assert wanted.items() <= told[0]["sampling_params"].items()
    for each in found or ():
        assert each.tokens.tolist() == [7, 2] and each.stopped
        assert each.logprobs.tolist() == [-0.5, -0.25]
    assert len(found or ()) == 3 and servers.counts.tokens == 6


def test_weights_are_written_as_they_come_a_file_at_a_time(
    stand_in: tuple[StandIn, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = stand_in
    monkeypatch.setattr(vllm_server, "FILE_BYTES", 20)
    written: list[int] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(5):
            yield f"weight {number}", torch.full((3,), float(number))  # 12 bytes: two to a file
            written.append(len(list((tmp_path / "handover").glob("*.safetensors"))))

    with servers_of(tmp_path, url).holding(weights()):
        pass
    assert written == [0, 1, 1, 2, 2]
    assert [file.name for file in server.files] == [
        "model-2.safetensors",
        "model-3.safetensors",
        "model.safetensors",
    ]
    assert {name: each.tolist() for name, each in server.weights.items()} == {
        f"weight {number}": [number] * 3 for number in range(5)
    }
    assert not (tmp_path / "handover").exists()


def test_a_disk_that_refuses_weights_is_an_error_after_the_last_of_them(
    stand_in: tuple[StandIn, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "FILE_BYTES", 1)
    servers = servers_of(tmp_path, stand_in[1])
    (tmp_path / "handover").write_text("a file, where a folder should be")
    asked = iter([("a", torch.ones(2)), ("b", torch.ones(2))])
    with pytest.raises(UserError, match="handover"), servers.holding(asked):
        pass
    assert next(asked, None) is None  # other ranks took part in every collective
    assert not stand_in[0].told("/collective_rpc")


def test_several_servers_share_the_requests(stand_in: tuple[StandIn, str], tmp_path: Path) -> None:
    server, url = stand_in
    servers = servers_of(tmp_path, url, f"{url}/")
    with servers.holding([]):
        servers.decode(requests(4), PARAMS)
    assert len(server.told("/collective_rpc")) == 2 and len(server.told("/inference/v1/generate")) == 4


@pytest.mark.parametrize(
    ("path", "answer", "said", "way_out"),
    [
        ("/version", (200, {"version": "0.31.0"}), "version is 0.31.0; a vLLM >=0.32,<0.33", "0.32.0"),
        ("/version", (200, []), "version is .*; a vLLM >=0.32,<0.33 is expected", "0.32.0"),
        ("/version", (200, b"<html>"), "is no JSON: <html>", "name a vLLM"),
        ("/server_info", (404, {}), "answers 404", "VLLM_SERVER_DEV_MODE=1"),
        ("/server_info", (302, {}), "answers 302", "its own log"),
        ("/collective_rpc", (500, {"error": "size mismatch"}), "answers 500: .*size mismatch", "its own log"),
        ("/reset_prefix_cache", (200, {"success": False}), "is answering others", "of its own"),
        ("/inference/v1/generate", (401, {}), "answers 401", "VLLM_API_KEY"),
        ("/inference/v1/generate", (403, {}), "answers 403", "--enable-scale-out"),
    ],
)
def test_an_answer_that_is_none_is_one_error_with_the_way_out(
    path: str, answer: tuple[int, Any], said: str, way_out: str, stand_in: tuple[StandIn, str], tmp_path: Path
) -> None:
    server, url = stand_in
    server.answers[path] = answer
    with pytest.raises(UserError, match=said) as caught:
        servers = servers_of(tmp_path, url)
        with servers.holding([]):
            servers.decode(requests(3), PARAMS)
    assert url in caught.value.message and way_out in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("dtype", "torch.bfloat16", "has dtype=torch.bfloat16; torch.float32 is expected"),
        ("logprobs_mode", "processed_logprobs", "raw_logprobs is expected"),
        ("max_model_len", 31, "room for 31 tokens"),
    ],
)
def test_a_server_with_other_settings_is_refused(
    name: str, value: Any, said: str, stand_in: tuple[StandIn, str], tmp_path: Path
) -> None:
    server, url = stand_in
    server.answers["/server_info"][1]["vllm_config"]["model_config"][name] = value
    with pytest.raises(UserError, match=said) as caught:
        servers_of(tmp_path, url)
    assert f"--{name.replace('_', '-')}" in str(caught.value.hint)


def test_on_a_cpu_models_with_a_shared_output_layer_are_refused(
    stand_in: tuple[StandIn, str], tmp_path: Path
) -> None:
    server, url = stand_in
    info = server.answers["/server_info"][1]["vllm_config"]
    info["device_config"]["device"] = "cpu"
    servers_of(tmp_path, url)
    with pytest.raises(UserError, match="goes on with the old output layer"):
        servers_of(tmp_path, url, tied=True)


def test_a_response_that_is_not_whole_ends_the_run(stand_in: tuple[StandIn, str], tmp_path: Path) -> None:
    server, url = stand_in
    made = server.answers["/inference/v1/generate"][1]["choices"][0]
    made["logprobs"]["content"][0]["logprob"] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        servers_of(tmp_path, url).decode(requests(3), PARAMS)
    made["finish_reason"] = "abort"
    with pytest.raises(UserError, match="broke a response off after 2 tokens"):
        servers_of(tmp_path, url).decode(requests(3), PARAMS)


def test_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="http://127.0.0.1:9 gives no answer to /version: Conn") as caught:
        servers_of(tmp_path, "http://127.0.0.1:9")
    assert "docs/ppo.md" in str(caught.value.hint)


def test_told_to_stop_it_hangs_up(stand_in: tuple[StandIn, str], tmp_path: Path) -> None:
    server, url = stand_in
    server.silent.set()
    servers = servers_of(tmp_path, url)
    stop = lambda: len(server.told("/inference/v1/generate")) == 2  # noqa: E731
    assert servers.decode(requests(6), PARAMS, should_stop=stop) is None
    assert len(server.told("/inference/v1/generate")) == 2  # those of both slots, and no others


def test_the_key_is_sent_and_not_unencrypted_over_a_network(
    stand_in: tuple[StandIn, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = stand_in
    Server(url, 20).ask("/version")
    monkeypatch.setenv("VLLM_API_KEY", "abc")
    Server(url, 20).ask("/version")
    assert [headers.get("Authorization") for _, _, headers in server.asked] == [None, "Bearer abc"]
    with pytest.raises(UserError, match="VLLM_API_KEY would travel unencrypted to gpu.example"):
        Server("http://gpu.example:8000", 20).ask("/version")
