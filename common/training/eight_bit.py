"""The state of bitsandbytes' 8-bit optimizers as plain numbers, and back: what resharding can divide.

An 8-bit moment is a number of 8 bits per element, each a place in a map, times the largest magnitude of its
block of 256 elements of the flat tensor. Other ranks have other blocks, so that resharding rounds once more,
as every step of such an optimizer does. Small tensors have moments in fp32, which stay as they are.
Optimizers by block-wise quantization: arXiv 2110.02861.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

BLOCK = 256
"""Elements that share a largest magnitude, as bitsandbytes has it."""

WRAPPED = "__bnb_optimizer_quant_state__"
"""Where `Optimizer8bit.state_dict` hides what is not shaped like parameters."""

MAPS = {"1": "dynamic", "2": "udynamic"}
"""Of the first and the second moment, which is never negative: names in `Optimizer8bit.name2qmap`."""


def decoded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The stored state of a flat tensor with its moments in fp32; that of another optimizer as it is."""
    state = {key: value for key, value in values.items() if key != WRAPPED} | values.get(WRAPPED, {})
    for number in MAPS:
        if f"absmax{number}" in state:
            codes, largest = state[f"state{number}"], state.pop(f"absmax{number}")
            numbers = state.pop(f"qmap{number}")[codes.int()]
            state[f"state{number}"] = numbers * largest.repeat_interleave(BLOCK)[: codes.numel()]
    return state


def encoded(values: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `decoded` returned, as the optimizer keeps it for a flat tensor of that size."""
    maps, state = getattr(optimizer, "name2qmap", None), dict(values)
    if maps is None:
        return state
    for number, name in MAPS.items():
        moment = state.get(f"state{number}")
        if moment is not None and moment.numel() >= optimizer.args.min_8bit_size:  # type: ignore[attr-defined]
            state |= _quantized(moment, maps[name].to(moment.device), number)
    return state


def _quantized(moment: torch.Tensor, ordered: torch.Tensor, number: str) -> dict[str, torch.Tensor]:
    """Each element as the nearest of the map times its block's factor.

    No negative number of the map reaches -1. bitsandbytes divides by the largest magnitude alone, which would
    shrink blocks whose largest element is negative; here what was quantized stays as it is.
    """
    blocks = torch.nn.functional.pad(moment, (0, -moment.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.amax(1) / ordered[-1]
    if ordered[0] < 0:
        largest = torch.maximum(largest, blocks.amin(1) / ordered[0])
    between = (ordered[1:] + ordered[:-1]) / 2
    places = torch.bucketize(blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None], between)
    codes = places.to(torch.uint8).flatten()[: moment.numel()].clone()
    return {f"state{number}": codes, f"absmax{number}": largest, f"qmap{number}": ordered}
