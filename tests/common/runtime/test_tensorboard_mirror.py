"""TensorBoard shows what the files hold, also after a resume and when it is switched on late."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from common.runtime import tensorboard_mirror
from common.runtime.tracking import Tracker, read_metrics
from common.tracking_config import MirrorName, TrackingConfig, WandbMode

pytest.importorskip("tensorboard", reason="needs the extra tensorboard")


def tracker(
    folder: Path, done: int | None, *to: MirrorName, said: list[str] | None = None, **config: Any
) -> Tracker:
    tracking = TrackingConfig(to=list(to or [MirrorName.tensorboard]), wandb=WandbMode.off)
    say = [].append if said is None else said.append
    return Tracker("sft", "demo", folder, tracking, config, done, say=say)


def shown(folder: Path) -> Any:
    """What TensorBoard itself reads of the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in shown(folder).Scalars(name)]


def texts(folder: Path, name: str) -> list[str]:
    events = shown(folder).Tensors(f"{name}/text_summary")
    return [event.tensor_proto.string_val[0].decode() for event in events]


def test_the_names_and_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    said: list[str] = []
    with tracker(tmp_path, None, said=said) as log:
        for step in (1, 2, 3):
            log.log({"loss": 1 / step, "perf/tokens_per_second": 100.0 * step}, step)
        log.log({"eval/loss": math.nan}, 3)
    assert said == [f"tensorboard: {tmp_path / 'tensorboard'}"]
    for name in ("loss", "perf/tokens_per_second", "eval/loss"):
        found = [line for line in read_metrics(tmp_path / "metrics.jsonl") if name in line]
        steps, values = zip(*scalars(tmp_path, f"sft/{name}"), strict=True)
        assert list(steps) == [line["step"] for line in found]
        assert list(values) == pytest.approx([line[name] for line in found], rel=1e-6, nan_ok=True)  # fp32


def test_after_a_resume_steps_that_were_done_again_count_once(tmp_path: Path) -> None:
    with tracker(tmp_path, None) as log:
        for step in (1, 2, 3, 4):
            log.log({"loss": float(step)}, step)
    with tracker(tmp_path, 2) as log:
        log.log({"loss": 30.0}, 3)
    assert scalars(tmp_path, "sft/loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    with tracker(tmp_path, None) as log:  # begun anew
        log.log({"loss": 7.0}, 1)
    assert scalars(tmp_path, "sft/loss") == [(1, 7.0)]


def test_switched_on_late_it_has_what_was_logged_before(tmp_path: Path) -> None:
    with tracker(tmp_path, None, MirrorName.wandb) as log:  # which is off
        log.log({"loss": 5.0, "bad": math.inf}, 1)
        log.log_samples([{"prompt": "a|b", "completion": "c\nd"}], 1)
    assert not (tmp_path / "tensorboard").exists()
    with tracker(tmp_path, 1) as log:
        log.log({"loss": 4.0}, 2)
    assert scalars(tmp_path, "sft/loss") == [(1, 5.0), (2, 4.0)]
    assert scalars(tmp_path, "sft/bad") == [(1, math.inf)]
    assert texts(tmp_path, "sft/samples") == [
        "| prompt | completion |\n| --- | --- |\n| a\\|b | c<br>d |"
    ]  # fmt: skip


def test_alerts_and_settings_are_there_and_credentials_are_not(tmp_path: Path) -> None:
    with tracker(tmp_path, None, hf_token="hf_" + "a" * 34, model={"path": "tiny"}) as log:
        log.log({"loss": 1.0}, 5)
        log.alert("the KL is 61")
    assert texts(tmp_path, "alerts") == [
        "**sft of run demo: watchdog** the KL is 61", "**sft of run demo: end** finished",
    ]  # fmt: skip
    (config,) = texts(tmp_path, "sft/config")
    assert "tiny" in config and "hf_a" not in config
    files = [path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()]
    assert files and not any(b"hf_a" in content for content in files)


def test_event_files_that_cannot_be_written_cost_no_step(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    said: list[str] = []
    with tracker(tmp_path, None, said=said) as log:
        log.log({"loss": 1.0}, 1)
    assert len(said) == 1 and said[0].startswith("tensorboard: off (")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_mirror_that_breaks_is_said_once_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard_mirror.TensorBoard, "log", full)
    said: list[str] = []
    with tracker(tmp_path, None, said=said) as log:
        log.log({"loss": 1.0}, 1)
        log.log({"loss": 1.0}, 2)
    assert len(said) == 2 and "No space left on device; the mirror stops here, metrics.jsonl" in said[1]
