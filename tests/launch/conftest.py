"""Machine 0 in this process, and the others as processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.launch_config import LaunchConfig
from launch.nodes import Hello
from tests.forked import ROOT, free_port

COMMAND = {"launch.nnodes": 2, "run_name": "a", "steps": ["sft"]}
FOLLOWER = """
import json, sys
from pathlib import Path
from common.launch_config import LaunchConfig
from common.errors import UserError
from launch import follow, nodes
from launch.local import Job
follow.SHARED_SECONDS = 2.0
launch, rank, ranks, command, folder = json.loads(sys.argv[1])
own = nodes.Hello(rank, ranks, command, "b")
jobs = {"sft": Job("some_module", (folder,), ranks)}
try:
    sys.exit(follow.follow(LaunchConfig(**launch, node_rank=rank), own, Path(folder), jobs, print))
except UserError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def launch() -> LaunchConfig:
    return launch_of(2)


def launch_of(nnodes: int, seconds: int = 60) -> LaunchConfig:
    endpoint = f"127.0.0.1:{free_port()}"
    return LaunchConfig(nnodes=nnodes, node_rank=0, rdzv_endpoint=endpoint, join_seconds=seconds)


def own(ranks: int = 1) -> Hello:
    return Hello(0, ranks, COMMAND, "a")


@contextlib.contextmanager
def follower(
    launch: LaunchConfig, folder: Path, rank: int = 1, ranks: int = 1, command: dict[str, object] = COMMAND
) -> Iterator[subprocess.Popen[str]]:
    """Another machine, as a process."""
    told = {"nnodes": launch.nnodes, "rdzv_endpoint": launch.rdzv_endpoint, "join_seconds": 60}
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER, json.dumps([told, rank, ranks, command, str(folder)])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.getcwd()])},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def connect(endpoint: tuple[str, int]) -> socket.socket:
    for _ in range(200):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(endpoint)
        time.sleep(0.02)
    raise AssertionError(endpoint)
