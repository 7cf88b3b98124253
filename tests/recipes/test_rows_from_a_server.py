"""A run whose rows lie on a server: broken off, done already, and refused when they changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny_run
from tests.files_server import serving

pytestmark = pytest.mark.slow  # whole runs


def test_a_run_goes_by_the_content_of_rows_that_a_server_has(tmp_path: Path) -> None:
    overrides = [text for text in tiny_run.sft(tmp_path, steps=2, zero=1) if "data.path" not in text]
    rows = (tmp_path / "sums.jsonl").read_bytes()
    with serving(sums__jsonl=rows) as served:
        typed = [*overrides, f"sft.data.path={served.url}/sums.jsonl", "run_name=web"]
        served.cuts = [500]
        first = tiny_run.finish(typed)
        assert "3.1 KiB fetched" in first and "sums    question/answer    64    64" in first
        weights = tiny_run.weights(tmp_path / "runs" / "web")
        again = tiny_run.finish(typed)
        assert "as it was" in again and "sft: done already" in again
        served.files["/sums.jsonl"] = rows.replace(b"What", b"So what")
        changed = tiny_run.finish(typed, status=2)
        assert "was made differently" in changed and "content of sft.data.sources[0]" in changed
        served.files["/sums.jsonl"] = rows
        assert "sft: done already" in tiny_run.finish(typed)
    assert tiny_run.weights(tmp_path / "runs" / "web") == weights
