"""Metrics and samples reach the files always, in whole lines; nothing about them fails a run."""

from __future__ import annotations

import errno
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from common.runtime.json_lines import write_whole
from common.runtime.tracking import Tracker, read_metrics
from common.tracking_config import TrackingConfig, WandbMode

OFF = TrackingConfig(wandb=WandbMode.off)


def tracker(folder: Path, resume_step: int = 0, **options: Any) -> Tracker:
    return Tracker("sft", "demo", folder, OFF, {}, resume_step, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text("utf-8").splitlines()]


def test_each_call_is_one_line_that_is_on_disk_at_once(tmp_path: Path) -> None:
    log = tracker(tmp_path)
    log.log({"loss": 2.5, "num_tokens": 10}, 1)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5, "num_tokens": 10}]
    log.log({"eval/loss": 2}, 1)
    assert lines(tmp_path / "metrics.jsonl")[1] == {"step": 1, "eval/loss": 2}


def test_not_a_number_and_infinities_are_strict_json_and_come_back(tmp_path: Path) -> None:
    tracker(tmp_path).log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}, 3)
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 3, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.5}
    ]
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


def test_numbers_of_torch_and_numpy_are_written_as_numbers(tmp_path: Path) -> None:
    import numpy as np
    import torch

    tracker(tmp_path).log({"a": torch.tensor(0.5), "b": np.int64(7), "c": np.float32(0.25)}, 1)  # type: ignore[dict-item]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 0.5, "b": 7, "c": 0.25}\n'


def test_a_resume_cuts_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    for step in (1, 2, 3, 4):
        first.log({"loss": float(step)}, step)
        first.log_samples([{"completion": f"at {step}"}], step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "los')  # killed while writing
    tracker(tmp_path, resume_step=2).log({"loss": 3.0}, 3)
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [record["completion"] for record in lines(tmp_path / "samples.jsonl")] == ["at 1", "at 2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_a_run_that_begins_again_begins_with_empty_files(tmp_path: Path) -> None:
    tracker(tmp_path).log({"eval/loss": 5.0}, 0)
    tracker(tmp_path, resume_step=None)
    assert lines(tmp_path / "metrics.jsonl") == []


def test_a_run_resumed_within_its_first_step_keeps_what_was_measured_before_it(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    first.log({"eval/loss": 5.0}, 0)
    first.log({"loss": 4.0}, 1)
    tracker(tmp_path, resume_step=0)
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [0]


def test_samples_keep_every_script_and_say_whether_they_stopped(tmp_path: Path) -> None:
    rows = [{"prompt": "Grüße", "completion": "漢字 🙂", "stopped": True, "score": math.nan}]
    tracker(tmp_path).log_samples(rows, 7)
    assert lines(tmp_path / "samples.jsonl") == [
        {"step": 7, "prompt": "Grüße", "completion": "漢字 🙂", "stopped": True, "score": "NaN"}
    ]


def test_a_lone_surrogate_in_a_sample_does_not_stop_the_run(tmp_path: Path) -> None:
    tracker(tmp_path).log_samples([{"completion": "half \ud83d of a character"}], 1)
    assert lines(tmp_path / "samples.jsonl")[0]["completion"] == "half ? of a character"


def test_other_ranks_write_nothing_and_say_nothing(tmp_path: Path) -> None:
    log = Tracker("sft", "demo", tmp_path / "no", TrackingConfig(), {}, 0, enabled=False, say=pytest.fail)
    log.log({"loss": 1.0}, 1)
    log.log_samples([{"a": 1}], 1)
    log.finish({"loss": 1.0})
    assert not (tmp_path / "no").exists()


def test_a_full_disk_is_said_once_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    log = tracker(tmp_path, say=said.append)
    log.log({"loss": 1.0}, 1)

    full = True
    real_open = Path.open

    def open_on_a_full_disk(self: Path, *args: Any, **kwargs: Any) -> Any:
        return _FullDisk(real_open(self, *args, **kwargs)) if full else real_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_on_a_full_disk)
    log.log({"loss": 2.0}, 2)
    log.log({"loss": 3.0}, 3)
    full = False
    log.log({"loss": 4.0}, 4)
    assert len(said) == 1 and "metrics.jsonl cannot be written" in said[0]
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 4]


class _FullDisk:
    """A file that takes five more bytes and then has no space left."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> _FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        self._file.write(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_cannot_be_made_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    log = tracker(tmp_path / "file" / "sft", say=said.append)
    log.log({"loss": 1.0}, 1)
    assert len([line for line in said if "metrics.jsonl cannot be written" in line]) == 1


def test_a_line_that_a_disk_takes_in_part_is_undone_and_the_disks_own_error_raised(tmp_path: Path) -> None:
    class Short(io.FileIO):
        """Takes four bytes, then nothing."""

        taken = False

        def write(self, data: object) -> int:
            if self.taken:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            self.taken = True
            return super().write(bytes(data)[:4])  # type: ignore[call-overload]

    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"{}\n")
    with Short(path, "ab+") as file, pytest.raises(OSError, match=os.strerror(errno.EDQUOT)):
        write_whole(file, b'{"step": 1}\n')
    assert path.read_bytes() == b"{}\n"
