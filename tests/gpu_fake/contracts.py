"""What kernels of a GPU refuse or take, and torch's derivation of shapes does not tell."""

from __future__ import annotations

from typing import Any

import torch

from tests.gpu_fake.record import tensors_in

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmm_", "mv", "dot"}
HALF = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256


def refuse(func: Any, args: Any, kwargs: Any) -> None:
    """RuntimeError where the kernel would raise one."""
    name = func.overloadpacket.__name__
    if name in PRODUCTS:
        _refuse_dtypes(name, func, args)
    if name == "_varlen_attn":
        _refuse_attention(*args, **kwargs)


def _refuse_dtypes(name: str, func: Any, args: Any) -> None:
    """Factors have one dtype; what they are added to may have another where the product says its own."""
    tensors = tensors_in(args)
    factors = tensors[1:] if name.startswith(("addmm", "baddbmm")) else tensors
    dtypes = {x.dtype for x in (factors if "dtype" in func._overloadname else tensors)}
    if len(dtypes) > 1:
        raise RuntimeError(f"{func}: expected one dtype, got {sorted(map(str, dtypes))}")


def _refuse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Any = None,
    enable_gqa: bool = False,
    used: torch.Tensor | None = None,
    *more: Any,
    **options: Any,
) -> None:
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 or query.dtype not in HALF:
        raise RuntimeError(
            f"flash attention: expected one half-precision dtype, got {sorted(map(str, dtypes))}"
        )
    for bounds in (cu_seq_q, cu_seq_k):
        if bounds.dtype is not torch.int32:
            raise RuntimeError(f"flash attention: boundaries must be int32, got {bounds.dtype}")
    if used is not None and (
        used.dtype is not torch.int32 or used.shape != (len(cu_seq_q) - 1,) or not used.is_contiguous()
    ):
        raise RuntimeError(f"flash attention: seqused_k {used.dtype} {tuple(used.shape)}")
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise RuntimeError(f"flash attention: {query.shape[1]} heads on {key.shape[1]} without enable_gqa")
    width = query.shape[2]
    if width % 8 or width > WIDEST_HEAD or any(x.stride(-1) != 1 for x in (query, key, value)):
        raise RuntimeError(f"flash attention: a head of width {width}, or elements that are not side by side")


def attention_workspace(func: Any, args: Any) -> int:
    """Bytes that `common/model/efficient_attention.py` says its kernel takes while it runs; 0 of others."""
    name = func.overloadpacket.__name__
    if not name.startswith("efficient_attention"):
        return 0
    query, key, bounds, longest = (
        args[n] for n in ((0, 1, 3, 4) if "backward" not in name else (1, 2, 4, 9))
    )
    tokens, heads, width = query.shape
    padded = 4 * (len(bounds) - 1) * heads * (-(-longest // 32) * 32)
    passes = 2 if "backward" in name else 1  # repeated keys and values; their gradients
    repeated = passes * 2 * query.numel() * query.element_size() if heads > key.shape[1] else 0
    return int(padded * (width + 1 if "backward" in name else 1) + repeated)
