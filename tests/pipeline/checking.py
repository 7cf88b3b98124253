"""A configuration that passes every check, and what `checks` says of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import DataConfig, Dtype, ModelConfig, TokenizerConfig
from common.errors import UserError
from launch import local
from pipeline import checks
from pipeline.config import PipelineConfig

LLAMA = {"model_type": "llama", "max_position_embeddings": 256}


def config_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    """A configuration that passes every check, with its rows in `folder`, which is the working directory."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(local, "count_gpus", lambda: 0)
    (folder / "rows.jsonl").write_text("{}\n")
    config = PipelineConfig(
        model=ModelConfig(config=dict(LLAMA), tokenizer=TokenizerConfig(None, 512), dtype=Dtype.bf16)
    )
    config.sft.data = DataConfig(path="rows.jsonl", max_length=256)
    checks.check(config, ranks=2)
    return config


def error_of(config: PipelineConfig, ranks: int = 1) -> UserError:
    with pytest.raises(UserError) as caught:
        checks.check(config, ranks)
    assert caught.value.hint
    return caught.value
