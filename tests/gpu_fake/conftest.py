from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu_fake import guard
from tests.gpu_fake.jobs import Fake

LONGEST_FIRST = ("memory", "ppo", "sft", "mutations", "preferences", "decoding", "kernels")
"""Files in the order in which two workers, each of which takes the next one, end at about the same time."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files here; those without a place come first."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST_FIRST)}
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    in_order = iter(sorted(here, key=lambda item: places.get(item.path.stem, -1)))
    items[:] = [next(in_order) if item.path.parent == Path(__file__).parent else item for item in items]


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    """The fake device, for all cases of a worker: what it needs is made and imported once."""
    if guard.compiler() is None:
        pytest.skip("no g++: the CUDA path is not run")
    folder: Path = tmp_path_factory.mktemp("gpu_fake")
    made = Fake(folder)
    yield made
    made.close()
