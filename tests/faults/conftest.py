from __future__ import annotations

import pytest

from tests.runs import Base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Rows and a tokenizer, shared by the runs of all fault tests."""
    return Base.make(tmp_path_factory.mktemp("faults"))
