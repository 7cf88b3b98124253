"""Which networks a rank cannot load in parts under ZeRO-3, as far as their settings say it.

Takes a `ModelConfig`, returns the reason in words; imports nothing heavy, so that `plan` asks what the ranks
ask. What only the class of a network tells is found when it is loaded.
"""

from __future__ import annotations

from common.config import ModelConfig, Quantize


def why_whole(model: ModelConfig) -> str | None:
    """Why every rank has to make the whole network first; None where it loads its own part alone."""
    if model.quantize is Quantize.nf4:
        return "model.quantize=nf4 rounds whole tensors"
    if model.lora.enabled and model.lora.dora:
        return "model.lora.dora=true measures whole rows"
    if model.trust_remote_code:
        return "model.trust_remote_code=true runs code that may ask for all of them"
    return None
