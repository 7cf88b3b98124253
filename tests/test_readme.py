"""The README and docs/ say only what works: their commands compose, their targets and paths exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipeline.chat import parse
from pipeline.compose import compose, jobs_of, prepare
from pipeline.dashboard import dashboard_options
from pipeline.evaluate import evaluate_options
from pipeline.export import export_options
from pipeline.generate import generate_options
from pipeline.reference import explain
from pipeline.report.verb import report_options
from pipeline.sources import import_options

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES if page.name != "launchers.md")  # has a test of its own
COMMANDS = re.findall(r"^    (?:\$ )?python -m pipeline (\w+)([^\n]*)$", TEXT, re.MULTILINE)
TARGETS = re.findall(r"^    (?:\$ )?make (\w+)", TEXT, re.MULTILINE)


def test_the_commands_were_found() -> None:
    assert len(COMMANDS) >= 4
    assert {"demo", "test"} <= set(TARGETS)


@pytest.mark.parametrize(("verb", "rest"), COMMANDS, ids=lambda text: text.strip()[:40])
def test_every_command_composes(verb: str, rest: str) -> None:
    arguments = shlex.split(rest, comments=True)
    if verb == "chat":
        assert parse(arguments).path
        return
    if verb == "generate":
        assert generate_options(arguments)[0].prompts
        return
    if verb == "evaluate":
        assert evaluate_options(arguments)[0].data
        return
    if verb == "verify":
        assert len(arguments) == 1
        return
    if verb == "report":
        assert report_options(arguments).runs
        return
    if verb == "explain":
        assert explain(arguments[0])
        return
    if verb == "export":
        assert export_options(arguments).path
        return
    if verb == "import":
        assert import_options(arguments).model
        return
    if verb == "dashboard":
        assert dashboard_options(arguments).project
        return
    if verb == "doctor":
        assert not arguments
        return
    assert verb in ("run", "preview", "plan")
    swept = "-m" in arguments
    prepared = prepare([argument for argument in arguments if argument != "-m"], multirun=swept)
    for job in jobs_of(prepared.overrides) if swept else [prepared.overrides]:
        config = compose(job)
        steps = [getattr(config, step.value) for step in config.steps]
        assert steps and all(step.data.all_sources() for step in steps)


@pytest.mark.parametrize("target", sorted(set(TARGETS)))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_linked_or_captioned_path_exists() -> None:
    linked = [
        (page.parent / link) for page in PAGES for link in re.findall(r"\]\(([\w./]+)\)", page.read_text())
    ]
    assert [str(path) for path in linked if not path.exists()] == []
    tree = README.split("## The tree")[1]
    named = re.findall(r"(?:^|  )([a-z0-9_]+(?:/|\.py))", tree, re.MULTILINE)
    assert len(linked) >= 2 and len(named) >= 15
    folders = [ROOT, ROOT / "common"]
    missing = [n for n in named if not any((folder / n).exists() for folder in folders)]
    assert missing == []


def test_every_key_of_the_configuration_table_exists() -> None:
    table = README.split("## Configuration")[1].split("## Where to go next")[0]
    keys = re.findall(r"`((?:model|sft|ppo|launch|tracking)(?:\.\w+)+)", table)
    assert len(keys) >= 10
    config = compose([])
    for key in keys:
        node: object = config
        for part in key.split("."):
            assert hasattr(node, part), key
            node = getattr(node, part)
