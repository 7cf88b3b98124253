"""A model hub for tests: accounts, repositories and large files on a loopback port, as its client asks.

What is uploaded can be loaded again through the same server. `breaks_after`: so many uploads of large files
are taken, and the connection of the next one is closed. `status`: every request is answered with it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests import served

TOKEN = "hf_" + "a" * 34
USER, ORGANISATION = "me", "lab"
LARGE = (".safetensors",)


@dataclass
class Repository:
    """A model and its commits, each with all its files."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def sha(self, number: int = -1) -> str:
        return hashlib.sha1(f"{len(self.commits[: number or None])}".encode()).hexdigest()  # noqa: S324 - git's own


class FakeHub(ThreadingHTTPServer):
    """What arrived: `repositories` by name, `objects` by SHA-256, and `uploads`, the large files in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.breaks_after: int | None = None
        self.status: int | None = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests, not worth a traceback."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self._refuses():
            return
        if path == "/api/whoami-v2":
            if self._is_known():
                self._json({"type": "user", "name": USER, "orgs": [{"name": ORGANISATION}]})
            else:
                self._error(401, "Invalid username or password.")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            if (repository := self._repository(match[1])) is not None:
                self._json(_info(match[1], repository))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            if (repository := self._repository(match[1])) is not None:
                self._json([_entry(name, data) for name, data in repository.files.items()])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._resolve(match[1], match[2])
        else:
            self._error(404, "no such page")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        server, oid = self.server, self.path.rpartition("/")[2]
        if server.breaks_after is not None and len(server.uploads) >= server.breaks_after:
            self.rfile.read(10)
            self.connection.close()
            self.close_connection = True
            return
        data = self._body()
        assert hashlib.sha256(data).hexdigest() == oid
        server.objects[oid] = data
        server.uploads.append(oid)
        self._json({})

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        if self._refuses():
            return
        if path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            errors = [{"message": '"license" must be a string'}] if "license: []" in text else []
            self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            if (repository := self._repository(match[1])) is not None:
                files = json.loads(body)["files"]
                self._json({"files": [_mode(file["path"], repository) for file in files]})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._json({"transfer": "basic", "objects": list(map(self._object, json.loads(body)["objects"]))})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._error(404, f"no such page: {path}")

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked["organization"] or USER
        name = f"{owner}/{asked['name']}"
        if owner not in (USER, ORGANISATION):
            self._error(403, f"You don't have the rights to create a model under the namespace {owner!r}.")
        elif name in self.server.repositories:
            self._json(
                {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409
            )
        else:
            self.server.repositories[name] = Repository(asked.get("visibility") == "private")
            self._json({"url": f"{self.server.url}/{name}", "name": name})

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        oid = asked["oid"]
        upload = {"upload": {"href": f"{self.server.url}/lfs/{oid}"}}
        return {
            "oid": oid,
            "size": asked["size"],
            **({} if oid in self.server.objects else {"actions": upload}),
        }

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        if (repository := self._repository(name)) is None:
            return
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        repository.commits.append(files)
        sha = repository.sha()
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    def _resolve(self, name: str, file: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        if (data := repository.files.get(file)) is None:
            self._error(404, "Entry not found", code="EntryNotFound")
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", repository.sha())
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self._end(data)

    def _repository(self, name: str) -> Repository | None:
        """The repository, where there is one that this client may see; otherwise it is told so."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._is_known()):
            self._error(404, "Repository not found", code="RepoNotFound")
            return None
        return repository

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _refuses(self) -> bool:
        if (status := self.server.status) is not None:
            self._error(status, "refused for the test")
        return status is not None

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self._end(json.dumps({"error": message}).encode())

    def _json(self, answer: Any, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self._end(json.dumps(answer).encode())

    def _end(self, data: bytes) -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _info(name: str, repository: Repository) -> dict[str, Any]:
    siblings = [{"rfilename": file} for file in repository.files]
    return {
        "id": name,
        "modelId": name,
        "sha": repository.sha(),
        "private": repository.private,
        "siblings": siblings,
    }


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324 - git's own


def _mode(name: str, repository: Repository) -> dict[str, Any]:
    mode = "lfs" if name.endswith(LARGE) else "regular"
    return {"path": name, "uploadMode": mode, "shouldIgnore": False}


@contextmanager
def running() -> Iterator[FakeHub]:
    """A server on a free port, stopped at the end."""
    server = FakeHub()
    with served.serving(server):
        yield server
