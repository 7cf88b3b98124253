"""A hub's data set for tests: its files on a loopback port, as the `datasets` library asks for them.

`asked`: the files of which bytes were asked for, in order. `breaks`: of this file half is sent of each
answer, then the connection is closed. `short`: an answer about this file is whole, but never reaches beyond
the middle. `holds`: this file is not sent before `released`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import datasets
import pytest
from huggingface_hub import constants, hf_file_system

from common import hub_data
from tests import served

NAME = "me/rows"


class FakeDataHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.requests = 0
        self.asked: list[str] = []
        self.breaks: str | None = None
        self.short: str | None = None
        self.holds: str | None = None
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self) -> str:
        """Of the files as they are; they can be had by it when others have taken their place."""
        content = [(name, hashlib.sha256(data).hexdigest()) for name, data in self.files.items()]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()  # noqa: S324 - git's own
        self.commits.setdefault(sha, dict(self.files))
        return sha

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests, not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeDataHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, api = self.path.partition("?")[0], f"/api/datasets/{NAME}"
        self.server.requests += 1
        if match := re.fullmatch(rf"{api}(?:/revision/([^/]+))?", path):
            if (at := self._at(match[1] or "main")) is not None:
                self._json({"id": NAME, "sha": at, "private": False, "tags": [], "siblings": []})
        elif match := re.fullmatch(rf"{api}/tree/([^/]+)/?(.*)", path):
            if (at := self._at(match[1])) is not None:
                self._tree(self.server.commits[at], match[2])
        elif match := re.fullmatch(rf"/datasets/{NAME}/resolve/([^/]+)/(.+)", path):
            if (at := self._at(match[1])) is not None:
                self._file(match[2], self.server.commits[at].get(match[2]), at)
        else:
            self._error("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.server.requests += 1
        at = self._at(self.path.rpartition("/")[2])
        if at is not None:
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            files = self.server.commits[at]
            self._json([_entry(name, files[name]) for name in paths if name in files])

    def _at(self, revision: str) -> str | None:
        """The commit, where there is one."""
        commit = self.server.commit() if revision == "main" else revision
        if commit in self.server.commits:
            return commit
        self._error("RevisionNotFound")
        return None

    def _tree(self, files: dict[str, bytes], under: str) -> None:
        top = f"{under}/" if under else ""
        deep = "recursive=true" in self.path.lower()
        below = [name for name in files if name.startswith(top)]
        parts = [name[len(top) :].split("/")[:-1] for name in below]
        folders = {top + "/".join(part[: at + 1]) for part in parts for at in range(len(part))}
        entries: list[dict[str, Any]] = [{"type": "directory", "path": name, "oid": "0"} for name in folders]
        entries += [_entry(name, files[name]) for name in below]
        if below or not under:
            self._json([entry for entry in entries if deep or "/" not in entry["path"][len(top) :]])
        else:
            self._error("EntryNotFound")

    def _file(self, name: str, data: bytes | None, commit: str) -> None:
        if data is None:
            return self._error("EntryNotFound")
        part, asked = data, self.headers.get("Range")
        if self.command == "GET":
            self.server.asked.append(name)
            if name == self.server.holds:
                self.server.released.wait(60)
        if asked is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data)) + 1, len(data))
            if name == self.server.short:
                end = max(start, min(end, len(data) // 2))
            part = data[start:end]
        self.send_response(200 if asked is None else 206)
        if asked is not None:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self._end(part, breaks=name == self.server.breaks)

    def _error(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self._end(b"{}")

    def _json(self, answer: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._end(json.dumps(answer).encode())

    def _end(self, data: bytes, breaks: bool = False) -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if breaks else data)
            self.close_connection = self.close_connection or breaks


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324 - git's own


@contextmanager
def running() -> Iterator[FakeDataHub]:
    """A server on a free port, stopped at the end."""
    server = FakeDataHub()
    with served.serving(server):
        yield server


@contextmanager
def asked(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[FakeDataHub]:
    """A hub that this process's client asks, which keeps what it fetches in `folder` and soon gives up."""
    with running() as server:
        for module, name in ((constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
            monkeypatch.setattr(module, name, server.url)
        pages = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pages)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
        monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 2)
        monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0.01)
        once = functools.partial(hf_file_system.http_backoff, max_retries=1)
        monkeypatch.setattr(hf_file_system, "http_backoff", once)
        hub_data.commit_of.cache_clear()
        yield server
