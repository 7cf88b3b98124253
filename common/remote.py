"""Where bytes come from that lie elsewhere: servers over https, and stores that fsspec knows (s3, gs, hf).

A remote file says how long it is and how to tell it from other versions, and gives its bytes from a place on.
Everything that is asked has a deadline, and a redirect leads to https alone. No token is sent to a server of
https; stores find their credentials where their own packages look. Keeps nothing: that is `download.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

from common.addresses import is_this_machine
from common.deadline import within
from common.errors import UserError
from common.https import certificate_error, connection_to, hang_up, target
from common.redact import redact_text
from common.text import told

Result = TypeVar("Result")

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
"""Schemes of stores, and the package with which fsspec reaches them."""
LOOK_SECONDS = 30.0
"""For a question: whether there is such a file, and how long it is."""
BLOCK_BYTES = 2**20
BLOCK_SECONDS = 60.0
"""For a block of a file: one that comes more slowly counts as broken off."""
MOST_REDIRECTS = 5
MOST_FILES = 10_000
"""Files that a pattern or a folder of a store may name."""


class Transient(Exception):
    """A failure that may pass; the text says what happened."""


class Changed(Exception):
    """The file is another one than it was when it was looked at."""


@dataclass(frozen=True)
class Version:
    """A file as it is now. size: its bytes. mark: tells it from other versions; empty where nothing does."""

    size: int
    mark: str


class RemoteFile(Protocol):
    """One file elsewhere."""

    def look(self) -> Version:
        """Raises Transient, and UserError for what will not pass: no such file, no access."""
        ...

    def blocks(self, version: Version, start: int) -> Iterator[bytes]:
        """The bytes from `start` on, which may end early. Raises Transient; Changed for another version."""
        ...


def remote_file(path: str, key: str) -> RemoteFile:
    """UserError for a place of another kind, and for a store whose package is not installed."""
    scheme = path.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return Server(_allowed(path, key), key)
    return Stored(store_of(path, key), path, key)


def store_of(path: str, key: str) -> Any:
    """fsspec's file system for a path."""
    import fsspec

    scheme = path.partition("://")[0].lower()
    if scheme not in PACKAGES:
        raise UserError(
            f"{key}={redact_text(path)}: rows cannot be fetched from {scheme}://",
            hint="expected https://, s3://, gs:// or hf://, or a path here",
        )
    try:
        return fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        package = PACKAGES[scheme]
        raise UserError(
            f"{key}={redact_text(path)} needs the package {package}: {told(error)}",
            hint=f"pip install {package}",
        ) from None


def names_below(path: str, key: str) -> list[str]:
    """The files that a pattern or a folder of a store names, sorted, as paths of their own; the path itself
    where its last part has a suffix. Raises Transient."""
    if path.lower().startswith(("http://", "https://")):
        if "*" in urlsplit(path).path:
            raise UserError(f"{key}={redact_text(path)}: a server has no patterns", hint="name every file")
        return [path]
    store, is_pattern = store_of(path, key), any(sign in path for sign in "*?[")
    if not is_pattern and "." in path.rpartition("/")[2]:
        return [path]

    def listed() -> list[str]:
        store.invalidate_cache()
        if is_pattern:
            return [name for name, info in store.glob(path, detail=True).items() if info["type"] == "file"]
        return list(store.find(path))

    names = _asked(listed, LOOK_SECONDS, path, key)
    if not names:
        raise UserError(f"{key}={redact_text(path)}: no file matches", hint="correct the path")
    if len(names) > MOST_FILES:
        raise UserError(
            f"{key}={redact_text(path)} names {len(names):,} files", hint=f"at most {MOST_FILES:,}"
        )
    return sorted(name if "://" in name else store.unstrip_protocol(name) for name in names)


@dataclass(frozen=True)
class Server:
    """A file of a server, by its URL."""

    url: str
    key: str

    def look(self) -> Version:
        with self._answer({"Range": "bytes=0-0"}) as (response, _):
            return self._version(response)

    def blocks(self, version: Version, start: int) -> Iterator[bytes]:
        asked = {"Range": f"bytes={start}-", "If-Range": version.mark} if start else {}
        with self._answer(asked) as (response, connection):
            if self._version(response) != version:
                raise Changed
            skip = start if response.status == 200 else 0  # the server sends all of it again
            while block := self._read(response, connection):
                yield block[skip:]
                skip = max(0, skip - len(block))

    def _read(self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection) -> bytes:
        try:
            return within(BLOCK_SECONDS, lambda: response.read(BLOCK_BYTES), lambda: hang_up(connection))
        except TimeoutError:
            raise Transient(f"less than {BLOCK_BYTES:,} bytes came in {BLOCK_SECONDS:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Transient(told(error)) from None

    @contextlib.contextmanager
    def _answer(
        self, headers: dict[str, str]
    ) -> Iterator[tuple[http.client.HTTPResponse, http.client.HTTPConnection]]:
        """The answer's head, of the last place that redirects lead to; its body is still to be read."""
        url = self.url
        for _ in range(MOST_REDIRECTS + 1):
            connection = connection_to(urlsplit(url), LOOK_SECONDS)
            with contextlib.closing(connection):
                response = self._ask(connection, urlsplit(url), headers)
                if 300 <= response.status < 400:
                    url = self._further(url, response)
                    continue
                self._check_status(response)
                yield response, connection
                return
        raise UserError(f"{self._named}: more than {MOST_REDIRECTS} redirects", hint="name the final address")

    def _ask(
        self, connection: http.client.HTTPConnection, parts: SplitResult, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        def exchange() -> http.client.HTTPResponse:
            connection.request("GET", target(parts), headers={"Accept-Encoding": "identity", **headers})
            return connection.getresponse()

        try:
            return within(LOOK_SECONDS, exchange, lambda: hang_up(connection))
        except ssl.SSLCertVerificationError as error:
            raise certificate_error(self._named, error) from None
        except TimeoutError:
            raise Transient(f"no answer within {LOOK_SECONDS:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Transient(told(error)) from None

    def _further(self, url: str, response: http.client.HTTPResponse) -> str:
        """Where a redirect leads: to https, or from this machine to this machine."""
        place = urljoin(url, response.headers.get("Location") or "")
        is_secure = place.lower().startswith("https:")
        try:
            if is_secure or is_this_machine(urlsplit(url).hostname or ""):
                return _allowed(place, self.key)
        except UserError:
            pass
        raise UserError(
            f"{self._named} sends on to {redact_text(place)[:200]} ({response.status}): not fetched",
            hint="name a final address over https",
        )

    def _check_status(self, response: http.client.HTTPResponse) -> None:
        status, said = response.status, f"{response.status} {response.reason}"[:100]
        if status in (200, 206):
            return
        if status == 416:
            raise UserError(f"{self._named} is empty", hint="name a file with rows in it")
        if status in (408, 425, 429) or status >= 500:
            raise Transient(f"the server says {said}")
        hint = (
            "check the address" if status in (404, 410) else "check the address; no token is sent over https"
        )
        raise UserError(f"{self._named}: the server says {said}", hint=hint)

    def _version(self, response: http.client.HTTPResponse) -> Version:
        """UserError for an answer that does not say how long the whole file is, or is packed on the way."""
        packing = response.headers.get("Content-Encoding", "identity").strip().lower()
        if packing != "identity" and not urlsplit(self.url).path.endswith((".gz", ".zst")):
            raise UserError(f"{self._named} is sent packed ({packing[:40]})", hint="name it as it is stored")
        if response.status == 206:
            found = re.fullmatch(r"bytes \d+-\d+/(\d{1,18})", response.headers.get("Content-Range", ""))
        else:
            found = re.fullmatch(r"(\d{1,18})", response.headers.get("Content-Length", ""))
        if found is None:
            raise UserError(
                f"{self._named}: the server does not say how long it is", hint="download it first"
            )
        mark = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        return Version(int(found[1]), mark[:500])

    @property
    def _named(self) -> str:
        return f"{self.key}={redact_text(self.url)}"


@dataclass(frozen=True)
class Stored:
    """A file of a store, through fsspec."""

    store: Any
    path: str
    key: str

    def look(self) -> Version:
        def ask() -> Version:
            self.store.invalidate_cache()
            info = self.store.info(self.path)
            return Version(int(info["size"] or 0), str(self.store.ukey(self.path))[:500])

        return _asked(ask, LOOK_SECONDS, self.path, self.key)

    def blocks(self, version: Version, start: int) -> Iterator[bytes]:
        if self.look() != version:
            raise Changed
        file = _asked(lambda: self.store.open(self.path, "rb"), LOOK_SECONDS, self.path, self.key)
        with contextlib.closing(file):
            file.seek(start)
            while block := _asked(lambda: file.read(BLOCK_BYTES), BLOCK_SECONDS, self.path, self.key):
                yield block


def _asked(ask: Callable[[], Result], seconds: float, path: str, key: str) -> Result:
    """What a store answers. Its errors are those of many packages."""
    named = f"{key}={redact_text(path)}"
    try:
        return within(seconds, ask)
    except FileNotFoundError:
        raise UserError(f"{named}: there is no such file", hint="check the path") from None
    except TimeoutError:
        raise Transient(f"no answer within {seconds:g} s") from None
    except PermissionError as error:
        raise UserError(f"{named} is refused: {redact_text(told(error))}", hint=_CREDENTIALS) from None
    except OSError as error:
        raise Transient(redact_text(told(error))) from None
    except Exception as error:
        if any(sign in kind.__name__ for kind in type(error).__mro__ for sign in ("Connect", "Timeout")):
            raise Transient(redact_text(told(error))) from None
        raise UserError(f"{named} cannot be had: {redact_text(told(error))}", hint=_CREDENTIALS) from None


_CREDENTIALS = (
    "credentials are looked for where the store's own tools do: its environment variables and files"
)


def _allowed(url: str, key: str) -> str:
    """The URL. UserError for one that is none, or is neither https nor of this machine."""
    named = f"{key}={redact_text(url)}"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for what is no port
    except ValueError as error:
        raise UserError(f"{named} is no URL: {error}", hint="e.g. https://example.org/rows.jsonl") from None
    if not parts.hostname or not all("!" <= character <= "~" for character in url):
        raise UserError(f"{named} is no URL", hint="e.g. https://example.org/rows.jsonl")
    if parts.scheme.lower() != "https" and not (
        parts.scheme.lower() == "http" and is_this_machine(parts.hostname)
    ):
        raise UserError(f"{named} would come unencrypted from {parts.hostname}", hint="use https")
    return url
