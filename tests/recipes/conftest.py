from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import Base
from tests.step3_ppo.runs import Artifacts, make_artifacts


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Rows and a tokenizer, shared by the runs of all recipe tests."""
    return Base.make(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of a module lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def artifacts(base: Base, folder: Path) -> Artifacts:
    """A policy and a reward model for PPO."""
    return make_artifacts(folder, base.tokenizer)
