"""The dashboard on W&B has the report's charts, in the chain's order, or says what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.tracking_config import artifact_name
from pipeline import dashboard
from pipeline.config import PROJECT
from pipeline.report.curves import MAIN
from pipeline.report.page import TITLES
from tests.fake_wandb import FakeWandb, running
from tests.pipeline.report_runs import make_run

KEY = "0123456789abcdef0123456789abcdef01234567"
needs_library = pytest.mark.skipif(
    dashboard.find_spec("wandb_workspaces") is None, reason="needs the extra dashboard"
)


def typed(server: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`dashboard ...` in a process of its own: W&B's service lives as long as the process."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    paths = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ |= {"PYTHONPATH": paths, "HOME": str(folder), "WANDB_BASE_URL": server, "WANDB_API_KEY": KEY}
    command = [sys.executable, "-m", "pipeline", "dashboard", *map(str, arguments)]
    return subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeWandb, list[str]]]:
    folder = tmp_path_factory.mktemp("dashboard")
    run = make_run(folder / "my run", iterations=4, count=4)
    with running() as server:
        done = typed(server.url, folder, "rlhf", "--run", run, "--sweep", "sft.optim.lr")
        assert (done.returncode, done.stderr) == (0, "")
        yield server, done.stdout.splitlines()


def spec_of(server: FakeWandb, kind: str) -> dict[str, Any]:
    (view,) = [view for view in server.views if view["type"] == kind]
    return dict(json.loads(view["spec"]))


def panels_of(saved: tuple[FakeWandb, list[str]]) -> dict[str, list[dict[str, Any]]]:
    sections = spec_of(saved[0], "project-view")["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


@needs_library
def test_a_workspace_and_a_report_are_saved_and_their_addresses_said(
    saved: tuple[FakeWandb, list[str]],
) -> None:
    server, said = saved
    assert [(view["entityName"], view["projectName"]) for view in server.views] == [("entity", "rlhf")] * 2
    assert [line.split()[0] for line in said] == ["workspace", "report"]
    assert all(line.split()[1].startswith(f"{server.url}/entity/rlhf") for line in said)


@needs_library
def test_sections_are_in_the_order_of_the_chain(saved: tuple[FakeWandb, list[str]]) -> None:
    found = list(panels_of(saved))
    steps = [TITLES[step] for step in ("sft", "reward", "ppo")]  # those of the run
    assert found == ["Before and after", *steps, "Samples", "Data", "Lineage", "Sweeps", "Systems"]
    blocks = spec_of(saved[0], "runs")["blocks"]
    headings = [
        "".join(child["text"] for child in block["children"])
        for block in blocks
        if block["type"] == "heading"
    ]
    assert headings == found


@needs_library
def test_charts_have_the_titles_and_metrics_of_the_report(saved: tuple[FakeWandb, list[str]]) -> None:
    panels = panels_of(saved)
    for step in ("sft", "reward", "ppo"):
        drawn = [
            (panel["config"]["chartTitle"], panel["config"]["metrics"], panel["config"]["xAxis"])
            for panel in panels[TITLES[step]]
        ]
        assert drawn == [
            (plan.title, [f"{step}/{metric}" for metric in plan.lines], f"{step}/step") for plan in MAIN[step]
        ]
    before = [panel["config"]["metrics"] for panel in panels["Before and after"]]
    assert before[0] == ["ppo/eval/gold", "ppo/eval/greedy/gold"]  # the run's own evaluation
    assert ["reward/eval/accuracy"] in before and ["sft/eval/loss"] in before


@needs_library
def test_sweeps_samples_and_lineage_name_what_the_tracker_sends(saved: tuple[FakeWandb, list[str]]) -> None:
    panels = panels_of(saved)
    coordinates = panels["Sweeps"][0]["config"]["columns"]
    assert [column["accessor"] for column in coordinates] == [
        "config:sft.value.optim.lr", "config:seed.value", "summary:sft/eval/loss",
    ]  # fmt: skip
    for section, names in {
        "Samples": ["sft/samples", "ppo/samples"],
        "Data": ["sft/ledger", "reward/ledger", "ppo/ledger"],
        "Lineage": [artifact_name("my run", step) for step in ("sft", "reward", "ppo")],
    }.items():
        for panel, name in zip(panels[section], names, strict=True):
            assert f'"{name}"' in json.dumps(panel), (section, name)
    assert artifact_name("my run", "sft") == "my-run-sft"


@needs_library
def test_a_project_that_is_not_there_is_said_with_a_way_out(tmp_path: Path) -> None:
    with running() as server:
        done = typed(server.url, tmp_path, "elsewhere")
        assert done.returncode == 2 and server.views == []
    assert "'entity/elsewhere' not found" in done.stderr and "--entity NAME" in done.stderr
    assert KEY not in done.stdout + done.stderr and "Traceback" not in done.stderr


@needs_library
def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(dashboard, "within", hang)
    with pytest.raises(UserError, match="did not answer within 60 s"):
        dashboard.dashboard_verb([])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs wandb-workspaces") as caught:
        dashboard.dashboard_verb(["rlhf"])
    assert "pip install" in str(caught.value.hint)
    monkeypatch.setattr(dashboard, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="there is no W&B key for https://api.wandb.ai"):
        dashboard.dashboard_verb(["rlhf"])
    with pytest.raises(UserError, match="no such folder"):
        dashboard.dashboard_verb(["--run", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="--sweep lr is no setting of a step"):
        dashboard.dashboard_verb(["--sweep", "lr"])
