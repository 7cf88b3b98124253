from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu_fake import guard
from tests.gpu_fake.jobs import Fake


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    """The fake device, for the cases of a file."""
    if guard.compiler() is None:
        pytest.skip("no g++: the CUDA path is not run")
    folder: Path = tmp_path_factory.mktemp("gpu_fake")
    made = Fake(folder)
    yield made
    made.close()
