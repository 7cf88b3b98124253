"""The last layer's feed-forward network computed only at the positions whose hidden state is read.

Nothing comes after the last layer but the head, so at other positions its feed-forward network does nothing
that counts: skipping it changes no number and saves most of a layer. Takes a transformers decoder; the
positions are set for one forward pass. What a model's layers are like is asked by running a few tokens; where
the answer is not clear, everything is computed.
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


class LastLayer:
    """A model's last layer. With `only(rows)` its feed-forward network is computed at those positions.

    found: whether the model has such a network. works: whether positions can be left out.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._rows: torch.Tensor | None = None
        self._length = 0
        network = _feed_forward(model)
        self.found = network is not None
        self.works = network is not None and not _runs_layers_its_own_way(model)
        self._hooks = []
        if self.works and network is not None:
            self._hooks = [
                network.register_forward_pre_hook(self._select),
                network.register_forward_hook(self._put_back),
            ]

    @contextmanager
    def only(self, rows: torch.Tensor) -> Iterator[None]:
        """While the block runs, hidden states are right at `rows` (int64 [M], indices into N) and nowhere
        else; all are right where that cannot be had."""
        if not self.works:
            yield
            return
        self._rows = rows.unique()  # a position that is read twice is computed once
        try:
            yield
        finally:
            self._rows = None

    def give_up(self) -> None:
        """Compute everything from now on, and leave no trace in the model."""
        self.works = False
        for hook in self._hooks:
            hook.remove()

    def _select(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._rows is None:
            return None
        hidden, *rest = arguments
        self._length = hidden.shape[1]
        return (hidden.index_select(1, self._rows), *rest)

    def _put_back(self, module: nn.Module, arguments: tuple[Any, ...], result: Any) -> Any:
        if self._rows is None:
            return None
        whole = result.new_zeros((result.shape[0], self._length, *result.shape[2:]))
        return whole.index_copy(1, self._rows, result)


def _feed_forward(model: PreTrainedModel) -> nn.Module | None:
    layers = getattr(decoder_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    network = getattr(layers[-1], "mlp", None)
    return network if isinstance(network, nn.Module) else None


def _runs_layers_its_own_way(model: PreTrainedModel) -> bool:
    """Recomputed layers run again when the rows are forgotten; compiled ones would be compiled for each
    number of rows; documents one by one are not where the rows say."""
    return reason_of(model) is not None or any(
        getattr(module, "gradient_checkpointing", False) or module._compiled_call_impl is not None
        for module in model.modules()
    )
