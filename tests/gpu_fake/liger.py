"""Liger's kernels on the fake device: its autograd functions run as they are, its launches are counted.

A launch counts the tensors that its kernel loads and stores, as Liger's sources have them (`MOVED`): each
whole and once, save for what is noted there. What its functions ask torch for beside them (zeros, the sum of
a weight's partial gradients) is counted as all operations of torch. Nothing is computed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from tests.gpu_fake.device import Device
from tests.gpu_fake.kernels import size_of

MOVED: dict[str, dict[str, dict[str, float]]] = {
    "rms_norm": {
        "_rms_norm_forward_kernel": {"Y_ptr": 1, "X_ptr": 1, "W_ptr": 1, "RSTD_ptr": 1},
        "_rms_norm_backward_kernel": {
            "dY_ptr": 1, "dX_ptr": 1, "X_ptr": 1, "W_ptr": 1, "RSTD_ptr": 1, "dW_ptr": 1,
        },
    },
    # queries and keys in place; the right half of cosines and sines is their left half and is not loaded
    "rope": {"_triton_rope": {"q_ptr": 2, "k_ptr": 2, "cos": 0.5, "sin": 0.5}},
    # the backward kernel writes gradients over the gate and the values
    "swiglu": {
        "_swiglu_forward_kernel": {"a_ptr": 1, "b_ptr": 1, "c_ptr": 1},
        "_swiglu_backward_kernel": {"dc_ptr": 1, "a_ptr": 2, "b_ptr": 2},
    },
}  # fmt: skip
"""By module and kernel: how often each of its tensors is read or written."""


class Launch:
    """In the place of a Triton kernel: `kernel[grid](...)` counts."""

    def __init__(self, name: str, parameters: list[str], moved: dict[str, float]) -> None:
        self._name, self._parameters, self._moved = name, parameters, moved

    def __getitem__(self, grid: Any) -> Launch:
        return self

    def __call__(self, *arguments: Any, **more: Any) -> None:
        given = dict(zip(self._parameters, arguments, strict=False)) | more
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        if tensors.keys() != self._moved.keys():
            raise RuntimeError(f"{self._name} was given {sorted(tensors)}, expected {sorted(self._moved)}")
        device = Device.current
        assert device is not None
        if device.kernels is not None:
            size = sum(times * size_of(tensors[name]) for name, times in self._moved.items())
            with device.kernels.fused([(f"liger: {self._name.strip('_')}", size)]):
                pass


def put_into(network: Any) -> None:
    """Its norms, rotary embedding and SwiGLU in a llama, by Liger's own patch."""
    for module, kernels in MOVED.items():
        ops = import_module(f"liger_kernel.ops.{module}")
        for name, moved in kernels.items():
            setattr(ops, name, Launch(name, getattr(ops, name).arg_names, moved))
    torch.cuda._exchange_device = lambda device: 0
    torch.cuda._maybe_exchange_device = lambda device: -1
    patch = import_module("liger_kernel.transformers").apply_liger_kernel_to_llama
    patch(fused_linear_cross_entropy=False, model=network)
