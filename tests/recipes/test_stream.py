"""SFT on rows that are tokenized while it trains: whole runs."""

from __future__ import annotations

from pathlib import Path

import yaml

from benchmarks import kill_resume
from benchmarks.kill_resume import Point
from tests import runs
from tests.programs import killed
from tests.runs import finish, start, training_lines, wait_while

POINT = Point(2, 2, steps=12)


def prepare(folder: Path, name: str) -> Path:
    """A run of more than one pass over its rows, some of which are held out as well."""
    rows = folder / "rows.jsonl"
    kill_resume.write_rows(rows)
    held_out = folder / "held_out.jsonl"
    held_out.write_text("".join(rows.read_text().splitlines(keepends=True)[:8]))
    path = kill_resume.write_config(folder / name, POINT, rows)
    job = yaml.safe_load(path.read_text())
    job["sft"]["data"] |= {"streaming": True, "eval_path": str(held_out)}
    path.write_text(yaml.safe_dump(job))
    return path.parent


def test_a_stream_that_was_killed_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    whole = prepare(tmp_path, "whole")
    printed = finish(whole, 2)
    assert "streaming: rows are tokenized while they are trained on" in printed
    assert training_lines(whole)[-1]["epoch"] > 1
    run_dir = prepare(tmp_path, "killed")
    runs.dies(run_dir, 2, 1, killed.sft_killed, "writing", 1)
    started = start(run_dir, 2)
    wait_while(started, lambda: kill_resume.last_step(run_dir / "sft") < 5)
    started.kill()
    assert "resuming from" in finish(run_dir, 2)
    assert kill_resume.state_differences(whole, run_dir, POINT.steps) == []
    assert kill_resume.metric_differences(whole, run_dir) == []
    # the rows are accounted for when the last one is read, as they are without streaming
    ledger = yaml.safe_load((whole / "sft" / "ledger.json").read_text())
    source = ledger["sources"][0]
    assert source["rows_read"] == 96 and source["dropped"]["also in data.eval_path"]["count"] >= 8
