"""Tests of the vllm tier: `make vllm`, in an environment of its own. Elsewhere they are skipped and named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.runtime.distributed import close_world, init_world
from common.vllm_fit import fits, installed_vllm
from tests.runs import Base
from tests.step3_ppo.runs import Artifacts, make_artifacts

WIDTHS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""vLLM has no attention on the CPU for heads of fewer than 32 numbers."""


@pytest.fixture(scope="session", autouse=True)
def there() -> Iterator[None]:
    """vLLM; and a key for servers, set before the first rank is forked."""
    found = installed_vllm()
    if found is None or not fits(found[1]):
        pytest.skip("no vLLM 0.32 here: make vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "of these tests")
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.make(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def artifacts(base: Base, folder: Path) -> Artifacts:
    """A policy and a reward model for PPO."""
    return make_artifacts(folder, base.tokenizer, **WIDTHS)


@pytest.fixture(scope="session")
def world(monkeypatch_session: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as a world of one, as a rank has it before vLLM is made, which keeps to the first."""
    monkeypatch_session.setenv("CUDA_VISIBLE_DEVICES", "")
    init_world()
    yield
    close_world()


@pytest.fixture(scope="session")
def monkeypatch_session() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            if name in os.environ:
                patch.delenv(name)
        yield patch
