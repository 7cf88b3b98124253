"""Runs that train while a server or a hub sends their rows: killed then, they go on with the same ones."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import fake_data_hub, tiny_run
from tests.files_server import serving

pytestmark = pytest.mark.slow  # whole runs

ROWS, STEPS = 36_000, 12

Place = tuple[str, dict[str, str], Any]
"""What to type as the path, what to add to the environment, and the server, which holds two fifths back."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stream")


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[bytes]:
    rows = ({"question": f"What is {n} + {n % 7}?", "answer": f"{n + n % 7}"} for n in range(ROWS))
    return [f"{json.dumps(row)}\n".encode() for row in rows]


@pytest.fixture(scope="module")
def settings(folder: Path, lines: list[bytes]) -> list[str]:
    """What is typed but for the rows; the tokenizer is made before, since that takes all of them."""
    made = tiny_run.sft(folder, steps=1, zero=1)
    tiny_run.finish([*made, "run_name=tokenizer"])
    (folder / "rows.jsonl").write_bytes(b"".join(lines))
    left_out = ("sft.data.path", "model.tokenizer", "sft.data.eval_fraction", "sft.train.max_steps")
    return [
        *(text for text in made if not text.startswith(left_out)),
        f"model.tokenizer.path={folder}/runs/tokenizer/sft/export", "model.chat_template=plain",
        "sft.data.streaming=true", "sft.data.eval_fraction=0", f"sft.train.max_steps={STEPS}",
        "sft.train.save_every=2", "launch.max_restarts=0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(folder: Path, settings: list[str]) -> dict[str, str]:
    """The weights that the rows of a file here give."""
    tiny_run.finish([*settings, f"sft.data.path={folder}/rows.jsonl", "run_name=here"])
    return tiny_run.weights(folder / "runs" / "here")


@contextmanager
def on_a_server(lines: list[bytes]) -> Iterator[Place]:
    body = b"".join(lines)
    with serving(rows__jsonl=body) as served:
        served.holds["/rows.jsonl"] = len(body) * 3 // 5
        yield f"{served.url}/rows.jsonl", {}, served


@contextmanager
def on_a_hub(lines: list[bytes]) -> Iterator[Place]:
    with fake_data_hub.running() as hub:
        half = len(lines) * 3 // 5
        hub.files = {"train-0.jsonl": b"".join(lines[:half]), "train-1.jsonl": b"".join(lines[half:])}
        hub.holds = "train-1.jsonl"
        yield fake_data_hub.NAME, {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}, hub


@pytest.mark.parametrize("place", [on_a_server, on_a_hub])
def test_a_run_trains_on_what_has_come_and_goes_on_when_it_was_killed(
    folder: Path, lines: list[bytes], settings: list[str], expected: dict[str, str], place: Any
) -> None:
    name = place.__name__
    run_dir = folder / "runs" / name
    with place(lines) as (path, more, server):
        typed = [*settings, f"sft.data.path={path}", f"run_name={name}"]
        more = {**more, "HF_HOME": str(folder / "hf")}
        started = tiny_run.start(typed, more)
        tiny_run.wait_until(
            lambda: started.poll() is not None or tiny_run.steps_done(run_dir) >= 5,
            lambda: f"{run_dir}: {tiny_run.steps_done(run_dir)} steps",
        )
        started.kill()
        printed = started.communicate()[0]
        assert tiny_run.steps_done(run_dir) >= 5 and started.returncode == -signal.SIGKILL, printed[-3000:]
        assert not server.released.is_set() and not (run_dir / "sft" / "export").exists()
        server.released.set()
        printed = tiny_run.finish(typed, more)
        assert "resuming from" in printed
    assert tiny_run.weights(run_dir) == expected
