"""The last layer's feed-forward network computed only at the positions whose hidden state is read.

Nothing comes after the last layer but the head, so at other positions its feed-forward network does nothing
that counts: skipping it changes no number and saves most of a layer. `probes` finds for which models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from common.model.one_by_one import decoder_of, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE_LAYER = "up to two thirds of a layer more"
"""What it costs to compute everything."""


def feed_forward_of(model: PreTrainedModel) -> nn.Module | None:
    """The last layer's feed-forward network; None where there is none of the usual name."""
    layers = getattr(decoder_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    network = getattr(layers[-1], "mlp", None)
    return network if isinstance(network, nn.Module) else None


def runs_layers_its_own_way(model: PreTrainedModel) -> bool:
    """Recomputed layers run again when the rows are forgotten; compiled ones would be compiled for each
    number of rows; documents one by one are not where the rows say."""
    return reason_of(model) is not None or any(
        getattr(module, "gradient_checkpointing", False) or module._compiled_call_impl is not None
        for module in model.modules()
    )


@contextmanager
def computed_at(network: nn.Module, rows: torch.Tensor, length: int) -> Iterator[None]:
    """While the block runs, `network` is computed at `rows` (int64 [M], different indices into `length`
    positions), and is zero elsewhere."""

    def select(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = arguments
        return (hidden.index_select(1, rows), *rest)

    def put_back(_: nn.Module, arguments: tuple[Any, ...], result: Any) -> Any:
        whole = result.new_zeros((result.shape[0], length, *result.shape[2:]))
        return whole.index_copy(1, rows, result)

    hooks = [network.register_forward_pre_hook(select), network.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
