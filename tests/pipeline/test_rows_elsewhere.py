"""Rows that lie elsewhere: settled as files here before anything reads them, and named in the ledger."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from common.data.dataset_types import DEMONSTRATIONS
from common.data.reader import Reader
from common.data.stages import StageSplit
from common.errors import UserError
from common.stage import Step
from pipeline.compose import compose, prepare
from pipeline.plan import STAGES
from pipeline.rows import settle_rows
from pipeline.state import differing, step_config
from tests.files_server import serving


def row(text: str) -> bytes:
    return b'{"prompt": "a", "completion": "%s"}\n' % text.encode()


def settled_rows(folder: Path, said: list[str], *typed: str) -> Any:
    overrides = ["steps=[sft]", "model.path=m", f"output_dir={folder}/runs", *typed]
    return settle_rows(compose(prepare(overrides).overrides), said.append)


def test_rows_elsewhere_are_fetched_once_for_all_steps_and_kept_below_the_output(tmp_path: Path) -> None:
    said: list[str] = []
    with serving(rows__jsonl=row("b"), held__jsonl=row("c")) as served:
        named = [
            f"{step}.data.sources=[{{path: '{served.url}/rows.jsonl', weight: 2}}]" for step in ("sft", "ppo")
        ]
        typed = [
            *named,
            f"sft.data.eval_path='{served.url}/held.jsonl'",
            "steps=[sft,ppo]",
            "ppo.reward_model=r",
        ]
        config = settled_rows(tmp_path, said, *typed)
        assert [path for path, _ in served.asked] == ["/rows.jsonl"] * 2 + ["/held.jsonl"] * 2
    (source,), (prompts,) = config.sft.data.sources, config.ppo.data.sources
    assert source == prompts and source.weight == 2
    assert Path(source.path).read_bytes() == row("b") and Path(source.path).name == "rows.jsonl"
    assert Path(source.path).is_relative_to(tmp_path / "runs" / ".cache" / "rows")
    assert Path(str(config.sft.data.eval_path)).read_bytes() == row("c")
    assert [line.partition("=")[0] for line in said] == ["sft.data.sources[0].path", "sft.data.eval_path"]


def test_rows_here_are_left_as_they_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    for path in ("rows.jsonl", "owner/name", "data/*.jsonl"):
        assert settled_rows(tmp_path, said, f"sft.data.path='{path}'").sft.data.path == path
    assert said == [] and not (tmp_path / "runs").exists()


def test_another_content_is_another_configuration_of_the_step(tmp_path: Path) -> None:
    with serving(rows__jsonl=row("b")) as served:
        typed = f"sft.data.path='{served.url}/rows.jsonl'"
        first, again = (settled_rows(tmp_path, [], typed) for _ in range(2))
        served.files["/rows.jsonl"] = row("other")
        changed = settled_rows(tmp_path, [], typed)
    before, same, after = (step_config(config, STAGES[Step.sft]) for config in (first, again, changed))
    assert list(differing(before, same)) == []
    assert [key for key, _, _ in differing(before, after)] == ["sft.data.path"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("http://127.0.0.1:1/rows.zip", "rows.zip is not a known kind of file"),
        ("ftp://example.org/rows.jsonl", "rows cannot be fetched from ftp://"),
        ("http://example.org/rows.jsonl", "would come unencrypted from example.org"),
        ("https:///rows.jsonl", "is no URL"),
    ],
)
def test_what_cannot_be_fetched_is_named_by_its_key(tmp_path: Path, path: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"sft\.data\.path={re.escape(path)}") as error:
        settled_rows(tmp_path, [], f"sft.data.path='{path}'")
    assert said in error.value.message


def test_the_ledger_says_where_fetched_rows_are_from(tmp_path: Path) -> None:
    with serving(rows__jsonl=row("b") + row("c")) as served:
        config = settled_rows(tmp_path, [], f"sft.data.path='{served.url}/rows.jsonl'")
    reader = Reader(config.sft.data, DEMONSTRATIONS, StageSplit({}, "sft", 0), 0, report=lambda line: None)
    assert len(list(reader.rows())) == 2
    assert [entry.path for entry in reader.ledger.sources] == [f"{served.url}/rows.jsonl"]
