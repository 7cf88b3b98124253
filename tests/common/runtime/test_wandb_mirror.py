"""W&B has what the files have when it can be had; nothing about it fails a run or tells a secret."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from common.redact import has_wandb_key
from common.runtime import wandb_mirror
from common.runtime.tracking import read_metrics
from common.runtime.wandb_mirror import choose_mode, server_answers
from common.tracking_config import TrackingConfig, WandbMode
from tests.dripping import dripping, saying
from tests.fake_wandb import FakeWandb, running

KEY = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("requested", "environ", "has_key", "expected"),
    [
        (WandbMode.auto, {}, True, WandbMode.online),
        (WandbMode.auto, {}, False, WandbMode.offline),
        (WandbMode.auto, {"WANDB_MODE": "offline"}, True, WandbMode.offline),
        (WandbMode.auto, {"WANDB_MODE": "disabled"}, True, WandbMode.off),
        (WandbMode.auto, {"WANDB_DISABLED": "true"}, True, WandbMode.off),
        (WandbMode.offline, {}, True, WandbMode.offline),
        (WandbMode.online, {"WANDB_MODE": "offline"}, True, WandbMode.online),
        (WandbMode.off, {}, True, WandbMode.off),
    ],
)
def test_auto_follows_the_environment_and_then_the_key(
    requested: WandbMode, environ: dict[str, str], has_key: bool, expected: WandbMode
) -> None:
    assert choose_mode(requested, environ, has_key)[0] is expected


def test_a_key_is_found_in_the_environment_or_in_netrc(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    netrc.chmod(0o600)
    assert has_wandb_key("https://api.wandb.ai", {"NETRC": str(netrc)})
    assert not has_wandb_key("https://wandb.example", {"NETRC": str(netrc)})
    assert not has_wandb_key("https://api.wandb.ai", {"NETRC": str(tmp_path / "none")})
    assert has_wandb_key("https://api.wandb.ai", {"WANDB_API_KEY": KEY})


def test_a_server_answers_or_does_not() -> None:
    with running() as server:
        assert server_answers(server.url)
    assert not server_answers(server.url)
    with socket.socket() as silent:  # takes connections and never says a word
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert not server_answers(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)
    with saying(dripping(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")) as (port, _):
        assert not server_answers(f"http://127.0.0.1:{port}", seconds=0.2)
    with saying(lambda: iter([b"SSH-2.0\r\n"])) as (port, _):
        assert not server_answers(f"http://127.0.0.1:{port}")


def test_off_never_imports_wandb(tmp_path: Path) -> None:
    code = """
        import sys
        log = Tracker("sft", "demo", Path(sys.argv[1]), TrackingConfig(wandb=WandbMode.off), {}, 0)
        log.log({"loss": 1.0}, 1)
        log.finish()
        print("wandb" in sys.modules, "torch" in sys.modules)
    """
    assert run_python(code, tmp_path, server="http://127.0.0.1:9") == "False False\n"


# --- W&B, against a server on this machine --------------------------------------------------------

PRELUDE = """
import logging
import sys
from pathlib import Path
from common.runtime import mirror, wandb_mirror
from common.runtime.tracking import Tracker
from common.tracking_config import TrackingConfig, WandbMode

logging.getLogger("rlhf").addHandler(logging.NullHandler())  # a step has one: its log
"""
TRAIN = """
    first, last = int(sys.argv[2]), int(sys.argv[3])
    config = {"model": {"path": "tiny"}, "hf_token": "hf_abcdefghijkl", "tracking": {"wandb": "auto"}}
    log = Tracker("sft", "demo", Path(sys.argv[1]), TrackingConfig(), config, first - 1)
    for step in range(first, last + 1):
        log.log({"loss": 1.0 / step}, step)
    log.log_samples([{"prompt": "2+2?", "completion": "4", "stopped": True}], last)
    log.finish({"eval/loss": 0.5})
"""


def run_python(code: str, *arguments: object, server: str, key: str = KEY) -> str:
    """What the code prints, run in a process of its own: W&B's service lives as long as the process."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    home = Path(str(arguments[0])) / "home"
    home.mkdir(parents=True, exist_ok=True)
    environ |= {
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        "WANDB_BASE_URL": server,
        "NETRC": str(home / "netrc"),
    }
    if key:
        environ["WANDB_API_KEY"] = key
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, env=environ, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def history(server: FakeWandb) -> list[tuple[int, float | None]]:
    (run,) = server.history.values()
    return [(line["sft/step"], line.get("sft/loss")) for line in run if "sft/loss" in line]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeWandb, Path, list[str]]:
    """A run of three steps, resumed for two more, with a server that answers."""
    folder = tmp_path_factory.mktemp("online")
    (folder / "manifest.json").write_text("{}")
    artifact = TRAIN.replace(
        "log.finish", 'print(log.log_artifact(Path(sys.argv[1]), "policy", "ab" * 32)); log.finish'
    )
    with running() as server:
        said = [run_python(TRAIN, folder, 1, 3, server=server.url)]
        said.append(run_python(artifact, folder, 4, 5, server=server.url))
    return server, folder, said


def test_an_online_run_arrives_and_a_resume_continues_it(online: tuple[FakeWandb, Path, list[str]]) -> None:
    server, _, said = online
    assert history(server) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), (5, 0.2)]
    assert said[0].startswith(f"wandb: {server.url}") and said[0].count("\n") == 1
    assert set(server.exit_codes.values()) == {0}


def test_a_step_is_one_run_in_the_group_of_its_pipeline_run(
    online: tuple[FakeWandb, Path, list[str]],
) -> None:
    server, folder, _ = online
    first = server.upserts[0]
    assert (first["groupName"], first["jobType"], first["displayName"]) == ("demo", "sft", "demo/sft")
    assert {upsert["name"] for upsert in server.upserts} == {(folder / "wandb_run_id").read_text().strip()}


def test_samples_are_a_table_and_the_artifact_is_its_manifest(
    online: tuple[FakeWandb, Path, list[str]],
) -> None:
    server, _, said = online
    (table,) = [
        name for name in server.uploads if name.startswith("artifact/") and name.endswith("table.json")
    ]
    assert json.loads(server.uploads[table])["data"][0] == [5, "2+2?", "4", True]
    (policy,) = [made for made in server.artifacts if made["artifactTypeName"] == "policy"]
    assert {alias["alias"] for alias in policy["aliases"]} == {"latest", "abababababab"}
    assert json.loads(policy["metadata"])["manifest_sha256"] == "ab" * 32
    assert server.uploads["artifact/manifest.json"] == b"{}"
    assert said[1].endswith("demo-sft:abababababab\n")


def test_neither_the_key_nor_a_token_of_the_config_is_on_disk_or_sent_as_config(
    online: tuple[FakeWandb, Path, list[str]],
) -> None:
    server, folder, _ = online
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5 and any(path.suffix == ".wandb" for path in files)
    for secret in (KEY.encode(), b"hf_abcdefghijkl"):
        assert [path for path in files if secret in path.read_bytes()] == []
    assert "[redacted]" in server.upserts[0]["config"] and "hf_abc" not in server.upserts[0]["config"]


def test_everything_wandb_writes_stays_in_the_folder_of_the_step(
    online: tuple[FakeWandb, Path, list[str]],
) -> None:
    _, folder, _ = online
    assert list((folder / "home").rglob("*")) == []
    assert sorted(path.name for path in (folder / "wandb").iterdir() if not path.name.startswith("run-")) == [
        "cache",
        "data",
    ]


def test_without_a_key_the_run_is_kept_offline_and_one_line_says_so(tmp_path: Path) -> None:
    said = run_python(TRAIN, tmp_path, 1, 3, server="http://127.0.0.1:9", key="")
    assert said.startswith("wandb: offline (no W&B key") and said.count("\n") == 1
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    assert [line["sft/step"] for line in offline_history(log) if "sft/loss" in line] == [1, 2, 3]


def test_a_mirror_that_is_not_online_though_it_should_be_is_a_warning_for_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_mirror, "has_wandb_key", lambda *_: True)
    monkeypatch.setattr(wandb_mirror, "server_answers", lambda *_: False)
    monkeypatch.setattr(wandb_mirror, "_start", lambda mode, why, *_: (None, WandbMode.off, why))
    said: list[str] = []
    for asked in (WandbMode.offline, WandbMode.online):
        wandb_mirror.open_mirror("sft", "a", tmp_path, TrackingConfig(wandb=asked), {}, said.append)
    assert [record.getMessage() for record in caplog.records] == said[1:]
    assert "does not answer" in said[1]


def test_a_server_that_is_not_there_costs_no_step(tmp_path: Path) -> None:
    said = run_python(TRAIN, tmp_path, 1, 3, server="http://127.0.0.1:9")
    assert said.startswith("wandb: offline (http://127.0.0.1:9 does not answer)")
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_server_that_takes_the_request_and_never_answers_is_given_up(tmp_path: Path) -> None:
    with running() as server:
        server.hang.set()
        said = run_python(
            "wandb_mirror.INIT_SECONDS = 1.0" + textwrap.dedent(TRAIN), tmp_path, 1, 3, server=server.url
        )
    assert said.startswith("wandb: offline (CommError")
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [line["sft/step"] for line in offline_history(log) if "sft/loss" in line] == [1, 2, 3]


def test_a_server_that_goes_away_in_the_middle_costs_no_step_and_a_bounded_end(tmp_path: Path) -> None:
    code = """
        import urllib.request
        wandb_mirror.FINISH_SECONDS = mirror.FINISH_SECONDS = 1.0
        log = Tracker("sft", "demo", Path(sys.argv[1]), TrackingConfig(), {}, 0)
        log.log({"loss": 1.0}, 1)
        urllib.request.urlopen(sys.argv[2] + "/hang")
        for step in (2, 3):
            log.log({"loss": 1.0 / step}, step)
        log.log_samples([{"completion": "4"}], 3)
        log.finish()
    """
    with running() as server:
        said = run_python(code, tmp_path, server.url, server=server.url)
        assert server.hang.is_set()
    assert "wandb: not everything was taken in 1 s; send it later with: wandb sync" in said
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_that_wandb_has_not_seen_is_filled_from_the_files(tmp_path: Path) -> None:
    code = """
        tracking = TrackingConfig(wandb=WandbMode[sys.argv[2]])
        log = Tracker("sft", "demo", Path(sys.argv[1]), tracking, {}, int(sys.argv[3]))
        log.log({"loss": 1.0 / int(sys.argv[4]), "bad": float("nan")}, int(sys.argv[4]))
        log.log_samples([{"completion": sys.argv[4]}], int(sys.argv[4]))
        log.finish()
    """
    with running() as server:
        run_python(code, tmp_path, "off", 0, 1, server=server.url)
        run_python(code, tmp_path, "online", 1, 2, server=server.url)
        run_python(code, tmp_path, "online", 2, 4, server=server.url)
    assert history(server) == [(1, 1.0), (2, 0.5), (4, 0.25)]
    (run,) = server.history.values()
    assert [math.isnan(line["sft/bad"]) for line in run if "sft/bad" in line] == [True] * 3
    tables = [json.loads(body) for name, body in server.uploads.items() if name.endswith("table.json")]
    assert {tuple(table["data"][0]) for table in tables} == {(1, "1"), (2, "2"), (4, "4")}


def test_wandb_is_told_of_watchdogs_failures_and_ends(tmp_path: Path) -> None:
    code = """
        from common.tracking_config import AlertKind
        def step(folder, *alerts):
            tracking = TrackingConfig(alerts=list(alerts))
            return Tracker("ppo", "demo", Path(sys.argv[1]) / folder, tracking, {}, None)
        with step("done", *AlertKind) as log:
            for line in ("iteration 3: KL 61", "iteration 4: KL 62.5", "reward hacking"):
                log.alert(line)
        try:
            with step("failed", AlertKind.failure) as log:
                log.alert("not asked for")
                raise ValueError("no room, hf_" + "a" * 34)
        except ValueError:
            pass
    """
    with running() as server:
        said = run_python(code, tmp_path, server=server.url)
    assert said.count("\n") == 2, said  # the addresses of the two runs
    assert server.alerts == [
        ("ppo of run demo: watchdog", "iteration 3: KL 61", "WARN"),  # the next one differs in digits alone
        ("ppo of run demo: watchdog", "reward hacking", "WARN"),
        ("ppo of run demo: end", "finished", "INFO"),
        ("ppo of run demo: failure", "no room, [redacted]", "ERROR"),
    ]


def test_the_id_of_a_step_is_stable_and_a_new_folder_has_another(tmp_path: Path) -> None:
    first = wandb_mirror._run_id(tmp_path)
    assert wandb_mirror._run_id(tmp_path) == first and len(first) == 16
    assert wandb_mirror._run_id(tmp_path / "other") != first


def offline_history(path: Path) -> list[dict[str, Any]]:
    """The history of an offline file: 32 KiB blocks of records in pieces, each with a 7-byte header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records, piece = path.read_bytes(), [], b""
    position = 7  # the file's own header
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        piece += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last piece
            records.append(Record.FromString(piece))
            piece = b""
    items = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in items
    ]
