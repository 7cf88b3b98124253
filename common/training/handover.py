"""The live weights of a model that is trained, one after the other, for an engine that samples with them.

Takes the model and the `Engine` around it; returns names, as the model's files have them, and whole tensors.
Under ZeRO-3 each is gathered when it is asked for: all ranks ask for all of them, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from common.model.adapters import is_adapter
from common.training.engine import Engine


@torch.no_grad()
def whole_weights(engine: Engine, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each parameter and stored buffer, of a PeftModel those of its adapters; a tied one
    comes once.

    model: inside of the engine's module. Under ZeRO-3 a copy, which may be kept; else the live weight itself,
    to be read before the next update.
    """
    is_adapted, stored = hasattr(model, "peft_config"), model.state_dict().keys()
    named: dict[str, torch.Tensor] = dict(model.named_parameters())
    if is_adapted:
        named = {name: tensor for name, tensor in named.items() if is_adapter(name)}
    else:
        named |= {name: buffer for name, buffer in model.named_buffers() if name in stored}
    if engine.zero_stage < 3:
        yield from ((name, tensor.detach()) for name, tensor in named.items())
        return
    for name, tensor in engine.whole_weights(named):
        yield name, tensor.detach().clone()
