"""Rows that lie elsewhere: settled as files here before anything reads them, and named in the ledger."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from common import hub_data
from common.data.dataset_types import DEMONSTRATIONS
from common.data.reader import Reader
from common.data.stages import StageSplit
from common.errors import UserError
from common.stage import Step
from pipeline.compose import compose, prepare
from pipeline.plan import STAGES
from pipeline.rows import settle_rows
from pipeline.sources import settle_sources
from pipeline.state import differing, step_config, write_state
from tests import fake_data_hub
from tests.fake_data_hub import NAME
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


def test_a_streamed_data_set_of_the_hub_is_settled_as_the_commit_that_the_run_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ("run_name=r", "sft.data.streaming=true", "sft.data.eval_fraction=0", "sft.train.max_steps=3")
    said: list[str] = []
    with fake_data_hub.asked(monkeypatch, tmp_path) as hub:
        hub.files["rows.jsonl"] = row("b")
        first = hub.commit()
        config = settled_rows(tmp_path, said, *typed, f"sft.data.path={NAME}")
        (source,) = config.sft.data.sources
        assert (source.path, source.revision, config.sft.data.path) == (NAME, first, None)
        assert said == [f"sft.data: {NAME} is streamed at its commit {first}"]
        state = {"status": "running", "config": step_config(config, STAGES[Step.sft]), "inputs": {}}
        write_state(tmp_path / "runs" / "r" / "sft", state)
        hub.files["rows.jsonl"] = row("other")
        hub_data.commit_of.cache_clear()
        again = settled_rows(tmp_path, said, *typed, f"sft.data.path={NAME}")
        assert again.sft.data == config.sft.data and said[-1].endswith(", with which this run began")
        # another run, one that starts over, and a branch that is named take what is there now
        branch = f"sft.data.sources=[{{path: {NAME}, revision: main}}]"
        for other in (("run_name=s",), ("force=true",), ()):
            named = branch if not other else f"sft.data.path={NAME}"
            (moved,) = settled_rows(tmp_path, said, *typed, named, *other).sft.data.sources
            assert moved.revision == hub.commit() != first
        before = hub.requests
        pinned = f"sft.data.sources=[{{path: {NAME}, revision: {first}}}]"
        assert settled_rows(tmp_path, said, *typed, pinned).sft.data == config.sft.data
        assert settled_rows(tmp_path, said, f"sft.data.path={NAME}").sft.data.path == NAME
        assert hub.requests == before
    with pytest.raises(
        UserError, match=r"sft\.data\.sources\[0\]\.path=me/other: no such file here, and the hub"
    ):
        settled_rows(tmp_path, said, *typed, "sft.data.path=me/other")


@pytest.mark.parametrize("key", ["dpo.data", "reward.data", "ppo.data", "ppo.ptx_data"])
def test_streaming_of_another_step_is_refused_before_a_model_or_the_hub_is_looked_for(
    tmp_path: Path, key: str
) -> None:
    step = key.partition(".")[0]
    typed = [
        f"steps=[{step}]",
        f"{step}.policy=no/model",
        f"{key}.streaming=true",
        f"{step}.data.path=no/rows",
    ]
    typed += ["ppo.reward_model=no/other"] if step == "ppo" else []
    config = compose(prepare([*typed, f"output_dir={tmp_path}/runs"]).overrides)
    with pytest.raises(UserError, match=rf"{key}.streaming=true .*\n.*{key}.streaming=false"):
        settle_sources(config)
