"""Steps that keep what their live model said when it was exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def keep_live(config: str, answers: str, **more: Any) -> None:
    """When this process exports, save live_<answers>.pt beside `config`: {probe, <answers>} and `more`.

    answers: logits, of a policy; scores, of a reward model.
    """
    import torch

    from common.training import session
    from common.training.export_check import Probe

    export = session.export_model

    def keeping(model: Any, weights: Any, tokenizer: Any, folder: Path, probe: Probe, **kwargs: Any) -> Path:
        asked = probe.documents[0][None] if answers == "logits" else probe.documents
        live = {"probe": asked, answers: probe.answer, **more}
        torch.save(live, Path(config).parent / f"live_{answers}.pt")
        return export(model, weights, tokenizer, folder, probe, **kwargs)

    session.export_model = keeping


def sft_with_live_logits(config: str) -> int:
    """`python -m step1_sft --config CONFIG`; saves live_logits.pt."""
    from tests.forked import sft

    keep_live(config, "logits")
    return sft(config)
