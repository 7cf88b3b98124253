"""Which layers are compiled on a GPU where `model.compile` is null, as far as the settings say it.

Imports nothing heavy, so that `plan` asks what the ranks ask.
"""

from __future__ import annotations

from common.config import ModelConfig
from common.stage import Step

ALONE = (Step.sft, Step.reward)
"""Steps that compare no two passes of a network, which compiled layers round differently."""


def why_not_compiled(model: ModelConfig, zero_stage: int) -> str | None:
    """Why a GPU's layers are left as they are; None where they are compiled."""
    if (setting := model.needs_plain_layers) is not None:
        return f"model.{setting}"
    return "ZeRO-3 fetches weights while a layer runs" if zero_stage == 3 else None
