"""Files elsewhere: fetched once, kept by content, gone on with where they broke off, and never half."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from common import download, remote
from common.download import fetch, file_name, origin_of
from common.errors import UserError
from common.paths import is_remote
from tests.dripping import dripping, saying
from tests.files_server import LOOK, Files, certificate, serving

KEY = "sft.data.path"
ROWS = b"".join(b'{"text": "row %d"}\n' % number for number in range(2_000))


@pytest.fixture
def files() -> Iterator[Files]:
    with serving(rows__jsonl=ROWS) as served:
        yield served


class Fetching:
    """A cache, and what was said and waited for."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.said, self.pauses = folder / "cache", [], []  # type: ignore[var-annotated]

    def __call__(self, path: str) -> Path:
        return fetch(path, KEY, self.cache, self.said.append, sleep=self.pauses.append)

    def left(self) -> list[str]:
        """Files of fetches that did not end."""
        return [path.name for path in self.cache.glob("*.partial")]


@pytest.fixture
def fetching(tmp_path: Path) -> Fetching:
    return Fetching(tmp_path)


def test_a_file_is_fetched_once_and_asked_about_after_that(files: Files, fetching: Fetching) -> None:
    first = fetching(f"{files.url}/rows.jsonl")
    assert first.read_bytes() == ROWS and first.name == "rows.jsonl"
    assert first.parent.parent == fetching.cache and origin_of(str(first)) == f"{files.url}/rows.jsonl"
    assert "fetched, sha256" in fetching.said[-1] and str(first) in fetching.said[-1]
    before = len(files.asked)
    assert fetching(f"{files.url}/rows.jsonl") == first
    assert "as it was" in fetching.said[-1] and files.asked[before:] == [("/rows.jsonl", LOOK)]
    assert fetching.left() == [] and fetching.pauses == []


def test_another_content_is_another_file_and_the_old_one_stays(files: Files, fetching: Fetching) -> None:
    first = fetching(f"{files.url}/rows.jsonl")
    files.files["/rows.jsonl"] = ROWS * 2
    second = fetching(f"{files.url}/rows.jsonl")
    assert second != first and second.read_bytes() == ROWS * 2 and first.read_bytes() == ROWS


@pytest.mark.parametrize("whole", [False, True])
def test_what_broke_off_goes_on_from_there(files: Files, fetching: Fetching, whole: bool) -> None:
    files.cuts, files.whole = [10_000, 20_000], whole
    if whole:  # the server heeds no ranges: what is there already is skipped
        files.cuts = [10_000, 25_000]
    assert fetching(f"{files.url}/rows.jsonl").read_bytes() == ROWS
    starts = [asked for _, asked in files.asked if asked not in (None, LOOK)]
    assert starts == ["bytes=10000-", f"bytes={25_000 if whole else 30_000}-"]
    assert len(fetching.pauses) == 2


def test_an_interrupted_command_goes_on_when_it_is_given_again(files: Files, fetching: Fetching) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    files.cuts = [10_000]
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{files.url}/rows.jsonl", KEY, fetching.cache, fetching.said.append, sleep=interrupted)
    assert len(fetching.left()) == 1 and not list(fetching.cache.glob("*/rows.jsonl"))
    files.asked.clear()
    assert fetching(f"{files.url}/rows.jsonl").read_bytes() == ROWS
    assert files.asked == [("/rows.jsonl", LOOK), ("/rows.jsonl", "bytes=10000-")]


def test_what_changed_meanwhile_is_begun_anew(files: Files, fetching: Fetching) -> None:
    def changed(seconds: float) -> None:
        files.files["/rows.jsonl"] = other

    other, files.cuts = ROWS[::-1], [10_000]
    found = fetch(f"{files.url}/rows.jsonl", KEY, fetching.cache, fetching.said.append, sleep=changed)
    assert found.read_bytes() == other


def test_without_a_mark_nothing_is_taken_for_the_same(files: Files, fetching: Fetching) -> None:
    files.marks, files.cuts = False, [10_000]
    first = fetching(f"{files.url}/rows.jsonl")
    assert first.read_bytes() == ROWS and all(asked in (None, LOOK) for _, asked in files.asked)
    before = len(files.asked)
    assert fetching(f"{files.url}/rows.jsonl") == first
    assert [asked for _, asked in files.asked[before:]] == [LOOK, None]


@pytest.mark.parametrize("marks", [True, False])
def test_a_server_that_breaks_off_again_and_again_is_given_up(
    files: Files, fetching: Fetching, marks: bool
) -> None:
    files.cuts, files.marks = [100] * 50, marks
    with pytest.raises(UserError) as error:
        fetching(f"{files.url}/rows.jsonl")
    assert "it broke off after" in error.value.message and "goes on from there" in str(error.value.hint)
    assert len(fetching.pauses) == download.ATTEMPTS - 1 and not list(fetching.cache.glob("*/rows.jsonl"))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(files: Files, fetching: Fetching, status: int) -> None:
    files.statuses = [status, status]
    assert fetching(f"{files.url}/rows.jsonl").read_bytes() == ROWS
    assert fetching.pauses == [1.0, 2.0]


@pytest.mark.parametrize(("status", "said"), [(404, "404 Not Found"), (403, "403 Forbidden"), (204, "204")])
def test_a_server_that_refuses_is_not_asked_again(
    files: Files, fetching: Fetching, status: int, said: str
) -> None:
    files.statuses = [status]
    with pytest.raises(UserError, match=rf"sft\.data\.path=http://127.*rows\.jsonl: the server says {said}"):
        fetching(f"{files.url}/rows.jsonl")
    assert len(files.asked) == 1 and fetching.pauses == []


def test_a_copy_stands_for_a_place_that_cannot_be_reached_and_that_is_said(
    files: Files, fetching: Fetching
) -> None:
    first = fetching(f"{files.url}/rows.jsonl")
    files.statuses = [404]
    assert fetching(f"{files.url}/rows.jsonl") == first
    assert "404" in fetching.said[-1] and "the copy of before is used" in fetching.said[-1]
    files.statuses = [503] * download.ATTEMPTS
    assert fetching(f"{files.url}/rows.jsonl") == first
    assert fetching.said[-1].startswith("notice: ")


def test_what_a_server_says_cannot_steer_a_terminal(files: Files, fetching: Fetching) -> None:
    fetching(f"{files.url}/rows.jsonl")
    files.statuses, files.reason = [404], "no\x1b[2Jsuch" + "x" * 2_000
    fetching(f"{files.url}/rows.jsonl")
    assert "\x1b" not in fetching.said[-1] and len(fetching.said[-1]) < 600


def test_a_copy_that_is_damaged_is_fetched_again(files: Files, fetching: Fetching) -> None:
    first = fetching(f"{files.url}/rows.jsonl")
    first.write_bytes(ROWS[:-1] + b" ")
    assert fetching(f"{files.url}/rows.jsonl") == first and first.read_bytes() == ROWS


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Content-Range": None}, "does not say how long it is"),
        ({"Content-Range": "bytes 0-0/*"}, "does not say how long it is"),
        ({"Content-Range": "bytes 0-0/-5"}, "does not say how long it is"),
        ({"Content-Range": f"bytes 0-0/{2**41}"}, "at most 1024.0 GiB"),
        ({"Content-Range": "bytes 0-0/0"}, "is empty"),
        ({"Content-Encoding": "br"}, r"is sent packed \(br\)"),
    ],
)
def test_an_answer_that_cannot_be_relied_on_is_refused(
    files: Files, fetching: Fetching, headers: dict[str, str | None], said: str
) -> None:
    files.headers = headers
    with pytest.raises(UserError, match=said):
        fetching(f"{files.url}/rows.jsonl")
    assert not list(fetching.cache.glob("*/*"))


def test_an_empty_file_is_named(files: Files, fetching: Fetching) -> None:
    files.files["/none.jsonl"] = b""
    with pytest.raises(UserError, match=r"none\.jsonl is empty"):
        fetching(f"{files.url}/none.jsonl")


def test_redirects_lead_to_https_or_stay_on_this_machine(files: Files, fetching: Fetching) -> None:
    files.redirects = {
        "/a.jsonl": "/b.jsonl",
        "/b.jsonl": f"{files.url}/rows.jsonl",
        "/out": "http://example.org/x",
    }
    assert fetching(f"{files.url}/a.jsonl").read_bytes() == ROWS
    with pytest.raises(UserError, match=r"sends on to http://example\.org/x \(302\)"):
        fetching(f"{files.url}/out")
    # another machine may not have this one asked about itself
    elsewhere = remote.Server("https://elsewhere.example/rows.jsonl", "k")
    answer = SimpleNamespace(headers={"Location": f"{files.url}/rows.jsonl"}, status=302)
    with pytest.raises(UserError, match="sends on to http://127.0.0.1"):
        elsewhere._further(elsewhere.url, answer)  # type: ignore[arg-type]
    files.redirects["/round"] = "/round"
    with pytest.raises(UserError, match="more than 5 redirects"):
        fetching(f"{files.url}/round")
    with pytest.raises(UserError, match=r"would come unencrypted from example\.org"):
        fetching("http://example.org/rows.jsonl")


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    files: Files, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = download.shutil.disk_usage(fetching.cache.parent)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=download.SPARE + 99))
    with pytest.raises(UserError, match=r"needs .* KiB more, and .*cache has 64\.0 MiB free"):
        fetching(f"{files.url}/rows.jsonl")
    assert len(files.asked) == 1


def test_a_server_that_drips_is_hung_up_on(fetching: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_SECONDS", 0.2)
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
    with saying(dripping(head, b"x")) as (port, hung_up):
        with pytest.raises(UserError, match=r"bytes came in 0\.2 s"):
            fetching(f"http://127.0.0.1:{port}/rows.jsonl")
        assert hung_up.wait(5)


def test_no_answer_at_all_has_an_end(fetching: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LOOK_SECONDS", 0.2)
    head = dripping(b"HTTP/1.1 200 OK\r\nA: b", b"x")
    with saying(head) as (port, _), pytest.raises(UserError, match=r"no answer within 0\.2 s"):
        fetching(f"http://127.0.0.1:{port}/rows.jsonl")


def test_no_credential_is_sent_or_said(files: Files, fetching: Fetching) -> None:
    with pytest.raises(UserError) as error:
        fetching(files.url.replace("//", "//me:hunter2@") + "/none.jsonl?token=hf_" + "a" * 34)
    assert "hunter2" not in str(error.value) and "hf_a" not in str(error.value)
    assert not {"authorization", "cookie"} & {name.lower() for name in files.sent}


def test_over_https_a_certificate_must_hold(
    fetching: Fetching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (own := certificate(tmp_path)) is None:
        pytest.skip("no openssl, which makes the certificate")
    with serving(own, rows__jsonl=ROWS) as served:
        with pytest.raises(UserError, match="has no certificate that holds: self-signed") as error:
            fetching(f"{served.url}/rows.jsonl")
        assert "SSL_CERT_FILE" in str(error.value.hint) and served.asked == []
        monkeypatch.setenv("SSL_CERT_FILE", str(own))
        assert fetching(f"{served.url}/rows.jsonl").read_bytes() == ROWS


# stores


class Bucket(MemoryFileSystem):
    """Stands for s3, in memory and with a place of its own."""

    protocol = "s3"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")

    def unstrip_protocol(self, name: str) -> str:
        return "s3://" + name.strip("/")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    Bucket.store.clear()
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme: {"s3": Bucket}[scheme]())
    return Bucket()


def test_a_file_of_a_store_is_fetched_once(bucket: Bucket, fetching: Fetching) -> None:
    bucket.pipe_file("/team/rows.jsonl", ROWS)
    first = fetching("s3://team/rows.jsonl")
    assert first.read_bytes() == ROWS and first.name == "rows.jsonl"
    assert fetching("s3://team/rows.jsonl") == first and "as it was" in fetching.said[-1]
    bucket.pipe_file("/team/rows.jsonl", ROWS * 2)
    assert fetching("s3://team/rows.jsonl").read_bytes() == ROWS * 2


@pytest.mark.parametrize("path", ["s3://team/day/*.jsonl", "s3://team/day", "s3://team/day/"])
def test_a_pattern_or_folder_of_a_store_is_a_folder_in_order(
    bucket: Bucket, fetching: Fetching, path: str
) -> None:
    for name in ("b", "a", "c"):
        bucket.pipe_file(f"/team/day/{name}.jsonl", b'{"text": "%s"}\n' % name.encode())
    folder = fetching(path)
    rows = sorted(file.name for file in folder.glob("*.jsonl"))
    assert rows == ["00000-a.jsonl", "00001-b.jsonl", "00002-c.jsonl"]
    assert (folder / rows[1]).read_bytes() == b'{"text": "b"}\n'
    assert fetching(path) == folder and origin_of(str(folder)) == path
    (folder / rows[1]).write_bytes(b"damaged")
    assert fetching(path) == folder and (folder / rows[1]).read_bytes() == b'{"text": "b"}\n'
    bucket.pipe_file("/team/day/b.jsonl", b'{"text": "other"}\n')
    assert fetching(path) != folder


def test_what_a_store_does_not_have_is_named(bucket: Bucket, fetching: Fetching) -> None:
    with pytest.raises(UserError, match=r"sft\.data\.path=s3://team/none\.jsonl: there is no such file"):
        fetching("s3://team/none.jsonl")
    with pytest.raises(UserError, match=r"s3://team/\*\.jsonl: no file matches"):
        fetching("s3://team/*.jsonl")


def test_a_store_that_breaks_off_goes_on_from_there(
    bucket: Bucket, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1_000)
    starts: list[int] = []
    blocks = remote.Stored.blocks

    def breaking(file: remote.Stored, version: remote.Version, start: int) -> Iterator[bytes]:
        starts.append(start)
        given = blocks(file, version, start)
        with contextlib.closing(given):
            for _ in range(3):
                yield next(given)
            if len(starts) == 1:
                raise remote.Transient("the line is cut")
            yield from given

    monkeypatch.setattr(remote.Stored, "blocks", breaking)
    bucket.pipe_file("/team/rows.jsonl", ROWS)
    assert fetching("s3://team/rows.jsonl").read_bytes() == ROWS
    assert starts == [0, 3_000]


def test_a_store_that_refuses_says_where_credentials_are_looked_for(
    bucket: Bucket, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any, **options: Any) -> Any:
        raise PermissionError("Access Denied for AKIAABCDEFGHIJKLMNOP")

    monkeypatch.setattr(Bucket, "info", refused)
    with pytest.raises(UserError) as error:
        fetching("s3://team/rows.jsonl")
    assert "is refused" in error.value.message and "AKIA" not in str(error.value)
    assert "environment variables" in str(error.value.hint)


def test_a_store_that_cannot_be_reached_is_asked_again(
    bucket: Bucket, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ConnectError(Exception):
        """As the hub's client has it: no OSError."""

    def unreachable(*arguments: Any, **options: Any) -> Any:
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(Bucket, "info", unreachable)
    with pytest.raises(UserError, match="cannot be fetched: ConnectError: Name or service not known"):
        fetching("s3://team/rows.jsonl")
    assert len(fetching.pauses) == download.ATTEMPTS - 1
    monkeypatch.setattr(Bucket, "glob", unreachable)
    with pytest.raises(UserError, match=r"\*\.jsonl: ConnectError"):
        fetching("s3://team/*.jsonl")


@pytest.mark.parametrize(
    ("path", "package"), [("s3://team/rows.jsonl", "s3fs"), ("gs://team/rows.jsonl", "gcsfs")]
)
def test_a_package_that_is_missing_is_named(fetching: Fetching, path: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError) as error:
        fetching(path)
    assert f"needs the package {package}" in error.value.message
    assert error.value.hint == f"pip install {package}"


def test_other_schemes_are_refused(fetching: Fetching) -> None:
    with pytest.raises(UserError, match=r"rows cannot be fetched from ftp://"):
        fetching("ftp://example.org/rows.jsonl")
    with pytest.raises(UserError, match="a server has no patterns"):
        fetching("https://example.org/*.jsonl")


def test_what_is_elsewhere_and_what_a_file_is_called() -> None:
    assert is_remote("https://a/b.jsonl") and is_remote("hf://datasets/a/b/c.parquet")
    assert not any(map(is_remote, ("rows.jsonl", "./a", "owner/name", "C:/x", "a:b//c")))
    assert file_name("https://a/b/rows%20two.jsonl.gz?x=1") == "rows_two.jsonl.gz"
    assert file_name("s3://a/..%2f..%2fetc.jsonl") == "etc.jsonl"
    assert file_name("https://a/") == "rows" and file_name("https://a/.hidden.json") == "hidden.json"
