"""4-bit base weights under adapters (QLoRA, arXiv 2305.14314), by bitsandbytes, on a GPU or on the CPU.

Takes a dtype and gives transformers its quantization settings; takes a loaded network and keeps its weights
in one layout. Quantizes nothing itself.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

from common.errors import UserError
from common.text import one_line

if TYPE_CHECKING:
    import torch


def nf4_config(dtype: torch.dtype) -> Any:
    """transformers' settings: nf4 with doubly quantized scales, products in `dtype`.

    UserError without bitsandbytes.
    """
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"model.quantize=nf4 needs bitsandbytes ({one_line(error)})", hint="install the extra: .[gpu]"
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_scale(name: str, names: Collection[str]) -> bool:
    """Whether a name of a state dict, one of `names`, is that of a 4-bit weight's scales or codes."""
    weight, dot, _ = name.rpartition(".weight.")
    return bool(dot) and f"{weight}.weight" in names


def keep_one_layout(network: torch.nn.Module) -> None:
    """4-bit layers stay in the layout they were loaded in, also in evaluations on a CPU.

    On a CPU with AVX-512 BF16 bitsandbytes repacks a layer's weights in its first pass without gradients. The
    scales are rounded to bf16 then, and later passes carry no gradient to what is below the layer.
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False
