"""A run of a sweep gives its sweeper the number that it is judged by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config import load_resolved
from common.errors import UserError
from common.stage import Step
from pipeline import sweep
from pipeline.compose import compose
from pipeline.config import PipelineConfig
from pipeline.state import config_hash
from pipeline.sweep import objective_of
from tests.pipeline.report_runs import make_run


def config_of(folder: Path, *overrides: str) -> PipelineConfig:
    return compose(["experiment=demo", "run_name=r", f"output_dir={folder}", *overrides])


def write(folder: Path, step: Step, *lines: dict[str, float]) -> None:
    place = folder / "r" / step.value
    place.mkdir(parents=True)
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("text", ["a \U0001f600 b", "1e5", "null", "two\nlines\x7f\u2028"])
def test_a_run_is_given_its_configuration_as_it_is(text: str, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.tracking.project = text
    sweep.write(config, tmp_path / "config.yaml")
    assert load_resolved(tmp_path / "config.yaml", PipelineConfig) == config


def test_by_default_it_is_what_the_last_step_is_measured_by(tmp_path: Path) -> None:
    write(tmp_path, Step.sft, {"loss": 2.0}, {"eval/loss": 3.0}, {"loss": 1.0}, {"eval/loss": 1.5})
    write(tmp_path, Step.ppo, {"eval/reward": 0.1}, {"objective/scores": 0.4}, {"eval/reward": 0.7})
    assert objective_of(config_of(tmp_path, "steps=[sft]")) == 1.5
    assert objective_of(config_of(tmp_path)) == 0.7
    assert objective_of(config_of(tmp_path, "objective=ppo:objective/scores")) == 0.4
    assert objective_of(config_of(tmp_path, "objective=sft:loss")) == 1.0


def test_without_a_held_out_loss_it_is_the_training_loss(tmp_path: Path) -> None:
    write(tmp_path, Step.sft, {"loss": 2.0}, {"loss": 1.0})
    assert objective_of(config_of(tmp_path, "steps=[sft]")) == 1.0
    assert sweep.judged(config_of(tmp_path, "steps=[sft]")) == ("sft:loss", 1.0)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_metric_that_is_no_number_is_an_error_that_lists_those_there_are(
    value: float | None, tmp_path: Path
) -> None:
    write(tmp_path, Step.sft, {"loss": 2.0}, {} if value is None else {"eval/loss": value})
    config = config_of(tmp_path, "steps=[sft]", "objective=sft:eval/loss")
    with pytest.raises(UserError, match="objective=sft:eval/loss is") as caught:
        objective_of(config)
    assert "loss" in (caught.value.hint or "")


@pytest.mark.parametrize("objective", ["loss", "reward:loss", "sft:", "sft"])
def test_an_objective_names_a_step_of_the_run_and_a_metric(objective: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"objective={objective} is not allowed"):
        config_of(tmp_path, "steps=[sft]", f"objective={objective}")


def test_what_is_looked_at_decides_no_result(tmp_path: Path) -> None:
    one, other = (config_of(tmp_path, "steps=[sft]", *more) for more in ((), ("objective=sft:loss",)))
    assert config_hash(one) == config_hash(other)


def ended(folder: Path, objective: float | None, **settings: object) -> sweep.Ended:
    run = make_run(folder, ("sft",))
    config = json.loads((run / "resolved.yaml").read_text())
    (run / "resolved.yaml").write_text(json.dumps({**config, **settings}))
    return sweep.Ended(run, None if objective is None else ("sft:eval/loss", objective))


def test_a_sweep_ends_with_what_differs_what_it_came_to_and_a_page(tmp_path: Path) -> None:
    runs = [ended(tmp_path / "s-1", 1.5, seed=1), ended(tmp_path / "s-2", None, seed=2)]
    said: list[str] = []
    sweep.conclude([*runs, runs[0]], said.append)
    assert said == [
        "run  seed  sft:eval/loss",
        "s-1  1     1.50",
        "s-2  2     did not end well",
        f"report    {tmp_path / 'report.html'}",
    ]
    assert "2 runs" in (tmp_path / "report.html").read_text()


def test_one_run_is_no_sweep_and_a_page_that_cannot_be_made_fails_none(tmp_path: Path) -> None:
    runs = [ended(tmp_path / "s-1", 1.5), ended(tmp_path / "s-2", 2.5)]
    said: list[str] = []
    sweep.conclude(runs[:1], said.append)
    assert said == []
    (tmp_path / "report.html").mkdir()
    sweep.conclude(runs, said.append)
    assert len(said) == 1 and said[0].startswith("warning: no table of the sweep: ")
