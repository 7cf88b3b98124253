"""Several runs on one page: what differs, what each came to, the same prompts side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from pipeline import state
from pipeline.report import report
from pipeline.report.comparison import Side, compare
from pipeline.report.files import SampleRow, read_run
from pipeline.report.glance import at_a_glance
from pipeline.report.several import differences, final_numbers, mark_of, short_names
from pipeline.report.verb import report_options, report_verb, watch
from tests.pipeline.report_runs import make_run, write_lines, write_state
from tests.pipeline.test_report import NASTY, Page


def with_settings(run: Path, **changed: Any) -> Path:
    config = json.loads((run / "resolved.yaml").read_text())
    (run / "resolved.yaml").write_text(json.dumps({**config, **changed}))
    return run


def page(*runs: Path) -> Page:
    return Page(report(*runs).read_text(encoding="utf-8"))


def test_a_page_of_several_runs_lies_beside_them_or_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run(tmp_path / name, ("sft",)) for name in ("one", "two")]
    assert report(*runs) == tmp_path / "report.html"
    assert report(*runs, out=tmp_path / "other.html") == tmp_path / "other.html"
    assert report(runs[0]) == runs[0] / "report.html"
    monkeypatch.chdir(tmp_path / "one")
    assert report(runs[0], make_run(tmp_path / "elsewhere" / "three", ("sft",))) == Path("report.html")


def test_runs_of_different_steps_share_a_page(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", iterations=6, count=12)
    failed = make_run(tmp_path / "failed", ("sft",))
    write_state(failed / "sft", "failed", exit_status=1)
    found = page(whole, failed, make_run(tmp_path / "preferences", ("dpo",)))
    assert [name for name in ("sft", "reward", "dpo", "ppo") if name in found.ids] == [
        "sft", "reward", "dpo", "ppo",
    ]  # fmt: skip
    for said in ("3 runs", "A whole", "B failed", "C preferences", "exit status 1", "so far: B"):
        assert said in found.text, said
    assert len(found.ids) == len(set(found.ids)) and set(found.references) <= set(found.ids)
    assert "script" not in found.tags


def test_nothing_that_several_runs_say_is_taken_for_markup(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, ("sft",), name=NASTY + name) for name in ("one", "two")]
    with_settings(runs[0], seed=NASTY)
    rows = [{"step": 300, "prompt": NASTY, "completion": NASTY, "scores": {NASTY: 1}}]
    for run in runs:
        write_lines(run / "sft" / "samples.jsonl", rows)
    found = page(*runs)
    assert "script" not in found.tags and "img" not in found.tags and found.text.count(NASTY) > 6


def test_settings_that_differ_are_those_of_runs_that_have_them(tmp_path: Path) -> None:
    one = with_settings(make_run(tmp_path / "one"), seed=1, launch={"nproc_per_node": 2}, output_dir="a")
    other = with_settings(make_run(tmp_path / "two", ("sft",)), seed=2, launch={"nproc_per_node": 4})
    sources = [{"path": "sft.jsonl", "weight": 2.0}]
    config = json.loads((other / "resolved.yaml").read_text())
    with_settings(other, sft={**config["sft"], "data": {"sources": sources}})
    found = {row.key: row.values for row in differences([read_run(one), read_run(other)])}
    assert found == {
        "seed": ["1", "2"],
        "steps": ["[sft,reward,ppo]", "[sft]"],
        "launch.nproc_per_node": ["2", "4"],
    }
    third = with_settings(make_run(tmp_path / "three", ("sft",)), sft={"data": {"sources": [{"path": "x"}]}})
    found = {row.key: row.values for row in differences([read_run(one), read_run(third)])}
    assert found["sft.data.sources[0].path"] == ["sft.jsonl", "x"]


def test_equal_settings_are_said_to_be_equal(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, ("sft",)) for name in ("one", "two")]
    assert differences([read_run(run) for run in runs]) == []
    assert "settings, inputs and versions are the same in all of them" in page(*runs).text


def test_a_difference_is_paired_by_prompt_where_the_prompts_are_the_same(tmp_path: Path) -> None:
    def rewarded(name: str, values: list[float], asked: str = "p") -> Path:
        run = make_run(tmp_path / name, ("ppo",))
        mean = sum(values) / len(values)
        rows = [
            {"step": 40, "prompt": f"{asked}{i}", "completion": "x", "mode": "sampled", "reward": value}
            for i, value in enumerate(values)
        ]
        write_lines(run / "ppo" / "samples.jsonl", rows)
        write_lines(run / "ppo" / "metrics.jsonl", [{"step": 40, "eval/reward": mean}])
        return run

    runs = [
        rewarded("a", [0.0, 1.0, 2.0, 3.0]),
        rewarded("b", [1.0, 2.0, 3.0, 4.2]),
        rewarded("c", [9.0, 9.0], "q"),
    ]
    files = [read_run(run) for run in runs]
    (row,) = final_numbers(files, [at_a_glance(run).table for run in files])
    assert [number and number.value for number in row.numbers] == ["1.50", "2.55", "9.00"]
    # changes 1, 1, 1 and 1.2: mean 1.05, standard error 0.05, t(3) = 3.182
    assert [number and number.above_first for number in row.numbers] == ["", "+1.05 (+0.89 to +1.21)", ""]


@pytest.mark.parametrize("changed", [{"rewards": [{"function": "a:b"}]}, {"missing_eos_penalty": 2.0}])
def test_rewards_in_different_units_are_not_compared(tmp_path: Path, changed: dict[str, Any]) -> None:
    runs = []
    for factor, name in enumerate("ab", start=1):
        run = make_run(tmp_path / name, ("ppo",))
        rows = [
            {"step": 40, "prompt": f"p{i}", "completion": "x", "mode": "sampled", "reward": i * factor}
            for i in range(4)
        ]
        write_lines(run / "ppo" / "samples.jsonl", rows)
        write_lines(run / "ppo" / "metrics.jsonl", [{"step": 40, "eval/reward": 1.5 * factor}])
        runs.append(run)

    def said() -> list[str]:
        files = [read_run(run) for run in runs]
        (row,) = final_numbers(files, [at_a_glance(run).table for run in files])
        return [number.above_first if number else "" for number in row.numbers]

    assert said()[1].startswith("+1.50")
    config = json.loads((runs[1] / "resolved.yaml").read_text())
    with_settings(runs[1], ppo={**config.get("ppo", {}), **changed})
    assert said() == ["", ""]


def test_prompts_are_the_same_whatever_template_they_are_in() -> None:
    def row(prompt: str, completion: str, reward: float) -> SampleRow:
        return SampleRow(prompt, completion, reward=reward)

    chatml = "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    sides = [
        Side("sft", 5, [row("[INST] How? [/INST]", "thus", 1.0), row("only here", "x", 1.0)], 0),
        Side("dpo", 9, [row("other", "z", 2.0)], 1),
        Side("sft", 7, [row(chatml, "so", 4.0)], 2),
    ]
    found = compare(sides)
    assert found is not None
    (answers,) = found.prompts
    assert [side and side.completion for side in answers.sides] == ["thus", None, "so"]
    assert found.extremes == [answers]
    assert compare(sides[:2]) is None  # they were asked nothing alike


def test_long_names_that_begin_alike_are_told_apart_by_their_ends() -> None:
    assert short_names(["first", "second"]) == ["first", "second"]
    assert short_names([f"sft-smollm2-mixture-of-many-{end}" for end in ("1a2b", "3c4d")]) == [
        "…1a2b", "…3c4d",
    ]  # fmt: skip
    (short, _) = short_names(["x" * 40 + "end", "y"])
    assert len(short) == 24 and short.endswith("end") and "…" in short
    assert [mark_of(index) for index in (0, 25, 26, 53)] == ["A", "Z", "A2", "B3"]


def test_a_run_named_twice_or_not_at_all_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("sft",))
    with pytest.raises(UserError, match="is named twice"):
        report(run, tmp_path / "." / "run")
    with pytest.raises(UserError, match="no such folder"):
        report(run, tmp_path / "nowhere")
    with pytest.raises(UserError, match="arguments are required"):
        report_options([])
    assert report_options([str(run), str(report(run))]).runs == [run]  # runs/* names the page as well


# --- a run that goes on -------------------------------------------------------------------------------


@pytest.fixture
def running(tmp_path: Path) -> Path:
    """A run of two steps, between them."""
    run = make_run(tmp_path / "run", ("sft",))
    with_settings(run, steps=["sft", "dpo"])
    (run / ".lock").write_text(state._holder(os.getpid()))
    return run


def test_a_page_of_a_run_that_goes_on_loads_itself_anew(running: Path) -> None:
    assert 'http-equiv="refresh"' in report(running).read_text()
    write_state(running / "dpo", "running")
    assert 'http-equiv="refresh"' in report(running).read_text()
    for ended in ("done", "failed", "stopped"):
        write_state(running / "dpo", ended)
        assert 'http-equiv="refresh"' not in report(running).read_text()


def test_a_run_that_is_watched_is_written_anew_until_it_has_ended(running: Path) -> None:
    said: list[str] = []
    seen: list[str] = []

    def next_event(_: float) -> None:
        seen.append((running / "report.html").read_text())
        write_state(running / "dpo", "running" if len(seen) == 1 else "done")

    report(running)
    watch([running], None, said.append, pause=next_event)
    assert [text.count("going on") > 0 for text in seen] == [False, True]
    assert said[-1] == "the run has ended: the page is final"
    assert "refresh" not in (running / "report.html").read_text()


def test_watching_a_run_that_has_ended_ends_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    assert report_verb([str(make_run(tmp_path / "run", ("sft",))), "--watch"], say=said.append) == 0
    assert said[1:] == ["no run goes on: the page is final"]


def test_a_watched_run_whose_process_is_killed_has_ended(running: Path, dead_process: int) -> None:
    write_state(running / "dpo", "running")
    said: list[str] = []

    def kill(_: float) -> None:
        (running / ".lock").write_text(state._holder(dead_process))

    watch([running], None, said.append, pause=kill)
    assert "interrupted" in (running / "report.html").read_text()


@pytest.fixture
def dead_process() -> int:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    return gone.pid


def test_a_page_is_written_over_nothing_that_is_no_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", ("sft",))
    kept = (run / "resolved.yaml").read_text()
    with pytest.raises(UserError, match="is no name of a page") as error:
        report(run, out=run / "resolved.yaml")
    assert error.value.hint == f"--out {run / 'resolved.html'}"
    assert (run / "resolved.yaml").read_text() == kept
