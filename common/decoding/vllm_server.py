"""Sample responses with vLLM servers that run elsewhere, over HTTP, behind the calls of `VLLMDecoder`.

Takes the addresses that the user named and no others; before every use rank 0 writes the live weights into
a folder that the servers see under the same path, and has each read them. Every rank asks all servers in turn
for its share of the requests; token ids go out, token ids with log-probabilities come back. A failure ends
the run with a UserError. Listens to nothing, starts no server, and needs no vLLM here.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from common.addresses import is_this_machine
from common.config import ModelConfig
from common.decoding.requests import Completion, DecodingCounts, Request, SamplingParams
from common.decoding.scheduler import not_finite, token_limit
from common.decoding.vllm_decoder import context_of, dtype_name, logprobs_mode, sampling_fields
from common.errors import UserError
from common.files import disk_errors
from common.https import certificate_error, connection_to, hang_up
from common.model.architecture import read_config
from common.redact import redact_text
from common.runtime.distributed import World, make_or_raise
from common.vllm_fit import FITTING, fits

API_KEY = "VLLM_API_KEY"
"""Variable of the environment with the servers' --api-key, which is sent as a bearer token."""
KEY = "ppo.rollout.vllm.servers"
FILE_BYTES = 5_000_000_000
"""Of a file of weights on its way to servers: when there are so many, the next one begins."""
SECONDS_BETWEEN_QUESTIONS = 0.5
"""Between two questions whether to stop."""


@dataclass(frozen=True)
class Server:
    """One server. timeout: seconds for an answer to begin, and between two parts of it."""

    url: str
    timeout: float
    open: set[http.client.HTTPConnection] = field(default_factory=set, compare=False)

    def ask(self, path: str, body: object = None) -> Any:
        """The JSON of an answer; POST with a body, GET without. UserError where there is none."""
        parts = urlsplit(self.url)
        connection = connection_to(parts, self.timeout)
        self.open.add(connection)
        content = None if body is None else json.dumps(body)
        try:
            with contextlib.closing(connection):
                method = "GET" if body is None else "POST"
                connection.request(
                    method, parts.path.rstrip("/") + path, content, self._headers(parts.hostname)
                )
                response = connection.getresponse()
                answer = response.read()
        except ssl.SSLCertVerificationError as error:
            raise certificate_error(f"{KEY}: {self.url}", error) from None
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"{KEY}: {self.url} gives no answer to {path}: {type(error).__name__}: {error}",
                hint="start it, as docs/ppo.md says, and run the same command again; "
                "ppo.rollout.vllm.timeout allows for more time",
            ) from None
        finally:
            self.open.discard(connection)
        return self._content(path, response, answer)

    def _headers(self, host: str | None) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        token = os.environ.get(API_KEY, "").strip()
        if not token:
            return headers
        if urlsplit(self.url).scheme == "http" and not is_this_machine(host or ""):
            raise UserError(
                f"{API_KEY} would travel unencrypted to {host}", hint=f"use https, or unset {API_KEY}"
            )
        return headers | {"Authorization": f"Bearer {token}"}

    def _content(self, path: str, response: http.client.HTTPResponse, answer: bytes) -> Any:
        said = " ".join(redact_text(answer[:400].decode("utf-8", errors="replace")).split())
        if response.status == 200:
            try:
                return json.loads(answer)
            except ValueError:
                raise UserError(f"{KEY}: {self.url}{path} is no JSON: {said}", hint="name a vLLM") from None
        ways = {
            401: f"its --api-key in {API_KEY}",
            403: "start it with --enable-scale-out",
            404: "name a vLLM that was started with VLLM_SERVER_DEV_MODE=1",
        }
        raise UserError(
            f"{KEY}: {self.url}{path} answers {response.status}: {said}",
            hint=ways.get(response.status, "its own log says more: is it of the policy's model?"),
        )


class Files:
    """Weights, written into safetensors files as they come: host memory holds those of one file at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count, self._bytes = folder, 0, 0
        self._held: dict[str, torch.Tensor] = {}
        self._refused: UserError | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Raises nothing: other ranks may be waiting for this one in the next tensor's collective."""
        if self._refused is not None:
            return
        self._held[name] = tensor.cpu().contiguous()
        self._bytes += tensor.nbytes
        if self._bytes >= FILE_BYTES:
            self._write()

    def close(self) -> None:
        """Write what is left. UserError where the disk refused this, or something before."""
        if self._refused is None and (self._held or not self._count):
            self._write()
        if self._refused is not None:
            raise self._refused

    def _write(self) -> None:
        from safetensors.torch import save_file

        self._count += 1
        name = "model.safetensors" if self._count == 1 else f"model-{self._count}.safetensors"
        try:
            with disk_errors(self._folder / name):
                self._folder.mkdir(parents=True, exist_ok=True)
                save_file(self._held, self._folder / name, {"format": "pt"})
        except UserError as error:
            self._refused = error
        self._held, self._bytes = {}, 0


class VLLMServers:
    """The servers as what samples; all ranks make it together, and call it together."""

    def __init__(
        self,
        urls: Sequence[str],
        model: ModelConfig,
        max_length: int,
        folder: Path,
        world: World,
        *,
        filters: bool = False,
        slots: int,
        timeout: float,
    ) -> None:
        """max_length: tokens of a prompt with its response. folder: for weights on their way; it is made and
        removed. filters: as of `VLLMDecoder`. slots: requests of this rank at a time. timeout: see `Server`.

        UserError where a server does not answer, or would compute otherwise than the trainer expects.
        """
        self.counts = DecodingCounts(0, 0, 0)
        self._servers = [Server(url, timeout) for url in urls]
        self._folder, self._world, self._slots = folder.resolve(), world, slots
        self._context = context_of(model, max_length)

        def check() -> None:
            for server in self._servers:
                self._check(server, model, filters)

        make_or_raise(check)

    def _check(self, server: Server, model: ModelConfig, filters: bool) -> None:
        said = server.ask("/version")
        version = str(said.get("version") if isinstance(said, dict) else said)
        if not fits(version):
            raise UserError(
                f"{KEY}: {server.url} says that its version is {version}; a vLLM {FITTING} is expected",
                hint="vllm==0.32.0 there",
            )
        found = server.ask("/server_info?config_format=json")["vllm_config"]
        theirs, expected = found["model_config"], {
            "dtype": f"torch.{dtype_name(model)}",
            "logprobs_mode": logprobs_mode(filters),
        }  # fmt: skip
        for name, value in expected.items():
            if theirs[name] != value:
                raise UserError(
                    f"{KEY}: {server.url} has {name}={theirs[name]}; {value} is expected",
                    hint=f"start it with --{name.replace('_', '-')} {value.removeprefix('torch.')}",
                )
        if theirs["max_model_len"] < self._context:
            raise UserError(
                f"{KEY}: {server.url} has room for {theirs['max_model_len']} tokens; prompts with their "
                f"responses have up to {self._context}",
                hint=f"start it with --max-model-len {self._context}, or lower ppo.data.max_length",
            )
        text = read_config(model).get_text_config(decoder=True)
        if found["device_config"]["device"] == "cpu" and text.tie_word_embeddings:
            raise UserError(
                f"{KEY}: {server.url} computes on a CPU, where vLLM 0.32 goes on with the old output layer "
                "of models that share it with the embeddings",
                hint="a server on a GPU, or ppo.rollout.vllm.servers=null: in each rank that is mended",
            )

    @contextmanager
    def holding(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[None]:
        """All servers have these weights while the block runs; as `VLLMDecoder.holding`."""
        files = Files(self._folder) if self._world.is_rank0 else None
        for name, tensor in weights:  # on all ranks: under ZeRO-3 each is a collective
            if files is not None:
                files.add(name, tensor)
        make_or_raise(lambda: None if files is None else self._hand_over(files))
        yield

    def _hand_over(self, files: Files) -> None:
        try:
            files.close()
            with ThreadPoolExecutor(len(self._servers)) as pool:
                list(pool.map(self._reload, self._servers))
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _reload(self, server: Server) -> None:
        told = {"method": "reload_weights", "kwargs": {"weights_path": str(self._folder)}}
        server.ask("/collective_rpc", told)
        if not server.ask("/reset_prefix_cache", {})["success"]:
            raise UserError(
                f"{KEY}: {server.url} is answering others, with whatever weights it has",
                hint="a server of its own for each run",
            )

    def decode(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        should_stop: Callable[[], bool] | None = None,
        ready: Callable[[int, Completion], None] | None = None,
        lockstep: bool = False,
    ) -> list[Completion] | None:
        """As `VLLMDecoder.decode`."""
        found: dict[int, Completion] = {}
        with ThreadPoolExecutor(self._slots) as pool:
            asked = {
                pool.submit(self._complete, number, request, params): number
                for number, request in enumerate(requests)
            }
            waiting = set(asked)
            try:
                while waiting:
                    if should_stop is not None and should_stop():
                        return None
                    done, waiting = wait(waiting, SECONDS_BETWEEN_QUESTIONS, FIRST_COMPLETED)
                    for each in done:
                        number, completion = asked[each], each.result()
                        found[number] = completion
                        if ready is not None:
                            ready(number, completion)
            finally:
                self._leave(waiting)
        tokens = sum(len(completion.tokens) for completion in found.values())
        self.counts = DecodingCounts(0, tokens, tokens)
        return [found[number] for number in range(len(requests))]

    def _leave(self, waiting: Iterable[Any]) -> None:
        """Ask for nothing more, and hang up where an answer is waited for: vLLM then ends that request."""
        for each in waiting:
            each.cancel()
        for server in self._servers:
            for connection in list(server.open):
                hang_up(connection)

    def _complete(self, number: int, request: Request, params: SamplingParams) -> Completion:
        server = self._servers[(self._world.rank + number) % len(self._servers)]
        limit = token_limit(request, params, self._context)
        prompt = request.prompt.tolist()
        told = {"token_ids": prompt, "sampling_params": sampling_fields(request, params, limit)}
        (made,) = server.ask("/inference/v1/generate", told)["choices"]
        tokens, said = made["token_ids"], made["logprobs"]["content"]
        logprobs = np.array([each["logprob"] for each in said], np.float32)
        if made["finish_reason"] not in ("stop", "length") or len(tokens) != len(logprobs) or not tokens:
            raise UserError(
                f"{KEY}: {server.url} broke a response off after {len(tokens)} tokens "
                f"({made['finish_reason']})",
                hint="see its own log, and run the same command again",
            )
        if not np.isfinite(logprobs).all():
            raise not_finite(len(prompt) + len(tokens))
        return Completion(np.array(tokens, np.int32), logprobs, made["finish_reason"] == "stop")
