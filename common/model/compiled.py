"""Decoder layers through torch.compile: norms, rotary embeddings and activations become few kernels.

On a GPU those small operations move more bytes than the matrix products between them. Each layer is
compiled for itself, and layers of one kind share a graph. Packed attention is in it and takes the bounds of
documents as tensors, so that batches differ in numbers only: a graph for the first shape, one for all others.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from common.compiling import why_not_compiled
from common.config import ModelConfig
from common.errors import UserError
from common.model.one_by_one import decoder_of, reason_of
from common.notices import notice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRAPHS = 32
"""Of one kind of layer, at most: with and without gradients, dropout, prefixes; of one shape and of any."""
NOT_COMPILED, SLOWER = "layers are not compiled", "by bytes and operations 19 to 30 % slower"


def settled(model: ModelConfig, device: torch.device, zero_stage: int) -> ModelConfig:
    """`model` with a `compile` that is true or false: where it is null, true on a GPU that gains by it.

    A notice says why a GPU's layers are not compiled.
    """
    if model.compile is not None or device.type != "cuda":
        return replace(model, compile=bool(model.compile))
    why = _why_not(model, zero_stage)
    if why is not None:
        notice(NOT_COMPILED, why, SLOWER)
    return replace(model, compile=why is None)


def _why_not(model: ModelConfig, zero_stage: int) -> str | None:
    from torch.utils._triton import has_triton_package

    if (why := why_not_compiled(model, zero_stage)) is not None:
        return why
    if not has_triton_package():
        return "triton is not installed"
    return None if any(map(shutil.which, ("cc", "gcc", "clang"))) else "there is no C compiler"


def compile_layers(network: PreTrainedModel) -> None:
    """From the next pass on; nothing runs here. UserError where there is no list of layers."""
    if reason := reason_of(network):
        notice(NOT_COMPILED, f"documents run one by one: {reason}")
        return
    layers: Any = getattr(decoder_of(network), "layers", None)
    if layers is None:
        raise UserError(
            f"model_type={network.config.model_type} has no list of layers to compile",
            hint="set model.compile=false",
        )
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    for layer in layers:
        layer.compile()
