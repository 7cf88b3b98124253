"""Models that take packed documents, made as a step makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from common.model.packed import PackedCausalLM
    from common.model.scalar_head import PackedScalarModel


def packed_lm(model: nn.Module) -> PackedCausalLM:
    """Around a causal LM of transformers."""
    from common.model.packed import PackedCausalLM
    from common.model.probes import find_shortcuts

    return PackedCausalLM(model, find_shortcuts(model))


def packed_scorer(model: nn.Module) -> PackedScalarModel:
    """Around a sequence classifier with one label."""
    from common.model.probes import find_shortcuts
    from common.model.scalar_head import PackedScalarModel

    return PackedScalarModel(model, find_shortcuts(model))
