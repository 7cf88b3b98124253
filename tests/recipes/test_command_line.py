"""`python -m pipeline` for real: a whole run, the same command again, and what users get wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.kill_resume import last_step
from pipeline.config import PROJECT
from tests import mounts
from tests.conftest import Command
from tests.forked import ENVIRONMENT
from tests.runs import sums

RLHF = [sys.executable, "-m", "pipeline"]
MODEL = [
    "model=llama_4m", "model.dtype=fp32", "model.config.hidden_size=32", "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2", "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2", "model.config.max_position_embeddings=128",
    "model.tokenizer.train_vocab_size=300",
]  # fmt: skip
JOB = [
    *MODEL, "steps=[sft]", "run_name=a", "sft.data.path=rows.jsonl", "sft.data.max_length=96", "tracking=off",
    "sft.train.global_batch_size=4", "sft.train.max_steps=4", "sft.train.save_every=2", "sft.optim.lr=3e-3",
    "sft.sampling.num_prompts=2", "sft.sampling.max_new_tokens=4",
]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(PROJECT)}


def rlhf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in `folder`."""
    return subprocess.run(
        [*RLHF, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one error of a command that the user can put right."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert (done.stdout + done.stderr).count("error: ") == 1, done.stderr
    return done.stderr.partition("error: ")[2]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_rows(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(24)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with rows."""
    folder = tmp_path_factory.mktemp("command_line")
    write_rows(folder)
    return folder


@pytest.fixture(scope="module")
def done(place: Path) -> subprocess.CompletedProcess[str]:
    """The command that made the run `a` in `place`."""
    return rlhf(place, "run", *JOB)


# --- A run and what follows it --------------------------------------------------------------------


def test_one_command_trains_and_exports_a_policy(place: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert "sft: done" in done.stdout and f"artifact  {Path('runs/a/sft/export')}" in done.stdout
    assert sorted(path.name for path in place.iterdir()) == ["rows.jsonl", "runs"]
    run_dir = place / "runs" / "a"
    left = {path.name for path in run_dir.iterdir()}
    assert left == {".lock", "resolved.yaml", "lineage.json", "sft", "report.html"}
    assert {path.name for path in (run_dir / "sft").iterdir()} == {
        "state.json", "metrics.jsonl", "samples.jsonl", "ledger.json", "checkpoints", "export", "logs",
        "tokenizer",
    }  # fmt: skip
    assert json.loads((run_dir / "sft" / "state.json").read_text())["status"] == "done"
    # nothing of the libraries' own chatter reaches the terminal
    said = done.stdout + done.stderr
    assert "DeepSpeed" not in said and "real_accelerator" not in said and "Warning" not in done.stderr


def test_the_same_command_again_finds_it_done(place: Path, done: subprocess.CompletedProcess[str]) -> None:
    before = content(place / "runs" / "a" / "sft" / "export")
    again = rlhf(place, "run", *JOB)
    assert again.returncode == 0 and "sft: done already" in again.stdout
    assert content(place / "runs" / "a" / "sft" / "export") == before


def test_another_configuration_is_refused_with_the_difference_and_two_ways_out(
    place: Path, done: subprocess.CompletedProcess[str]
) -> None:
    before = content(place / "runs" / "a" / "sft")
    error = the_error(rlhf(place, "run", *JOB, "sft.optim.lr=1e-3", "seed=5"))
    assert "sft.optim.lr: 0.003 -> 0.001" in error and "seed: 0 -> 5" in error
    assert "run_name=" in error and "force=true" in error
    assert content(place / "runs" / "a" / "sft") == before


def test_verify_says_yes_and_after_a_flipped_bit_names_the_file(
    place: Path, done: subprocess.CompletedProcess[str]
) -> None:
    fine = rlhf(place, "verify", "runs/a")
    assert fine.returncode == 0 and "all is as it was written" in fine.stdout
    assert "DIFFERS" not in fine.stdout
    for what, times in ((": artifact (policy),", 1), (": checkpoint,", 2), (": lineage,", 1)):
        assert fine.stdout.count(what) == times
    weights = place / "runs/a/sft/export/model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-9] + bytes([original[-9] ^ 1]) + original[-8:])
    try:
        spoilt = rlhf(place, "verify", "runs/a")
        assert spoilt.returncode == 2 and "model.safetensors: content differs" in spoilt.stdout
        assert "model.safetensors: content differs" in the_error(rlhf(place, "run", *JOB))
    finally:
        weights.write_bytes(original)


# --- A run that is alive --------------------------------------------------------------------------


@pytest.fixture
def alive(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A run with two ranks that has begun to train and would go on for hours."""
    write_rows(tmp_path)
    many = [*JOB, "sft.train.max_steps=1000000", "sft.train.save_every=0", "launch.nproc_per_node=2"]
    process = subprocess.Popen(
        [*RLHF, "run", *many], cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        end = time.monotonic() + 240
        while last_step(tmp_path / "runs/a/sft") < 2:
            assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=60)[0]
            time.sleep(0.1)
        yield tmp_path, process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_second_run_is_refused_and_the_first_stops_with_its_state_saved(
    alive: tuple[Path, subprocess.Popen[str]],
) -> None:
    folder, process = alive
    error = the_error(rlhf(folder, "run", *JOB))
    assert "another run is using" in error and f"process {process.pid}" in error
    before = last_step(folder / "runs/a/sft")
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 143, printed
    assert "the same command goes on from here" in printed and "Traceback" not in printed
    (saved,) = (folder / "runs/a/sft/checkpoints").iterdir()
    assert int(saved.name[5:]) == last_step(folder / "runs/a/sft") >= before
    assert json.loads((folder / "runs/a/sft/state.json").read_text())["status"] == "stopped"
    assert rlhf(folder, "verify", "runs/a").returncode == 0


# --- What users get wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sft.optim.wamup_ratio=0"], ["unknown key", "did you mean sft.optim.warmup_ratio?"]),
        (["+sft.optim.lrr=1"], ["unknown key", "did you mean sft.optim.lr?"]),
        (["model.dtype=bf17"], ["model.dtype", "bf17", "auto, bf16, fp16, fp32"]),
        (["sft.train.micro_batch_size=0"], ["micro_batch_size=0 is not allowed", "1 to 1,000,000"]),
        (["deepspeed=zero9"], ["zero9", "zero3"]),
        (["deepspeed.stage=0"], ["deepspeed.stage=0", "deepspeed=zero1"]),
        (["run_name=a=b"], ["run_name", "quote"]),
        (["sft.data.path=row.jsonl"], ["sft.data.path=row.jsonl", "did you mean rows.jsonl?"]),
        (["sft.data.path=empty.jsonl"], ["sft.data.path=empty.jsonl is empty"]),
        (["sft.data.max_length=129"], ["sft.data.max_length=129", "context is 128 tokens"]),
        (["sft.optim=muon", "model.dtype=bf16"], ["sft.optim.name=muon", "deepspeed=zero3"]),
        (["output_dir=rows.jsonl"], ["output_dir=rows.jsonl", "is not a folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else "",
)
def test_what_is_wrong_is_said_before_anything_is_started(
    tmp_path: Path, arguments: list[str], said: list[str], command: Command
) -> None:
    write_rows(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    error = the_error(command("run", *JOB, *arguments, folder=tmp_path))
    assert all(word in error for word in said), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "rows.jsonl"]


def test_an_output_folder_on_a_read_only_or_full_disk_is_refused(tmp_path: Path, command: Command) -> None:
    write_rows(tmp_path)
    (tmp_path / "locked").mkdir()
    with mounts.read_only(tmp_path / "locked"):
        error = the_error(command("run", *JOB, "output_dir=locked/runs", folder=tmp_path))
    assert "output_dir=locked/runs" in error and "read-only" in error
    with mounts.small_disk(tmp_path / "small", 1 << 20):
        error = the_error(command("run", *JOB, "output_dir=small/runs", folder=tmp_path))
    assert "output_dir=small/runs" in error and "are free" in error


@pytest.mark.slow
def test_an_error_of_the_step_ends_the_command_with_status_two_and_is_said_once(tmp_path: Path) -> None:
    write_rows(tmp_path)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"question": "cut o')
    error = the_error(rlhf(tmp_path, "run", *JOB, "launch.nproc_per_node=2"))
    assert "rows.jsonl:25" in error
    assert json.loads((tmp_path / "runs/a/sft/state.json").read_text())["status"] == "failed"


def test_a_preview_through_a_pipe_has_no_colour_and_leaves_no_run(place: Path) -> None:
    shown = rlhf(place, "preview", *JOB)
    assert shown.returncode == 0, shown.stderr
    assert "What is" in shown.stdout and "\x1b[" not in shown.stdout
    assert "trained" in shown.stdout
