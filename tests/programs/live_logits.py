"""The SFT step, keeping what its live model said when it was exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def sft_with_live_logits(config: str) -> int:
    """`python -m step1_sft --config CONFIG`; saves {probe, logits} of the first rank."""
    import torch

    from step1_sft import train
    from tests.forked import sft

    export = train.export_policy

    def keeping(*args: Any, **kwargs: Any) -> Path:
        kept = {"probe": kwargs["probe"], "logits": kwargs["live_logits"]}
        torch.save(kept, Path(config).parent / "live_logits.pt")
        return export(*args, **kwargs)

    train.export_policy = keeping
    return sft(config)
