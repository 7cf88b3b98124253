"""What is counted before a run is what the run sees, by the weights of its sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config import SourceConfig
from common.errors import UserError
from common.fields import as_schema
from common.training import forecast
from step1_sft.config import SFTJob
from step1_sft.dry_run import forecast as forecast_sft
from tests.runs import Base, training_lines


def weighted(base: Base, weights: tuple[float, float]) -> SFTJob:
    job = base.job(max_steps=None, epochs=1.0)
    job.sft.data.sources = [
        SourceConfig(path=str(path), weight=weight)
        for path, weight in zip(base.sources, weights, strict=True)
    ]
    job.sft.sampling.num_prompts = 0
    return job


@pytest.mark.parametrize("packing", [False, True])
def test_the_weights_of_sources_count_as_in_training(base: Base, packing: bool) -> None:
    """Of 40 and 24 rows 32 and 19 are to train on, which are seen 0.5 and 2 times: 16 + 38."""
    job = weighted(base, (0.5, 2.0))
    job.sft.data.packing = packing
    name = f"weighted, packing {packing}"
    counts = forecast_sft(base.write(name, job) / "resolved.yaml")
    lines = training_lines(base.run(name, job))
    assert counts.documents == 51 and counts.seen == 54
    assert counts.total_steps == len(lines)
    assert packing or (counts.rows == 54 and len(lines) == 14)
    assert lines[-1]["num_tokens"] == pytest.approx(counts.fill * counts.rows * 96)


def test_a_sample_of_sources_of_different_sizes_stands_for_all_their_rows(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 short rows seen twice and 400 long ones: 480 an epoch, most of them long."""
    texts = {"short": ("Say a.", "a", 40), "long": ("Say it again and again.", "it " * 10, 400)}
    job = weighted(base, (2.0, 1.0))
    for (name, (prompt, completion, count)), source in zip(texts.items(), job.sft.data.sources, strict=True):
        source.path = str(tmp_path / f"{name}.jsonl")
        rows = [{"prompt": f"{prompt} {n}", "completion": completion} for n in range(count)]
        Path(source.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    job.sft.data.eval_fraction, job.sft.data.packing = 0.0, False
    resolved = base.write("sampled", job) / "resolved.yaml"
    every = forecast_sft(resolved)
    assert (every.documents, every.seen, every.rows) == (440, 480, 480)
    monkeypatch.setattr(forecast, "LARGE_BYTES", 0)
    monkeypatch.setattr(forecast, "SAMPLED_ROWS", 20)
    some = forecast_sft(resolved)
    assert some.scale == 11 and some.documents == 440
    assert some.seen == pytest.approx(480, rel=0.05) and some.rows == some.seen
    assert some.total_steps == pytest.approx(every.total_steps, rel=0.05)
    assert some.tokens == pytest.approx(every.tokens, rel=0.02)


def test_rows_of_a_file_for_evaluation_are_counted_beside_those_of_the_sources(base: Base) -> None:
    job = weighted(base, (0.5, 2.0))
    job.sft.data.eval_path, job.sft.data.eval_fraction = str(base.sources[0]), None
    job.sft.data.sources, job.sft.data.packing = job.sft.data.sources[1:], False
    counts = forecast_sft(base.write("eval path", job) / "resolved.yaml")
    assert (counts.documents, counts.seen, counts.held_out) == (24, 48, 40)


def test_weights_that_leave_nothing_of_an_epoch_are_refused(base: Base) -> None:
    job = weighted(base, (0.001, 0.001))
    with pytest.raises(UserError, match="an epoch has none of 51 rows by the weights of their sources"):
        forecast_sft(base.write("weightless", job) / "resolved.yaml")
    for weight in (0.0, float("inf"), float("nan"), 1e9):
        with pytest.raises(UserError, match="1e-06 to 1,000"):
            as_schema(SourceConfig, {"path": "a", "weight": weight})
