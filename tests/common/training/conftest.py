from __future__ import annotations

from pathlib import Path

import pytest

from common.training.checkpoint import Checkpoints
from tests.common.training.checkpoints import checkpoints_in, save


@pytest.fixture
def two(tmp_path: Path) -> Checkpoints:
    """Two checkpoints, of steps 10 and 20."""
    checkpoints = checkpoints_in(tmp_path / "checkpoints")
    save(checkpoints, 10)
    save(checkpoints, 20)
    return checkpoints
