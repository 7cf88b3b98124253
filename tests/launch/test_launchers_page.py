"""docs/launchers.md says only what works: its settings exist, its commands compose, its files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from common.launch_config import LaunchConfig
from pipeline.compose import compose, prepare

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
README = (LAUNCH.parent / "docs" / "launchers.md").read_text()
COMMANDS = re.findall(r"^    (?:\$ )?python -m pipeline run ((?:[^\n]*\\\n)*[^\n]*)$", README, re.MULTILINE)


def test_every_setting_exists() -> None:
    keys = set(re.findall(r"launch\.((?:slurm\.|k8s\.)?[a-z_]+)", README))
    assert len(keys) >= 20
    for key in keys:
        node: object = LaunchConfig()
        for part in key.split("."):
            assert hasattr(node, part), key
            node = getattr(node, part)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda text: text.split("launch")[1][:20])
def test_every_command_composes(command: str) -> None:
    words = [word for word in shlex.split(command.replace("\\\n", " ")) if word != "..."]
    assert compose(prepare([*words, "experiment=demo"]).overrides).launch.nnodes in (1, 2)


def test_the_commands_and_files_are_there() -> None:
    assert len(COMMANDS) == 5
    files = set(re.findall(r"`([a-z]+\.py)`", README))
    assert len(files) >= 8 and all((LAUNCH / name).exists() for name in files)
