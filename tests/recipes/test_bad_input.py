"""What users get wrong, met by the step itself: one clear error, status 2, and nothing lost.

What the controller can see beforehand is tested with it; here it is rows, models and checkpoints.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest

from benchmarks.kill_resume import metric_differences, state_differences
from common.artifacts import verify
from common.errors import UserError
from common.runtime.distributed import STOPPED_EXIT_CODE
from step1_sft.config import SFTJob
from tests import mounts
from tests.programs.refused_write import sft_refused
from tests.programs.told_to_stop import sft_told_to_stop
from tests.runs import LLAMA, Base, finish, sums, training_lines

GOOD = [json.dumps(row) for row in sums(6)]


def the_error(printed: str) -> str:
    """The one error that a person reads."""
    assert "Traceback" not in printed, printed
    assert printed.count("error: ") == 1, printed
    return printed.partition("error: ")[2]


# --- Rows and templates ---------------------------------------------------------------------------


def refused_rows(
    base: Base, name: str, lines: list[str | bytes], change: Callable[[SFTJob], None] | None = None
) -> str:
    """What the preview says to these rows; the job may be changed first."""
    rows = base.folder / f"{name}.jsonl"
    rows.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    job = base.job()
    job.sft.data.sources[:] = job.sft.data.sources[:1]
    job.sft.data.sources[0].path = str(rows)
    if change is not None:
        change(job)
    run_dir = base.write(f"refused-{name}", job)
    error = the_error(finish(run_dir, 1, _preview, code=2))
    assert not (run_dir / "sft" / "export").exists()
    return error


def _preview(config: str) -> int:
    from tests.forked import sft

    return sft(config, "--preview")


def messages(*turns: tuple[Any, Any]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


USER, ASSISTANT = ("user", "a?"), ("assistant", "b.")


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("truncated", [*GOOD, GOOD[0][:30]], ["truncated.jsonl:7"]),
        ("number", [*GOOD, '{"question": 5, "answer": "b"}'], ["number.jsonl:7", "question"]),
        ("surrogate", [*GOOD, '{"question": "\\ud800", "answer": "b"}'], ["surrogate.jsonl:7", "surrogate"]),
        ("not-utf8", [*GOOD, b'{"question": "\xff", "answer": "b"}'], ["not-utf8.jsonl:7", "UTF-8"]),
        (
            "twice",
            [*GOOD, '{"question": "a", "question": "c", "answer": "b"}'],
            ["twice.jsonl:7", "question"],
        ),
        ("role", [messages(USER, ASSISTANT), messages(USER, ("robot", "b"))], ["role.jsonl:2", "robot"]),
        ("silent", [messages(USER, ASSISTANT), messages(USER)], ["silent.jsonl:2", "assistant"]),
        ("nothing", [messages(USER, ASSISTANT), messages(USER, ("assistant", None))], ["nothing.jsonl:2"]),
        ("columns", [json.dumps({"left": "a", "right": "b"})], ["columns", "left"]),
        ("blank", [""], ["blank.jsonl"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_row_is_named_by_file_and_line(
    base: Base, name: str, lines: list[str | bytes], said: list[str]
) -> None:
    error = refused_rows(base, name, lines)
    assert all(word in error for word in said), error


def test_rows_that_are_all_too_long_are_an_error_that_says_why(base: Base) -> None:
    def shorten(job: SFTJob) -> None:
        job.sft.data.max_length = 8

    error = refused_rows(base, "too-long", list(GOOD), shorten)
    assert "no row is left" in error and "data.max_length" in error


def test_a_template_that_writes_no_assistant_is_refused(base: Base) -> None:
    template = base.folder / "silent.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")

    def use(job: SFTJob) -> None:
        job.model.chat_template = str(template)

    error = refused_rows(base, "silent-template", list(GOOD), use)
    assert "template" in error and "assistant" in error


def test_a_tokenizer_without_eos_and_without_template_is_refused(base: Base) -> None:
    folder = base.folder / "no-eos"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((base.tokenizer / name).read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {key: value for key, value in settings.items() if not key.endswith(("_token", "_tokens"))}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))

    def use(job: SFTJob) -> None:
        job.model.tokenizer.path = str(folder)

    error = refused_rows(base, "no-eos-rows", list(GOOD), use)
    assert "eos" in error and "model.chat_template=chatml" in error


def test_without_a_network_a_hub_name_is_an_error_that_says_so(base: Base) -> None:
    job = base.job()
    job.model.config, job.model.tokenizer.path, job.model.path = {}, None, "nobody/no-such-model"
    run_dir = base.write("refused-hub", job)
    error = the_error(finish(run_dir, 1, _offline, code=2))
    assert "nobody/no-such-model" in error and "network" in error


def _offline(config: str) -> int:
    """The hub is where nothing listens; its client tries again without waiting."""
    import time

    import huggingface_hub.constants

    from tests.forked import sft

    huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
    time.sleep = lambda seconds: None
    return sft(config)


# --- Checkpoints and disks ------------------------------------------------------------------------


def saving_job(base: Base) -> SFTJob:
    job = base.job(max_steps=5, save_every=1, keep_checkpoints=10)
    job.model.config = {**LLAMA, "attention_dropout": 0.2}
    return job


@pytest.fixture(scope="module")
def whole(base: Base) -> Path:
    return base.run("bad-input-whole", saving_job(base))


@pytest.fixture
def stopped(base: Base, request: pytest.FixtureRequest) -> Path:
    """A run that was stopped after three steps, each with a checkpoint."""
    run_dir = base.write(f"bad-input-{request.node.originalname}", saving_job(base))
    finish(run_dir, 1, sft_told_to_stop, 3, 0, [SIGTERM], code=STOPPED_EXIT_CODE)
    return run_dir


def shard(run_dir: Path, step: int) -> Path:
    (path,) = (run_dir / "sft" / "checkpoints" / f"step_{step:08d}").glob("zero/*optim_states.pt")
    return path


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_and_a_missing_shard_cost_two_checkpoints_and_no_result(
    stopped: Path, whole: Path
) -> None:
    flip_a_bit(shard(stopped, 3))
    shard(stopped, 2).unlink()
    printed = finish(stopped, 1)
    assert f"step_00000003: zero/{shard(whole, 3).name}: content differs" in printed
    assert f"step_00000002: zero/{shard(whole, 2).name}: missing" in printed
    assert "resuming from" in printed and "step_00000001" in printed
    quarantine = stopped / "sft" / "checkpoints" / "quarantine"
    assert sorted(path.name for path in quarantine.iterdir()) == ["step_00000002", "step_00000003"]
    assert state_differences(whole, stopped, 5) == [] and metric_differences(whole, stopped) == []


def test_when_no_checkpoint_can_be_verified_the_run_says_so_and_deletes_nothing(stopped: Path) -> None:
    for step in (1, 2, 3):
        flip_a_bit(shard(stopped, step))
    error = the_error(finish(stopped, 1, code=2))
    assert "no checkpoint under" in error and "quarantine" in error
    assert len(list((stopped / "sft/checkpoints/quarantine").glob("step_*/zero/*optim_states.pt"))) == 3
    assert len(training_lines(stopped)) == 3


def test_a_disk_that_fills_up_costs_no_earlier_checkpoint(base: Base, whole: Path, tmp_path: Path) -> None:
    one = sum(p.stat().st_size for p in (whole / "sft/checkpoints/step_00000001").rglob("*") if p.is_file())
    with mounts.small_disk(tmp_path / "disk", 4 * one) as disk:
        run_dir = disk / "run"
        run_dir.mkdir()
        config = base.write("bad-input-disk", saving_job(base)) / "resolved.yaml"
        (run_dir / "resolved.yaml").write_text(config.read_text())
        error = the_error(finish(run_dir, 1, code=2))
        assert "cannot write" in error and "free space and run the same command again" in error
        kept = sorted((run_dir / "sft" / "checkpoints").iterdir())
        assert 2 <= len(kept) <= 4
        assert all(verify(path).kind == "checkpoint" for path in kept)
        subprocess.run(["mount", "-o", f"remount,size={20 * one}", str(disk)], check=True)
        finish(run_dir, 1)
        assert state_differences(whole, run_dir, 5) == []


def test_a_disk_that_turns_read_only_costs_no_earlier_checkpoint(stopped: Path) -> None:
    checkpoints = stopped / "sft" / "checkpoints"
    before = {path.name: verify(path).files for path in checkpoints.iterdir()}
    with mounts.read_only(checkpoints):
        error = the_error(finish(stopped, 1, code=2))
    assert "read-only" in error
    assert {path.name: verify(path).files for path in checkpoints.iterdir()} == before


def test_a_disk_that_refuses_one_of_two_ranks_ends_both_with_one_error(base: Base) -> None:
    job = saving_job(base)
    job.deepspeed.stage = 3
    run_dir = base.write("bad-input-one-of-two", job)
    error = the_error(finish(run_dir, 2, sft_refused, 1, 2, code=2))
    assert "the disk is full" in error
    checkpoints = run_dir / "sft" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000001"]
    assert verify(checkpoints / "step_00000001").kind == "checkpoint"


def test_a_damaged_manifest_of_an_artifact_is_a_user_error(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "export"
    copy.mkdir()
    for path in (whole / "sft" / "export").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert verify(copy).kind == "artifact"
    flip_a_bit(copy / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors: content differs"):
        verify(copy)
