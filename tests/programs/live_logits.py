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

    name = "export_policy" if answers == "logits" else "export_reward_model"
    export = getattr(session, name)

    def keeping(*args: Any, **kwargs: Any) -> Path:
        live = {"probe": kwargs["probe"], answers: kwargs[f"live_{answers}"]}
        torch.save({**live, **more}, Path(config).parent / f"live_{answers}.pt")
        return export(*args, **kwargs)

    setattr(session, name, keeping)


def sft_with_live_logits(config: str) -> int:
    """`python -m step1_sft --config CONFIG`; saves live_logits.pt."""
    from tests.forked import sft

    keep_live(config, "logits")
    return sft(config)
