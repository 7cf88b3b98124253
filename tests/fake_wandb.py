"""A W&B server for tests: answers on a loopback port, remembers what arrived, and can be made to hang.

It speaks the part of the protocol that a run needs: GraphQL by operation name, file_stream, and uploads.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests import served


class FakeWandb(ThreadingHTTPServer):
    """What arrived, in order: `history` per run id, `upserts` (variables), `operations`, `uploads`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.upserts: list[dict[str, Any]] = []
        self.operations: list[str] = []
        self.artifacts: list[dict[str, Any]] = []
        self.projects = ["rlhf"]
        self.views: list[dict[str, Any]] = []  # variables of saved workspaces and reports
        self.alerts: list[tuple[str, str, str]] = []  # title, text, level
        self.uploads: dict[str, bytes] = {}
        self.exit_codes: dict[str, int] = {}
        self.hang = threading.Event()  # set: POST requests wait until `release`
        self.release = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests, not worth a traceback."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The `data` of a GraphQL answer."""
        self.operations.append(operation)
        if operation == "UpsertBucket":
            self.upserts.append(variables)
            return {"upsertBucket": {"bucket": _bucket(variables["name"], 0), "inserted": True}}
        if operation == "RunResumeStatus":
            return {"model": self._resume_status(variables["name"])}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append((variables["title"], variables["text"], variables["severity"]))
            return {"notifyScriptableRunAlert": {"success": True}}
        if operation == "ProjectInternalId":
            is_there = variables["projectName"] in self.projects
            return {"project": {"id": "p", "internalId": "UHJvamVjdDox"} if is_there else None}
        if operation == "GetProjects":
            ends = {"endCursor": None, "hasNextPage": False}
            edges = [{"node": _project(name), "cursor": name} for name in self.projects]
            return {"models": {"pageInfo": ends, "edges": edges}}
        if operation in ("upsertView", "UpsertView2"):
            self.views.append(variables)
            project = {"id": "p", "name": variables["projectName"], "entityName": variables["entityName"]}
            view = {"id": "Vmlldzox", "project": project, "updatedAt": "2026-11-29T00:00:00"}
            saved = ("name", "displayName", "description", "type", "spec")
            return {"upsertView": {"view": view | {key: variables[key] for key in saved}, "inserted": True}}
        return self._artifact_answer(operation, variables)

    def _resume_status(self, name: str) -> dict[str, Any]:
        history = self.history.get(name)
        entity = {"id": "e", "name": "entity"}
        if history is None:
            return {"id": "p", "name": "project", "entity": entity, "bucket": None}
        bucket = _bucket(name, len(history)) | {
            "summaryMetrics": json.dumps(history[-1]),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(history[-1])]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "notes": "",
            "wandbConfig": '{"t": {}}',
        }
        return {"id": "p", "name": "project", "entity": entity, "bucket": bucket}

    def _artifact_answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        if operation in ("Viewer", "GetDefaultEntity"):
            return {"viewer": {"id": "v", "username": "user", "entity": "entity", "flags": "{}"}}
        if operation == "ArtifactType":  # of the artifact of this name? None has been made yet
            return {"project": {"artifact": None}}
        artifact = {"id": "a1", "digest": "", "state": "PENDING", "aliases": [], "artifactSequence": None}
        if operation == "CreateArtifact":
            self.artifacts.append(variables["input"])
            sequence = {"id": "s", "latestArtifact": None, "name": "n"}
            return {"createArtifact": {"artifact": artifact | {"artifactSequence": sequence}}}
        if operation == "CreateArtifactManifest":
            return {
                "createArtifactManifest": {"artifactManifest": {"id": "m", "file": self._file("manifest")}}
            }
        if operation == "CreateArtifactFiles":
            names = [file["name"] for file in variables["input"]["artifactFiles"]]
            edges = [{"node": self._file(name) | {"artifact": {"id": "a1"}}} for name in names]
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if operation == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": "a1", "digest": ""}}}
        return {}

    def _file(self, name: str) -> dict[str, Any]:
        file = {"id": name, "name": name, "displayName": name, "uploadHeaders": [], "storagePath": name}
        return file | {"uploadUrl": f"{self.url}/upload/artifact/{name}", "uploadMultipartUrls": None}


class _Handler(BaseHTTPRequestHandler):
    server: FakeWandb
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/hang":
            self.server.hang.set()
        self._send({})

    def do_PUT(self) -> None:
        self.server.uploads[self.path.removeprefix("/upload/")] = self._body()
        self._send({})

    def do_POST(self) -> None:
        body = self._body()
        if self.server.hang.is_set():
            self.server.release.wait(60)
        if self.path == "/graphql":
            request = json.loads(body)
            operation = request.get("operationName") or _named_in(request.get("query") or "")
            self._send({"data": self.server.answer(operation, request.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self._receive_stream(json.loads(body))
            self._send({})
        else:
            self._send({})

    def _receive_stream(self, body: dict[str, Any]) -> None:
        run_id = self.path.split("/")[-2]
        chunk = (body.get("files") or {}).get("wandb-history.jsonl")
        if chunk is not None:
            lines = self.server.history.setdefault(run_id, [])
            lines[chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]
        if body.get("complete"):
            self.server.exit_codes[run_id] = body.get("exitcode", 0)

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _send(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _named_in(query: str) -> str:
    """The name of an operation, where a client gives it in the query alone; empty without one."""
    found = re.match(r"\s*(?:query|mutation)\s+(\w+)", query)
    return found[1] if found else ""


def _project(name: str) -> dict[str, Any]:
    made = {"createdAt": "2026-11-29T00:00:00", "isBenchmark": False, "user": None}
    return {"id": "p", "name": name, "entityName": "entity", **made}


def _bucket(name: str, lines: int) -> dict[str, Any]:
    project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "entity"}}
    bucket = {
        "id": "b",
        "name": name,
        "displayName": name,
        "description": "",
        "config": "{}",
        "sweepName": "",
    }
    return bucket | {"project": project, "historyLineCount": lines}


@contextmanager
def running() -> Iterator[FakeWandb]:
    """A server on a free port, stopped at the end."""
    server = FakeWandb()
    with served.serving(server):
        try:
            yield server
        finally:
            server.release.set()
