"""A server of files on the loopback interface, which can break off, refuse and change."""

from __future__ import annotations

import contextlib
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.served import serving as in_thread

LOOK = "bytes=0-0"
"""The range that asks how long a file is."""


@dataclass
class Files:
    """What is served. asked: (path, Range) of every request so far.

    whole: ranges are not heeded. cuts: after so many bytes of a body the connection ends, once for each
    entry; not of the answer to a look. holds: so many bytes of a body (by path) are sent, the others when
    `released` is set. statuses: answered in turn before anything else. redirects: path to
    address. headers: replace or (None) leave out those of an answer.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    sent: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    marks: bool = True
    whole: bool = False
    cuts: list[int] = field(default_factory=list)
    holds: dict[str, int] = field(default_factory=dict)
    released: threading.Event = field(default_factory=threading.Event)
    statuses: list[int] = field(default_factory=list)
    redirects: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str | None] = field(default_factory=dict)

    def mark(self, path: str) -> str:
        return f'"{hash(self.files[path]) & 0xFFFFFFFF:x}"'


class Answer(BaseHTTPRequestHandler):
    """One request."""

    served: Files

    def do_GET(self) -> None:
        served, path, asked = self.served, self.path, self.headers.get("Range")
        served.asked.append((path, asked))
        served.sent = dict(self.headers)
        if served.statuses:
            return self._head(served.statuses.pop(0), {"Content-Length": "0"})
        if path in served.redirects:
            return self._head(302, {"Location": served.redirects[path], "Content-Length": "0"})
        if path not in served.files:
            return self._head(404, {"Content-Length": "0"})
        body, mark = served.files[path], served.mark(path)
        headers = {"ETag": mark} if served.marks else {}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        if span is None or served.whole or self.headers.get("If-Range", mark) != mark:
            return self._send(200, body, headers)
        first, last = int(span[1]), min(int(span[2] or len(body)), len(body) - 1)
        if first >= len(body):
            return self._head(416, {"Content-Length": "0"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        return self._send(206, body[first : last + 1], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, {**headers, "Content-Length": str(len(body))})
        served = self.served
        if served.cuts and served.asked[-1][1] != LOOK:
            body = body[: served.cuts.pop(0)]
            self.close_connection = True
        with contextlib.suppress(OSError):  # the client has gone
            if self.path in served.holds and served.asked[-1][1] != LOOK:
                first, body = body[: served.holds[self.path]], body[served.holds[self.path] :]
                self.wfile.write(first)
                served.released.wait(60)
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status, self.served.reason)
        for name, value in {**headers, **self.served.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


def certificate(folder: Path) -> Path | None:
    """A certificate of 127.0.0.1 that nobody vouches for, with its key in its file; None without openssl."""
    if (openssl := shutil.which("openssl")) is None:
        return None
    file = folder / "certificate.pem"
    ask = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    ask += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(file), "-out", str(folder / "cert.pem")]
    subprocess.run(ask, check=True, capture_output=True)
    file.write_text(file.read_text() + (folder / "cert.pem").read_text())
    return file


@contextlib.contextmanager
def serving(certificate: Path | None = None, /, **files: bytes) -> Iterator[Files]:
    """Serve these files, by their names with `__` for a dot; others may be added meanwhile.

    certificate: with it over https.
    """
    served = Files(files={f"/{name.replace('__', '.')}": body for name, body in files.items()})
    handler = type("Handler", (Answer,), {"served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    with in_thread(server) as url:
        served.url = url if certificate is None else url.replace("http", "https")
        yield served
