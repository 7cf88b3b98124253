"""Whether the output folder can be written, and whether a run fits onto its disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from common.config import Dtype, ModelConfig
from common.errors import UserError
from pipeline.config import PipelineConfig

SMALLEST_DISK = 64 * 2**20
"""Bytes that must be free for any run: logs, metrics and a tokenized cache."""


def check_disk(config: PipelineConfig, models: Sequence[ModelConfig]) -> None:
    """The output folder can be written, and one checkpoint and the export fit.

    models: those that the step trains, as far as their sizes are known; the first one is exported.
    """
    folder = Path(config.output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not existing.is_dir():
        raise UserError(f"output_dir={folder}: {existing} is not a folder", hint="output_dir=ANOTHER_FOLDER")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir={folder}: {existing} cannot be written (read-only, or not yours)",
            hint="output_dir=ANOTHER_FOLDER",
        )
    free, needed = shutil.disk_usage(existing).free, disk_needed(models, config.deepspeed.stage)
    if free < needed:
        has, wants = f"{free / 2**30:.2f} GiB", f"{needed / 2**30:.2f} GiB"
        raise UserError(
            f"output_dir={folder}: {has} are free, about {wants} are needed",
            hint="free some space, or output_dir=FOLDER_ON_ANOTHER_DISK",
        )


def disk_needed(models: Sequence[ModelConfig], zero_stage: int = 1) -> int:
    """Bytes for a checkpoint of local models and the export of the first; a constant where sizes are unknown.

    A full checkpoint holds the weights and three fp32 numbers for each (the optimizer's own copy
    and two moments); with adapters only the export counts, on ZeRO-3 with what they are merged into.
    """
    needed = SMALLEST_DISK
    for index, model in enumerate(models):
        if model.path is None or not Path(model.path).is_dir():
            continue
        weights = sum(file.stat().st_size for file in Path(model.path).glob("*.safetensors"))
        beside = int(zero_stage == 3 and index == 0)
        copies = beside if model.lora.enabled else 4 if model.dtype is Dtype.fp32 else 7
        needed += weights * (copies + (index == 0))
    return needed
