"""A configuration as a user types it, and what is said when it is wrong."""

from __future__ import annotations

import pytest

from common.errors import UserError
from pipeline.compose import (
    compose,
    prepare,
)
from pipeline.config import PipelineConfig

JOB = ("model.path=org/name", "sft.data.path=rows.jsonl")


def composed(*overrides: str) -> PipelineConfig:
    return compose(prepare(overrides).overrides)


def error_of(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        composed(*overrides)
    return str(caught.value)
