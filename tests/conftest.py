from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_is_no_garbage() -> Iterator[None]:
    """Collecting garbage looks at all there is: torch's modules would make composing half as slow again."""
    gc.collect()
    gc.freeze()
    yield
